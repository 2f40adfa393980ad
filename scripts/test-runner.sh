#!/usr/bin/env bash
# cargo's runner for test binaries (see test.sh): runs those of the packages that BIRB_NEST_TESTS asks for.
case ${CARGO_PKG_NAME:?cargo sets this} in
  birb-nest-stack | birb-nest-integration) kind=integration ;;
  *) kind=unit ;;
esac
case ${BIRB_NEST_TESTS:-all} in
  all | "$kind") exec "$@" ;;
  *) echo "(not asked for: $CARGO_PKG_NAME)" ;;
esac
