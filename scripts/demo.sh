#!/usr/bin/env bash
# `up`: a cluster, the operator, a nest (docs/examples/birbnest.yaml), one value written, read back and seen in PostgreSQL.
# What is there already is kept, so that a second time is quick. `down` removes all of it.
#   DEMO_KUBECONFIG=FILE   a cluster of yours, in place of one of our own (as root, in .dev/cluster). KUBECONFIG is
#                          ignored: many have it set to a cluster that is no place for demonstrations
#   DEMO_VALUES=FILE       values for the chart, for a cluster of yours that gets its images from elsewhere
set -euo pipefail
cd "$(dirname "$0")/.."

release=birb-nest release_namespace=birb-nest-system
nest=demo namespace=birb-nest-demo
label=app.kubernetes.io/managed-by=birb-nest-demo # what down may remove from a cluster of yours
crd=crd/birbnests.cache.birb.party
dir=$PWD/.dev/cluster
target=${CARGO_TARGET_DIR:-target}
export BIRB_NEST_CLUSTER_DIR=$dir

say() { printf 'demo: %s\n' "$*"; }
fail() { printf 'demo: %s\n' "$*" >&2 && exit 1; }
# Without fd 3: what keeps the cluster outlives this script, and whoever reads its output would wait for it.
cluster() { "$target/debug/birb-nest-cluster" "$@" 3>&-; }

# use_cluster: kubectl and helm, and all that follows, mean this cluster.
use_cluster() {
  if [ -n "${DEMO_KUBECONFIG:-}" ]; then
    for tool in kubectl helm curl; do type -P $tool >/dev/null || fail "$tool is missing: install it, to use the cluster of DEMO_KUBECONFIG"; done
    KUBECONFIG=$(realpath -- "$DEMO_KUBECONFIG") || fail "DEMO_KUBECONFIG names $DEMO_KUBECONFIG, which is not there"
  else
    # Theirs fit the cluster, whatever is on PATH.
    tools=$(cluster build)
    PATH=$tools:$PATH
    KUBECONFIG=$dir/kubeconfig
  fi
  export KUBECONFIG
}

there() { kubectl get --output=name "$@" >/dev/null 2>&1; }
in_demo() { kubectl --namespace=$namespace "$@"; }
is_ours() { [ -n "$(kubectl get namespace --selector=$label --field-selector="metadata.name=$1" --output=name)" ]; }

down() {
  [ -x "$target/debug/birb-nest-cluster" ] || [ -n "${DEMO_KUBECONFIG:-}" ] || { say "nothing was built, nothing runs" && return; }
  if [ -z "${DEMO_KUBECONFIG:-}" ]; then
    cluster down
    say "the cluster in .dev/cluster is gone, and all that was in it"
    return
  fi
  use_cluster
  is_ours $release_namespace || { say "nothing of the demo is in the cluster of $KUBECONFIG" && return; }
  in_demo delete --ignore-not-found --timeout=120s "birbnest/$nest" || true
  kubectl delete --ignore-not-found --timeout=120s namespace $namespace
  helm uninstall $release --namespace $release_namespace --ignore-not-found --wait --timeout 2m
  # The chart keeps it, because every nest of the cluster would go with it.
  [ -n "$(kubectl get birbnests --all-namespaces --output=name 2>/dev/null)" ] || kubectl delete --ignore-not-found $crd
  kubectl delete --timeout=120s namespace $release_namespace
  say "nest, operator and their namespaces are gone from the cluster of $KUBECONFIG"
}

# Interrupted, whoever began from nothing leaves nothing. What failed stays to be looked at.
began='' forwarder=''
finish() {
  local status=$?
  trap '' INT TERM
  exec >&3 2>&1 # what was interrupted may have been told to be silent
  [ -z "$forwarder" ] || kill "$forwarder" 2>/dev/null || true
  case $status in
    0) ;;
    130 | 143)
      echo
      if [ -n "$began" ]; then
        say "interrupted: removing what was begun"
        down
      else
        say "interrupted: what was there before stays; make demo-down removes it"
      fi
      ;;
    *) say "failed; what was begun stays to be looked at, make demo-down removes it" ;;
  esac
  exit "$status"
}

# make_namespace NAME [LABEL...]
make_namespace() {
  there namespace "$1" || { kubectl create namespace "$1" && kubectl label namespace "$1" $label "${@:2}"; } >/dev/null
  is_ours "$1" || fail "namespace $1 is there, and is not the demo's: use another cluster"
}

# The images that changed since this cluster got them, into its node; and whatever runs them is to begin anew.
load_images() {
  local loaded=$dir/images-loaded archive name line
  changed=''
  touch "$loaded"
  for archive in "$target"/images/*.tar; do
    line=$(sha256sum "$archive")
    ! grep -qxF -- "$line" "$loaded" || continue
    name=${archive##*/}
    say "loading image ${name%.tar}"
    cluster load-image "$archive"
    changed+=" ${name%.tar}"
    { grep -vF -- "$archive" "$loaded" || true; echo "$line"; } >"$loaded.new"
    mv "$loaded.new" "$loaded"
  done
}

install_operator() {
  make_namespace $release_namespace
  helm upgrade $release charts/birb-nest --install --namespace $release_namespace --wait --timeout 3m \
    ${DEMO_VALUES:+--values "$DEMO_VALUES"} >/dev/null || {
    kubectl --namespace=$release_namespace get pods,events >&2
    fail "the operator does not get ready"
  }
  case " ${changed:-} " in *" birb-nest-operator "*)
    kubectl --namespace=$release_namespace rollout restart "deployment/$release-operator" >/dev/null
    ;;
  esac
  kubectl --namespace=$release_namespace rollout status --timeout=2m "deployment/$release-operator" >/dev/null
  helm test $release --namespace $release_namespace --timeout 2m >/dev/null || fail "\`helm test $release\` failed"
}

