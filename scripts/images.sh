#!/usr/bin/env bash
# Builds the images of the data plane and of the operator into target/images, as docker-archives: for `docker load`,
# `ctr image import`, `kind load image-archive`. From this machine's dev binaries; RELEASE=1 takes release binaries.
# By buildah, as root; where that is missing by Docker, which compiles a release in its own container.
#   IMAGE_REGISTRY (ghcr.io/birbparty), IMAGE_TAG (the version in Cargo.toml)
set -euo pipefail
cd "$(dirname "$0")/.."

: "${IMAGE_REGISTRY:=ghcr.io/birbparty}"
: "${IMAGE_TAG:=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version *= *"\(.*\)"/\1/p' Cargo.toml)}"
names=(birb-nest birb-nest-operator)
# shellcheck source=scripts/images/lib.sh
. scripts/images/lib.sh

if ! command -v buildah >/dev/null && command -v docker >/dev/null; then
  mkdir -p "$archives"
  for name in "${names[@]}"; do
    docker build --target "$name" --tag "$IMAGE_REGISTRY/$name:$IMAGE_TAG" .
    docker save --output "$archives/$name.tar" "$IMAGE_REGISTRY/$name:$IMAGE_TAG"
  done
  list_images
  exit
fi

prepare strip dpkg-deb

if [ -n "${RELEASE:-}" ]; then
  cargo build --release --workspace --bins
  binaries=${CARGO_TARGET_DIR:-target}/release
else
  cargo build --workspace --all-targets
  binaries=${CARGO_TARGET_DIR:-target}/debug
fi

# The stage `root`, with the directory that the Dockerfile copies. A release takes the packages of today.
stage=$image_cache/runtime-$(content_of scripts/images/runtime-root.sh /etc/os-release)
[ -z "${RELEASE:-}" ] || rm -rf "$stage"
if [ ! -d "$stage" ]; then
  scripts/images/runtime-root.sh "$scratch/stage/root"
  keep "$scratch/stage" "$stage"
fi
mkdir "$scratch/build"
for name in "${names[@]}"; do
  strip --output-file "$scratch/build/$name" "$binaries/$name"
  build_image "$IMAGE_REGISTRY/$name:$IMAGE_TAG" "$name" Dockerfile "$archives/$name.tar" \
    --build-context root="$stage" --build-context build="$scratch/build"
done
list_images
