#!/usr/bin/env bash
# Opens psql or redis-cli on the servers of `make dev`: scripts/dev-client.sh psql | redis-cli [arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -f .dev/env ]; then
  echo "Nothing runs here yet (.dev/env is missing): start with \`make dev\`" >&2
  exit 1
fi
# shellcheck source=/dev/null
. .dev/env
client=${1:?psql or redis-cli}
shift
case $client in
  psql) PGPASSWORD=$POSTGRES_PASSWORD exec psql -h "$POSTGRES_HOST" -p "$POSTGRES_PORT" -U "$POSTGRES_USER" -d "$POSTGRES_DB" "$@" ;;
  redis-cli) exec redis-cli -h "$REDIS_HOST" -p "$REDIS_PORT" "$@" ;;
  *) echo "unknown client: $client" >&2 && exit 2 ;;
esac
