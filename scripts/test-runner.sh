#!/usr/bin/env bash
# cargo's runner for test binaries (see test.sh): runs those of the packages that BIRB_NEST_TESTS asks for.
# A test binary called `pods`, of whichever package, needs a cluster that runs pods.
program=${1##*/}
case ${CARGO_PKG_NAME:?cargo sets this}/${program%-*} in
  */pods) kind=e2e ;;
  birb-nest-stack/* | birb-nest-integration/* | birb-nest-soak/*) kind=integration ;;
  birb-nest-cluster/* | birb-nest-e2e/*) kind=cluster ;;
  *) kind=unit ;;
esac
case ${BIRB_NEST_TESTS:-all}/$kind in
  all/e2e) echo "(not run: the pod ring of $CARGO_PKG_NAME; make test-e2e runs it)" ;;
  all/* | "$kind/$kind") exec "$@" ;;
  *) echo "(not asked for: $CARGO_PKG_NAME)" ;;
esac
