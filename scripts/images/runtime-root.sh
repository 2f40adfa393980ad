#!/usr/bin/env bash
# Unpacks into the directory $1 what a birb-nest binary needs around it, from the packages of the Debian or Ubuntu
# this runs on: so the C library fits binaries that were built here. No package manager, and of shells only bash: the
# health checks of docker-compose.yml use it. Used by the Dockerfile and by scripts/images.sh.
set -euo pipefail
root=$1
packages=(base-files bash ca-certificates libc6 libgcc-s1 libtinfo6)

debs=$(mktemp -d)
trap 'rm -rf "$debs"' EXIT
chmod 755 "$debs"
fetch() { (cd "$debs" && apt-get -o APT::Sandbox::User=root -q download "${packages[@]}"); }
fetch 2>/dev/null || { apt-get -q update && fetch; } # without package lists, or with old ones, the first attempt fails

mkdir -p "$root/var/lib/dpkg/status.d"
for deb in "$debs"/*.deb; do
  dpkg-deb --extract "$deb" "$root"
  # Where scanners look for the packages of an image without dpkg.
  dpkg-deb --field "$deb" >"$root/var/lib/dpkg/status.d/$(dpkg-deb --field "$deb" Package)"
done
cat "$root"/usr/share/ca-certificates/mozilla/*.crt >"$root/etc/ssl/certs/ca-certificates.crt"
printf '%s\n' 'root:x:0:0:root:/root:/sbin/nologin' 'nonroot:x:65532:65532:nonroot:/:/sbin/nologin' >"$root/etc/passwd"
printf '%s\n' 'root:x:0:' 'nonroot:x:65532:' >"$root/etc/group"
echo 'hosts: files dns' >"$root/etc/nsswitch.conf"
# Copyright files stay.
find "$root/usr/share/doc" ! -type d ! -name copyright -delete
rm -rf "$root"/usr/share/{ca-certificates,info,lintian,locale,man,menu} "$root"/usr/lib/*/gconv "${root:?}"/{boot,etc/skel}
