#!/usr/bin/env bash
# Builds the linearizability checker of the soak (tests/soak/porcupine) into .dev/bin. Go's cache makes it quick the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:/usr/local/go/bin
command -v go >/dev/null || { echo "checker: Go 1.25 or newer is needed to build tests/soak/porcupine" >&2 && exit 1; }
# A judge that errs judges nobody.
go test -C tests/soak/porcupine . >/dev/null || { echo "checker: the model fails its own tests: go test -C tests/soak/porcupine ." >&2 && exit 1; }
go build -C tests/soak/porcupine -o "$PWD/.dev/bin/birb-nest-porcupine" .
