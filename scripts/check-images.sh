#!/usr/bin/env bash
# Runs the images of target/images together, without a cluster, as a pod of the profile "restricted" would: not root, no
# capabilities, no new privileges, a read-only root, volumes that belong to the pod's group. The servers by the contract
# of the public images, on them birb-nest's setup, api and worker with one write and one read; and birb-nest-operator.
# Everything happens in namespaces of its own, which end with it. As root, after `make images` and scripts/server-images.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/images/lib.sh
. scripts/images/lib.sh
prepare curl ip setpriv unshare
if [ -z "${IMAGE_SCRATCH:-}" ]; then
  # All mounts are made in there and end with it, before anything is removed out here.
  IMAGE_SCRATCH=$scratch unshare --mount --net --pid --fork --kill-child --mount-proc "$0"
  exit
fi
trap 'exit 130' INT TERM # the first process of a PID namespace would ignore them
ip link set lo up

password=check-images
current=''
fail() {
  echo "check-images: $*" >&2
  [ -z "$current" ] || { echo "The end of $current's log:" && tail -n 30 "$scratch/$current.log"; } >&2
  exit 1
}

of_image() { in_storage inspect --type image --format "{{$2}}" "$1"; }

# unpack IMAGE: its root in $scratch/IMAGE/root, read-only but for what Kubernetes mounts: /tmp, and the DIR=PATH that
# follow, with those of a group GID as fsGroup makes them.
unpack() {
  local image=$1 group=$2 name root volume
  shift 2
  [ -f "$archives/$image.tar" ] || fail "$archives/$image.tar is missing: run make images and scripts/server-images.sh first"
  name=$(in_storage pull --quiet --signature-policy "$scratch/policy.json" "docker-archive:$archives/$image.tar")
  of_image "$name" 'range .OCIv1.Config.Entrypoint}}{{println .}}{{end' >"$scratch/$image.entrypoint"
  of_image "$name" 'range .OCIv1.Config.Env}}{{println .}}{{end' >"$scratch/$image.env"
  of_image "$name" '.Docker.Config.StopSignal' >"$scratch/$image.stop"
  root=$(in_storage mount "$(in_storage from --pull=never "$name")")
  ln -s "$root" "$scratch/$image"
  mount --bind "$root" "$root"
  mkdir -p "$root"/{dev,proc,tmp}
  mount -t tmpfs -o mode=755 tmpfs "$root/dev"
  mknod -m 666 "$root/dev/null" c 1 3
  mknod -m 666 "$root/dev/zero" c 1 5
  mknod -m 666 "$root/dev/urandom" c 1 9
  mkdir -m 1777 "$root/dev/shm"
  mount -t proc proc "$root/proc"
  mount -t tmpfs tmpfs "$root/tmp"
  for volume in "$@"; do
    mkdir -p "$root$volume"
    mount -t tmpfs -o "mode=2775,gid=$group" tmpfs "$root$volume"
  done
  mount -o remount,bind,ro "$root"
}

# in_image IMAGE UID PROGRAM [ARG...]: with the variables in `variables` beside the image's own.
in_image() {
  local image=$1 user=$2
  shift 2
  mapfile -t env <"$scratch/$image.env"
  exec env -i "${env[@]}" ${variables[@]+"${variables[@]}"} /usr/bin/setpriv --no-new-privs \
    /usr/bin/unshare --root="$(readlink "$scratch/$image")" --wd=/ --setgid="$user" --setuid="$user" "$@"
}

# start NAME IMAGE UID [ARG...]: the image's entry point in the background, its log in $scratch/NAME.log.
declare -A pids
start() {
  local name=$1 image=$2 user=$3
  shift 3
  mapfile -t entrypoint <"$scratch/$image.entrypoint"
  (in_image "$image" "$user" "${entrypoint[@]}" "$@") >"$scratch/$name.log" 2>&1 &
  pids[$name]=$!
  current=$name
}

# until_ready COMMAND...: within a minute, or what was started last dies.
until_ready() {
  local deadline=$((SECONDS + 60))
  until "$@" >/dev/null 2>&1; do
    kill -0 "${pids[$current]}" 2>/dev/null || fail "$current ended before it was ready"
    [ $SECONDS -lt $deadline ] || fail "$current was not ready after a minute: $*"
    sleep 0.1
  done
  grep -Eq '^CapEff:\s+0+$' "/proc/${pids[$current]}/status" || fail "$current has capabilities"
}

# ends NAME [SIGNAL]: it ends by itself, or by the signal, and with success.
ends() {
  current=$1
  [ -z "${2:-}" ] || kill -s "$2" "${pids[$1]}"
  wait "${pids[$1]}" || fail "$1 ended with $?"
  current=''
}

