#!/usr/bin/env bash
# Runs the tests and prints how many passed and failed in all. Exits as the test run did.
#   scripts/test.sh all | unit | integration | cluster | e2e      T=name picks tests by name
# `all` is all but e2e, the ring that needs root and a cluster that runs pods.
set -euo pipefail
cd "$(dirname "$0")/.."

# Always the whole workspace, so that features (and with them all compiled crates) stay the same;
# test-runner.sh then leaves out the packages that were not asked for.
options=(--config "target.'cfg(all())'.runner='$PWD/scripts/test-runner.sh'")
case ${1:-all} in
  all) ;;
  unit) options+=(--lib --bins) ;;
  integration | cluster | e2e) options+=(--lib --bins --tests) ;;
  *) echo "usage: scripts/test.sh all | unit | integration | cluster | e2e" >&2 && exit 2 ;;
esac
export BIRB_NEST_TESTS=${1:-all}

servers='' cluster='' old=''
case $BIRB_NEST_TESTS in all | integration) servers=1 ;; esac
case $BIRB_NEST_TESTS in all | cluster | e2e) cluster=1 ;; esac
case $BIRB_NEST_TESTS in all | integration | e2e) old=1 ;; esac
[ -z "$servers$cluster" ] || scripts/init.sh --tests
[ "$BIRB_NEST_TESTS" != e2e ] || scripts/init.sh --cluster

# A release that birb-nest must refuse: the tests start it.
old_nats=$PWD/.dev/old/nats-server
if [ -n "$old" ] && [ ! -x "$old_nats" ]; then
  echo "test: building nats-server 2.10.27, to see it refused"
  GOBIN=${old_nats%/*} go install github.com/nats-io/nats-server/v2@v2.10.27
fi

if [ -n "$servers" ]; then scripts/checker.sh && scripts/schemathesis.sh; fi

cargo build --workspace --all-targets
if [ "$BIRB_NEST_TESTS" = e2e ]; then
  scripts/images.sh
  scripts/server-images.sh
fi
# Here, because a test that builds for minutes looks as if it hung.
[ -z "$cluster" ] || "${CARGO_TARGET_DIR:-target}/debug/birb-nest-cluster" build >/dev/null
log=$(mktemp)
trap 'rm -f "$log"' EXIT
set +e
cargo test --workspace --no-fail-fast ${options[@]+"${options[@]}"} -- ${T:+"$T"} 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
set -e

awk '/test result: / {
       for (i = 2; i <= NF; i++) { if ($i ~ /^passed/) passed += $(i-1); if ($i ~ /^failed/) failed += $(i-1); if ($i ~ /^ignored/) ignored += $(i-1) }
     }
     END {
       printf "\n%d passed, %d failed%s\n", passed, failed, ignored ? sprintf(", %d ignored", ignored) : ""
       exit passed == 0
     }' "$log" || { echo "no test passed" >&2; [ "$status" -ne 0 ] || status=1; }
[ "$BIRB_NEST_TESTS" != all ] || echo "(the pod ring was not run: make test-e2e)"
exit "$status"
