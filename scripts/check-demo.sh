#!/usr/bin/env bash
# The demo on a cluster of its own; then on that same cluster as if it were one of yours (DEMO_KUBECONFIG), from which `make demo-down`
# must take all that `make demo` brought, and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

trap 'make demo-down' EXIT
make demo

tools=$("${CARGO_TARGET_DIR:-target}/debug/birb-nest-cluster" build)
yours=$PWD/.dev/cluster/kubeconfig
export PATH=$tools:$PATH
what_is_left() { kubectl --kubeconfig="$yours" get namespaces,crds,clusterroles,clusterrolebindings --output=name | sort; }

make demo-down DEMO_KUBECONFIG="$yours"
before=$(what_is_left)
make demo DEMO_KUBECONFIG="$yours"
make demo-down DEMO_KUBECONFIG="$yours"
difference=$(diff <(printf '%s\n' "$before") <(what_is_left)) || {
  printf 'check-demo: make demo DEMO_KUBECONFIG=… and make demo-down changed the cluster:\n%s\n' "$difference" >&2
  exit 1
}
grep -q birb <<<"$before" && {
  printf 'check-demo: make demo-down left something behind:\n%s\n' "$(grep birb <<<"$before")" >&2
  exit 1
}
echo "check-demo: ok"
