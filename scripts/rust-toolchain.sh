#!/usr/bin/env bash
# Prints the name of an installed toolchain that is the version pinned in rust-toolchain.toml under another name
# (`stable`), for RUSTUP_TOOLCHAIN. Prints nothing if the pinned name is installed, or if nothing fits.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$HOME/.cargo/bin
command -v rustup >/dev/null || exit 0

pinned=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' rust-toolchain.toml)
installed=$(rustup toolchain list 2>/dev/null | awk '{ print $1 }')
case $'\n'"$installed" in *$'\n'"$pinned"*) exit 0 ;; esac
for name in $installed; do
  case $(RUSTUP_TOOLCHAIN=$name rustc --version 2>/dev/null) in "rustc $pinned "*)
    echo "$name"
    exit 0
    ;;
  esac
done
