#!/usr/bin/env bash
# Checks charts/birb-nest: its versions and CRD are the code's, it passes `helm lint --strict`, renders with its defaults
# and with everything set, and refuses what it does not know. Says so and passes where there is no helm.
set -euo pipefail
cd "$(dirname "$0")/.."
chart=charts/birb-nest
fail() { echo "chart: $*" >&2 && exit 1; }

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' Cargo.toml)
for field in version appVersion; do
  grep -qx "$field: $version" $chart/Chart.yaml || fail "$field in $chart/Chart.yaml is not $version, the version in Cargo.toml"
done
diff -r crds $chart/files/crds || fail "the CRD in the chart is not that of crds/: run make generate"

if ! scripts/helm.sh version >/dev/null 2>&1; then
  echo "chart: helm not found, not rendered"
  exit
fi
# Without a cluster helm assumes a Kubernetes of its own choice.
kubernetes=(--kube-version 1.34.0)
release=birb-nest namespace=birb-nest-system
render() { scripts/helm.sh template "$release" $chart "${kubernetes[@]}" --namespace "$namespace" "$@"; }
refused() { ! render --set "$1" >/dev/null 2>&1 || fail "the chart takes --set $1"; }
renders() { # PATTERN [OPTION...]
  local pattern=$1 rendered
  shift
  rendered=$(render "$@") || fail "helm template $* failed"
  grep -qE -- "$pattern" <<<"$rendered" || fail "nothing like $pattern is in what helm template $* renders"
}
lacks() { # PATTERN [OPTION...]
  local pattern=$1 rendered
  shift
  rendered=$(render "$@") || fail "helm template $* failed"
  ! grep -E -- "$pattern" <<<"$rendered" || fail "that is in what helm template $* renders"
}

for values in values.yaml ci/everything-values.yaml ci/own-images-values.yaml; do
  scripts/helm.sh lint --strict --quiet "${kubernetes[@]}" --values $chart/$values $chart
done
everything=(--values "$chart"/ci/everything-values.yaml)
renders 'image: "registry.example.com/birb/operator@sha256:0123456789abcdef' "${everything[@]}"
for image in birb/nest birb/redis:7 birb/nats:2 birb/postgres:16; do
  renders "value: \"registry.example.com:5000/mirror/$image\"" "${everything[@]}"
done
own_images=(--values "$chart"/ci/own-images-values.yaml)
renders 'image: "registry.example.com/birb/birb-nest-operator:0.1.0-mine"' "${own_images[@]}"
renders 'value: "registry.example.com/birb/birb-nest"' "${own_images[@]}"
renders 'value: 0.1.0-mine' "${own_images[@]}"
renders 'helm.sh/resource-policy: keep'
lacks 'helm.sh/resource-policy: keep' --set crds.keep=false
lacks '^kind: CustomResourceDefinition$' --set crds.install=false
lacks '^kind: ServiceAccount$' --set serviceAccount.create=false
lacks '^kind: BirbNest$'
# Names that YAML takes for numbers or booleans stay text.
odd_names=(--set-string "nameOverride=12,fullnameOverride=no,namespaces={12},priorityClassName=12,serviceAccount.name=12")
for name in 12 1e3 no; do
  release=$name namespace=$name lacks ": ($name|12|no)$"
  release=$name namespace=$name lacks ": ($name|12|no)$" "${everything[@]}" "${odd_names[@]}"
done
# Names of releases that no Service may have.
many=$(printf '2%.0s' {1..43})
for name in 2birb=birb-nest-2birb birb.nest=birb-nest "$many-birbnest=birb-nest-$many"; do
  release=${name%=*} renders "^  name: \"?${name#*=}-operator\"?$" --set crds.install=false
  release=${name%=*} lacks '^  name: "?([^"a-z]|[^"]*[.])' --set crds.install=false
done
for value in fullnameOverride=2birb nonsense=1 image.nonsense=1 replicas=-1 image.digest=sha256:1 logFormat=xml leaseDuration=1s nestImages.redis.tag=; do
  refused "$value"
done
echo "chart: ok"
