#!/usr/bin/env bash
# Measures a release build on this machine, over loopback, with fresh data and free ports: GET hits, POST (NATS syncs
# every write, the worker runs), the same while Redis is warmed, and redis-benchmark beside them. Exits 1 below the floor.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${BENCH_MIN_READS:=10000}" "${BENCH_MIN_WRITES:=5000}" "${BENCH_MAX_READ_P99_MS:=10}" "${BENCH_MAX_WRITE_P99_MS:=50}" "${BENCH_MIN_WARMING:=0.8}"
: "${BENCH_KEYS:=100000}" "${BENCH_CONNECTIONS:=64}" "${BENCH_SECONDS:=15}" "${BENCH_WARM_UP_SECONDS:=5}"
bin=${CARGO_TARGET_DIR:-target}/release
lua=$PWD/scripts/bench/load.lua
export PATH=$PWD/.dev/bin:$PATH:$HOME/.cargo/bin:$HOME/go/bin

toolchain=${RUSTUP_TOOLCHAIN:-$(scripts/rust-toolchain.sh)}
[ -z "$toolchain" ] || export RUSTUP_TOOLCHAIN=$toolchain
scripts/init.sh --bench
cargo build --release --workspace --bins
bin=$(cd "$bin" && pwd)

taken=''
free_port() { # exports the variable named $1
  local port
  while port=$((20000 + RANDOM % 10000)); do
    case " $taken " in *" $port "*) continue ;; esac
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  taken+=" $port"
  export "$1=$port"
}
for name in API_PORT POSTGRES_PORT REDIS_PORT NATS_PORT WORKER_ADMIN_PORT; do free_port "$name"; done

work=$(mktemp -d)
chmod 711 "$work" # PostgreSQL runs as its own user when we are root.
stack=''
# shellcheck disable=SC2317  # the trap calls it
stop() {
  if [ -n "$stack" ] && kill -TERM "$stack" 2>/dev/null; then wait "$stack" || true; fi
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

echo "bench: starting the stack"
(cd "$work" && BIRB_NEST_BIN=$bin/birb-nest BIRB_NEST_DEV_DIR=$work/.dev exec "$bin/birb-nest-stack" dev) >"$work/stack.log" 2>&1 </dev/null &
stack=$!
base=http://127.0.0.1:$API_PORT
for _ in $(seq 120); do
  kill -0 "$stack" 2>/dev/null || break
  [ "$(curl -s -o /dev/null -w '%{http_code}' --max-time 2 "$base/readyz")" = 200 ] && ready=1 && break
  sleep 0.5
done
if [ -z "${ready:-}" ]; then
  echo "bench: the stack did not become ready; its last lines:" >&2
  tail -n 40 "$work/stack.log" >&2
  exit 1
fi

load() { wrk -t1 -c"$BENCH_CONNECTIONS" -d"$1s" --timeout 5s --latency -s "$lua" "$base" -- "$2" "$BENCH_KEYS"; }
# Sets rate, p50, p99, errors.
measure() {
  load "$BENCH_WARM_UP_SECONDS" "$1" >/dev/null
  load "$BENCH_SECONDS" "$1" >"$work/$1.txt"
  read -r _ rate p50 p99 errors < <(grep '^RESULT ' "$work/$1.txt")
}
row() { printf '%-22s %10s/s %9s ms %9s ms %8s\n' "$@"; }

echo "bench: writing $BENCH_KEYS keys"
filled=$(load 600 fill | grep '^FILLED ') || { echo "bench: the keys could not be written in 10 minutes" >&2 && exit 1; }
[ "$filled" = "FILLED 0" ] || { echo "bench: ${filled#FILLED } of these writes failed" >&2 && exit 1; }
sleep 3 # the worker catches up

echo "bench: GET"
measure get
read_rate=$rate read_p99=$p99 read_errors=$errors
get_row=$(row "GET hit" "$rate" "$p50" "$p99" "$errors")
sampled=$(curl -s -o /dev/null -D - "$base/v1/cache/bench-[1-$BENCH_KEYS:997]" | tr -d '\r' | tr '[:upper:]' '[:lower:]' >"$work/sample.txt"
  grep -c '^birb-source:' "$work/sample.txt") || true
hits=$(grep -c '^birb-source: redis' "$work/sample.txt") || true

echo "bench: redis-benchmark"
redis() { redis-benchmark -h 127.0.0.1 -p "$REDIS_PORT" --dbnum 1 -c "$BENCH_CONNECTIONS" -d 100 --csv "$@"; } # not birb-nest's database
redis -n 1000 -t set >/dev/null
IFS=, read -r _ rate _ _ p50 _ p99 _ < <(redis -n 200000 -t get | tr -d '"' | grep '^GET')
redis_row=$(row "redis-benchmark GET" "${rate%.*}" "$p50" "$p99" -)

echo "bench: POST"
measure post
write_rate=$rate write_p99=$p99 write_errors=$errors
post_row=$(row "POST (synced)" "$rate" "$p50" "$p99" "$errors")

echo "bench: POST while Redis is warmed"
warmed() { curl -s "http://127.0.0.1:$WORKER_ADMIN_PORT/metrics" | awk '/^birbnest_worker_keys_warmed_total/ { n += $2 } END { print n + 0 }'; }
warmed_before=$(warmed)
redis-cli -p "$REDIS_PORT" flushall >/dev/null
load "$BENCH_SECONDS" post >"$work/warming.txt"
read -r _ rate p50 p99 errors < <(grep '^RESULT ' "$work/warming.txt")
warming_rate=$rate warming_errors=$errors
warming_row=$(row "POST, Redis emptied" "$rate" "$p50" "$p99" "$errors")
n_warmed=$(($(warmed) - warmed_before))

printf '\n%-22s %12s %12s %12s %8s\n' '' rate p50 p99 errors
printf '%s\n' "$get_row" "$post_row" "$warming_row" "$redis_row"
echo "keys that the worker put back into the emptied Redis during these ${BENCH_SECONDS} s, beside the writes: $n_warmed"
echo "reads served from Redis (sample): $hits of $sampled"
echo "$BENCH_KEYS keys, 100-byte values, $BENCH_CONNECTIONS connections, ${BENCH_SECONDS} s; $(getconf _NPROCESSORS_ONLN) cores, $(uname -sr), $(sed -n '/^model name/{s/.*: //p;q;}' /proc/cpuinfo 2>/dev/null)"

failed=0
floor() { awk "BEGIN { exit !($2) }" || { echo "below the floor: $1 ($2)" >&2; failed=1; }; }
floor "reads per second" "$read_rate >= $BENCH_MIN_READS"
floor "p99 of a read, ms" "$read_p99 < $BENCH_MAX_READ_P99_MS"
floor "failed reads" "$read_errors == 0"
floor "sampled reads that were hits" "$hits == $sampled && $sampled > 0"
floor "writes per second" "$write_rate >= $BENCH_MIN_WRITES"
floor "p99 of a write, ms" "$write_p99 < $BENCH_MAX_WRITE_P99_MS"
floor "failed writes" "$write_errors == 0"
# Both rows are of the same minute of the same machine.
floor "writes per second while Redis is warmed, of those without" "$warming_rate >= $BENCH_MIN_WARMING * $write_rate"
floor "keys put back into Redis beside them" "$n_warmed > 0"
floor "failed writes while Redis is warmed" "$warming_errors == 0"
[ "$failed" = 0 ] && echo "bench: above the floor"
exit "$failed"
