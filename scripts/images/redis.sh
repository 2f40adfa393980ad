#!/bin/sh
# The entry point of the stand-in for the public Redis image: options or a configuration file alone are redis-server's.
set -eu
case ${1:-} in -* | *.conf) set -- redis-server "$@" ;; esac
exec "$@"