make_nest() {
  make_namespace $namespace pod-security.kubernetes.io/enforce=restricted
  applied=''
  if ! in_demo get --output=name "birbnest/$nest" >/dev/null 2>&1; then
    applied=$(now)
  elif [[ " ${changed:-} " == *" birb-nest "* ]]; then
    in_demo rollout restart "deployment/$nest-api" "deployment/$nest-worker" >/dev/null 2>&1 || true
  fi
  in_demo apply --filename=docs/examples/birbnest.yaml
  in_demo wait --for=condition=Ready --timeout=5m "birbnest/$nest" >/dev/null || {
    in_demo describe birbnest $nest >&2
    in_demo get pods,events >&2
    fail "the nest does not get ready: its conditions above say why"
  }
  in_demo rollout status --timeout=2m "deployment/$nest-api" >/dev/null
}

now() { date +%s%N; }
seconds_since() { awk "BEGIN { printf \"%.1f\", ($(now) - $1) / 1e9 }"; }

# From here to the Service, until this script ends; sets `url`.
forward() {
  coproc kubectl --namespace=$namespace port-forward "service/$nest" :8080 2>&1
  forwarder=$COPROC_PID
  local line
  read -r line <&"${COPROC[0]}" || true
  [[ $line =~ 127\.0\.0\.1:([0-9]+) ]] || fail "kubectl port-forward does not work: ${line:-it said nothing}"
  url=http://127.0.0.1:${BASH_REMATCH[1]}/v1/cache/greeting
}

write_and_read() {
  local value written read row deadline
  forward
  value="hello at $(date -u +%T)"
  written=$(curl -fsS --max-time 10 --json "{\"value\": \"$value\"}" "$url") || fail "the value was not taken"
  [ -z "$applied" ] || applied=$(seconds_since "$applied")
  read=$(curl -fsS --max-time 10 "$url") || fail "the value was taken, and cannot be read"
  [[ $read == *"\"value\":\"$value\""* ]] || fail "another value came back: $read"
  printf '  written  %s\n  read     %s\n' "$written" "$read"
  # A worker stores it within milliseconds.
  deadline=$((SECONDS + 30))
  until row=$(in_demo exec $nest-postgres-0 -- psql -U birb -d birb_nest -Atc \
    "select key, version, convert_from(value, 'UTF8') from cache_entries where key = 'greeting'") && [[ $row == *"$value"* ]]; do
    [ $SECONDS -lt $deadline ] || fail "the value is not in PostgreSQL: kubectl logs deployment/$nest-worker tells why; found: $row"
  done
  printf '  stored   %s\n' "$row"
}

what_next() {
  local path=''
  [ -n "${DEMO_KUBECONFIG:-}" ] || path="
  export PATH=$tools:\$PATH   # kubectl, helm"
  cat <<END

  The cluster is yours to try, from any terminal:
$path
  export KUBECONFIG=$KUBECONFIG
  kubectl config set-context --current --namespace=$namespace
  kubectl get bn -o wide                     # the nest, its endpoint, how far its setup is
  kubectl describe bn $nest                   # conditions and events
  kubectl get pods,svc,pvc
  kubectl patch bn $nest --type=merge -p '{"spec":{"worker":{"scaling":{"minReplicas":2}}}}'   # workers share the shards, and follow the backlog
  kubectl patch bn $nest --type=merge --patch='{"spec": {"api": {"replicas": 3}}}'
  kubectl delete pod $nest-redis-0            # nothing is lost: read the value again
  kubectl port-forward svc/$nest 8080:8080 &  # then: curl -i http://localhost:8080/v1/cache/greeting
  kubectl exec -it $nest-postgres-0 -- psql -U birb -d birb_nest

  make demo-down${DEMO_KUBECONFIG:+ DEMO_KUBECONFIG=$KUBECONFIG} ends it.

END
}

up() {
  exec 3>&1
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap finish EXIT
  if [ -z "${DEMO_KUBECONFIG:-}" ] && [ "$(id -u)" != 0 ]; then
    fail "a node that runs pods needs root. As root: make demo; or on a cluster of yours: make demo DEMO_KUBECONFIG=\$HOME/.kube/config"
  fi
  changed='' tools=''
  if [ -n "${DEMO_KUBECONFIG:-}" ]; then
    use_cluster
    say "using the cluster of $KUBECONFIG, with images that its nodes can get"
    kubectl get --raw=/readyz --request-timeout=30s >/dev/null || fail "that cluster does not answer"
    if ! is_ours $release_namespace; then
      ! there $crd || fail "that cluster has birb-nest already; try: kubectl apply -f docs/examples/birbnest.yaml"
      began=1
    fi
  else
    scripts/init.sh --cluster
    say "building everything, and images of it into target/images"
    scripts/images.sh >/dev/null
    scripts/server-images.sh >/dev/null
    use_cluster
    if cluster kubeconfig >/dev/null 2>&1; then
      say "using the cluster in .dev/cluster, which runs"
      there node/node1 || fail "it has no node: it was started by hand. End it by make demo-down"
    else
      say "starting a cluster in .dev/cluster"
      began=1
      cluster up >/dev/null
    fi
    load_images
  fi
  say "installing the operator by helm into $release_namespace"
  install_operator
  say "applying docs/examples/birbnest.yaml in $namespace, and waiting until it is ready"
  make_nest
  write_and_read
  began=''
  what_next
  say "ok${applied:+, $applied s from kubectl apply to the first durable write}"
}

case ${1:-} in
  up | down) "$1" ;;
  *) echo "usage: scripts/demo.sh up | down" >&2 && exit 2 ;;
esac