unpack redis 999 /data /etc/redis
printf '%s\n' "requirepass $password" 'save ""' >"$scratch/redis/etc/redis/redis.conf"
variables=("REDISCLI_AUTH=$password")
start redis redis 999 redis-server /etc/redis/redis.conf
redis_answers() { (in_image redis 999 redis-cli ping) | grep -q PONG; }
until_ready redis_answers

unpack nats 1000 /data /etc/nats
cat >"$scratch/nats/etc/nats/nats.conf" <<CONF
listen: 0.0.0.0:4222
http: 8222
max_payload: 4MB
jetstream { store_dir: /data, sync_interval: always }
authorization { user: birb, password: $password }
CONF
variables=()
start nats nats 1000 -c /etc/nats/nats.conf
until_ready curl -fsS 'http://127.0.0.1:8222/healthz?js-enabled-only=true'

unpack postgres 999 /var/lib/postgresql/data /var/run/postgresql /run/secrets
echo "$password" >"$scratch/postgres/run/secrets/password"
variables=(POSTGRES_USER=birb POSTGRES_DB=birb_nest POSTGRES_PASSWORD_FILE=/run/secrets/password
  PGDATA=/var/lib/postgresql/data/pgdata PGPASSWORD="$password")
start postgres postgres 999 postgres -c max_connections=50
sql() { (in_image postgres 999 psql --no-psqlrc -qtA -v ON_ERROR_STOP=1 -h 127.0.0.1 -U birb -d birb_nest -c "$1"); }
until_ready sql 'select'
# As a probe starts it: the first of that name on PATH, whatever it is.
# shellcheck disable=SC2016  # that shell expands it
(in_image postgres 999 /bin/sh -c 'exec "$(command -v pg_isready)" -h 127.0.0.1 -U birb -d birb_nest') >/dev/null ||
  fail "pg_isready in the image does not run"
stop_signal=$(cat "$scratch/postgres.stop")
# A client that stays must not hold up its end; a second start finds the cluster.
(in_image postgres 999 psql --no-psqlrc -h 127.0.0.1 -U birb -d birb_nest -c 'select pg_sleep(600)') >/dev/null 2>&1 &
until_ready sql "do 'begin assert exists (select from pg_stat_activity where wait_event = ''PgSleep''); end'"
ends postgres "$stop_signal"
start postgres postgres 999 postgres -c max_connections=50
until_ready sql 'select'
! grep -q 'initdb' "$scratch/postgres.log" || fail "postgres was initialised twice"

unpack birb-nest 65532
variables=(POSTGRES_HOST=127.0.0.1 REDIS_HOST=127.0.0.1 NATS_URL=nats://127.0.0.1:4222
  REDIS_PASSWORD="$password" NATS_USER=birb NATS_PASSWORD="$password" POSTGRES_PASSWORD="$password")
start setup birb-nest 65532 setup
ends setup
start worker birb-nest 65532 worker
until_ready curl -fsS http://127.0.0.1:9091/readyz
start api birb-nest 65532 api
until_ready curl -fsS http://127.0.0.1:8080/readyz
curl -fsS http://127.0.0.1:8080/v1/cache/greeting -H 'Content-Type: application/json' -d '{"value": "hello"}' >/dev/null ||
  fail "a write failed"
value=$(curl -fsS http://127.0.0.1:8080/v1/cache/greeting) || fail "a read failed"
[[ $value == *'"hello"'* ]] || fail "a read gave $value"
# The health check of docker-compose.yml, which needs bash in the image.
# shellcheck disable=SC2016  # that bash expands it
(in_image birb-nest 65532 bash -c 'exec 3<>/dev/tcp/127.0.0.1/8080 && printf "GET /readyz HTTP/1.0\r\n\r\n" >&3 && read -r _ code _ <&3 && [ "$code" = 200 ]') ||
  fail "the image has no bash that can ask /readyz"
ends api TERM
ends worker TERM

variables=()
unpack birb-nest-operator 65532
start operator birb-nest-operator 65532 --help
ends operator
grep -q LEASE_NAME "$scratch/operator.log" || fail "birb-nest-operator --help does not name its variables"
for image in birb-nest birb-nest-operator; do
  [ -s "$scratch/$image/etc/ssl/certs/ca-certificates.crt" ] || fail "$image has no certificates of public authorities"
done

ends redis TERM
# nats-server ends with 1 after SIGTERM.
echo "check-images: ok (redis, nats, postgres, birb-nest setup, worker, api, birb-nest-operator)"
