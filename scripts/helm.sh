#!/usr/bin/env bash
# Runs helm: the one that the test cluster's programs brought, if they were built, since its version is pinned; else that
# on PATH. Exits with 127 and a sentence if there is none.
set -euo pipefail
built=("${XDG_CACHE_HOME:-$HOME/.cache}"/birb-nest/cluster/*/helm)
if [ -x "${built[0]}" ]; then exec "${built[0]}" "$@"; fi
if type -P helm >/dev/null; then exec helm "$@"; fi
echo "helm is missing: install Helm 3.14 or newer, or run: birb-nest-cluster build" >&2
exit 127
