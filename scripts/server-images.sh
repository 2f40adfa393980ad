#!/usr/bin/env bash
# Builds stand-ins for the public images of PostgreSQL, Redis and NATS into target/images, under the public names, for a
# test cluster that reaches no image registry. By buildah and mmdebstrap, as root, and Go. Cached by content: a change
# of these scripts builds anew; remove ~/.cache/birb-nest/images for newer packages.
set -euo pipefail
cd "$(dirname "$0")/.."

nats_version=$(sed -nE 's/^NATS_VERSION=([0-9.]+).*/\1/p' scripts/init.sh)
# The operator's defaults.
declare -A names=(
  [postgres]=docker.io/library/postgres:15-bookworm
  [redis]=docker.io/library/redis:7-bookworm
  [nats]=docker.io/library/nats:$nats_version
)

# shellcheck source=scripts/images/lib.sh
. scripts/images/lib.sh
prepare mmdebstrap go

built=$image_cache/servers-$(content_of scripts/server-images.sh \
  scripts/images/{lib.sh,servers.Dockerfile,postgres.sh,redis.sh} <(echo "$nats_version"))
if [ ! -d "$built" ]; then
  mkdir -p "$scratch/nats/etc" "$scratch/nats/tmp" "$scratch/entry" "$scratch/built"
  echo "server-images: building nats-server $nats_version" >&2
  CGO_ENABLED=0 GOBIN=$scratch/nats go install -trimpath -ldflags '-s -w' "github.com/nats-io/nats-server/v2@v$nats_version"
  echo 'listen: 0.0.0.0:4222' >"$scratch/nats/nats-server.conf"

  # `extract`: no maintainer scripts run; these servers need none.
  echo "server-images: unpacking PostgreSQL 15 and Redis from Debian's packages" >&2
  debian=$scratch/debian
  mmdebstrap --quiet --variant=extract --include=bash,coreutils,dash,grep,libc-bin,postgresql-15,redis-server,sed,tzdata \
    bookworm "$debian"
  # Two thirds of it: what only maintainer scripts, JIT compilation and people would use.
  rm -rf "$debian"/usr/{include,share/{bug,doc,i18n,info,lintian,locale,man,perl,perl5},bin/perl*} \
    "$debian"/usr/lib/*/{gconv,perl,perl-base,perl5,libperl*,libLLVM*,libz3*} \
    "$debian"/usr/lib/postgresql/15/lib/{bitcode,llvmjit*} "$debian"/var/{cache,lib}/{apt,debconf,dpkg}
  # Debian's Perl scripts in front of PostgreSQL's own programs, which PATH has too.
  find "$debian/usr/bin" \( -lname '*/pg_wrapper' -o -name 'pg_*' \) -delete
  printf '%s\n' 'root:x:0:0:root:/root:/bin/bash' 'postgres:x:999:999::/var/lib/postgresql:/bin/bash' >"$debian/etc/passwd"
  printf '%s\n' 'root:x:0:' 'postgres:x:999:' >"$debian/etc/group"
  for directory in var/lib/postgresql/data var/run/postgresql data; do
    install -d -o 999 -g 999 "$debian/$directory"
  done
  install -m 755 scripts/images/postgres.sh scripts/images/redis.sh "$scratch/entry"

  for server in "${!names[@]}"; do
    build_image "${names[$server]}" "$server" scripts/images/servers.Dockerfile "$scratch/built/$server.tar" \
      --build-context debian="$debian" --build-context nats="$scratch/nats" --build-context entry="$scratch/entry"
  done
  keep "$scratch/built" "$built"
fi
for archive in "$built"/*.tar; do
  ln -f "$archive" "$archives/" 2>/dev/null || cp "$archive" "$archives/"
done
list_images
