#!/usr/bin/env bash
# Puts schemathesis, which holds a running API against its OpenAPI document, into .dev/schemathesis and on .dev/bin.
set -euo pipefail
cd "$(dirname "$0")/.."
pinned=scripts/schemathesis.txt
home=.dev/schemathesis
if cmp -s $pinned $home/pinned && [ -x $home/bin/schemathesis ]; then exit; fi
python=''
for name in python3 python3.14 python3.13 python3.12 python3.11; do
  "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$name && break
done
[ -n "$python" ] || { echo "schemathesis: Python 3.11 or newer with venv is needed (Debian: apt-get install python3-venv)" >&2 && exit 1; }
echo "schemathesis: installing it into $home"
rm -rf $home
"$python" -m venv $home
$home/bin/pip install --quiet --disable-pip-version-check --constraint $pinned schemathesis
mkdir -p .dev/bin
ln -sfn ../schemathesis/bin/schemathesis .dev/bin/schemathesis
cp $pinned $home/pinned
