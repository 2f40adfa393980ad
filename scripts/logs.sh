#!/usr/bin/env bash
# Follows the logs of `make dev`: scripts/logs.sh api worker ...
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -d .dev/logs ]; then
  echo "There are no logs under .dev/logs: start with \`make dev\` (containers of \`make up\`: docker compose logs -f)" >&2
  exit 1
fi
cd .dev/logs
exec tail -n 100 -F "${@/%/.log}"
