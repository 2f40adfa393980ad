#!/usr/bin/env bash
# Fails if birb-nest-core depends, directly or not, on a crate that does I/O (docs/ARCHITECTURE.md: core is pure).
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$(cargo tree --package birb-nest-core --edges normal,build --prefix none --format '{p}')
if impure=$(grep -E '^(tokio|axum|sqlx|redis|async-nats)(-[a-z0-9-]+)? ' <<<"$tree"); then
  printf 'birb-nest-core must stay free of I/O, but depends on:\n%s\n' "$impure" >&2
  exit 1
fi
echo "birb-nest-core: pure"
