#!/usr/bin/env bash
# Asks the API (/health) and the worker (/readyz) how they are. Exits 1 unless both answer 200.
set -euo pipefail
cd "$(dirname "$0")/.."
api_port=${API_PORT:-}
worker_port=${WORKER_ADMIN_PORT:-}
# shellcheck source=/dev/null
[ ! -f .dev/env ] || . .dev/env

failed=0
ask() {
  local name=$1 url=$2 answer
  if ! answer=$(curl -sS --max-time 5 --write-out '\n%{http_code}' "$url" 2>&1); then
    printf '%-7s down  %s\n        %s\n' "$name" "$url" "${answer%%$'\n'*}"
    failed=1
    return
  fi
  printf '%-7s %s   %s\n        %s\n' "$name" "${answer##*$'\n'}" "$url" "${answer%$'\n'*}"
  [ "${answer##*$'\n'}" = 200 ] || failed=1
}
ask api "http://127.0.0.1:${api_port:-${API_PORT:-8080}}/health"
ask worker "http://127.0.0.1:${worker_port:-${WORKER_ADMIN_PORT:-9091}}/readyz"
exit "$failed"
