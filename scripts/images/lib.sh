# shellcheck shell=bash
# Sourced from the repository's directory by the scripts that build images without Docker.
# Images are built by buildah in storage of their own, which is gone afterwards: that of the person here is left alone.

archives=$(realpath -m -- "${CARGO_TARGET_DIR:-target}")/images
image_cache=${XDG_CACHE_HOME:-$HOME/.cache}/birb-nest/images

# prepare COMMAND...: sees that these and buildah are here, makes the directory $scratch and has it removed at the end.
prepare() {
  local missing='' command
  for command in buildah "$@"; do type -P "$command" >/dev/null || missing+=" $command"; done
  if [ -n "$missing" ] || [ "$(id -u)" != 0 ]; then
    echo "Images are built and run as root, on Debian or Ubuntu. Missing here:${missing:- nothing, you are not root}. Packages:" \
      "apt-get install --no-install-recommends binutils buildah curl iproute2 mmdebstrap" >&2
    exit 1
  fi
  mkdir -p "$archives" "$image_cache"
  # In the cache, so that a rename is enough to keep what was made. IMAGE_SCRATCH: the caller made it and removes it.
  scratch=${IMAGE_SCRATCH:-}
  if [ -z "$scratch" ]; then
    scratch=$(mktemp -d "$image_cache/unfinished-XXXXXX")
    trap 'rm -rf --one-file-system "$scratch"' EXIT
  fi
  mkdir -p "$scratch/empty"
  echo '{"default": [{"type": "insecureAcceptAnything"}]}' >"$scratch/policy.json"
}

# `vfs` works on every file system and leaves no mounts behind.
in_storage() { buildah --root "$scratch/storage" --runroot "$scratch/run" --storage-driver vfs "$@"; }

# build_image NAME TARGET DOCKERFILE ARCHIVE [OPTION...]: one target of a Dockerfile, into a docker-archive under its name.
# Reads no files but those of the build contexts among the options, fetches nothing, and notes no time: the same files make
# the same archive.
build_image() {
  local name=$1 target=$2 file=$3 archive=$4
  shift 4
  in_storage build --quiet --isolation chroot --pull=never --signature-policy "$scratch/policy.json" \
    --timestamp 0 --target "$target" --tag "$name" --file "$file" "$@" "$scratch/empty" >/dev/null
  rm -f "$archive.new"
  in_storage push --quiet --signature-policy "$scratch/policy.json" "$name" "docker-archive:$archive.new:$name"
  mv "$archive.new" "$archive"
}

# content_of FILE...: a name for what is made of these files alone.
content_of() { cat "$@" | sha256sum | cut -c1-16; }

# keep NEW CACHED: puts a finished file or directory into the cache, unless somebody else was faster.
keep() { mv -T "$1" "$2" 2>/dev/null || [ -e "$2" ]; }

# Writes $archives/names: file and image name of every archive, a line each; and prints it.
list_images() {
  local archive
  for archive in "$archives"/*.tar; do
    printf '%s %s\n' "${archive##*/}" "$(tar -xOf "$archive" manifest.json | sed -E 's/.*"RepoTags":\["([^"]+)".*/\1/')"
  done >"$archives/names.new"
  mv "$archives/names.new" "$archives/names"
  sed "s|^|$archives/|" "$archives/names"
}
