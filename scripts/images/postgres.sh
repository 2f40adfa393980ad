#!/bin/sh
# The entry point of the stand-in for the public PostgreSQL image. As there: makes a cluster and a database in an empty
# PGDATA, from POSTGRES_PASSWORD, POSTGRES_USER, POSTGRES_DB (or *_FILE) and POSTGRES_INITDB_ARGS; then runs the command.
# Not as there: it does not start as root, and reads no /docker-entrypoint-initdb.d.
set -eu

case ${1:-} in '' | -*) set -- postgres "$@" ;; esac
[ "$1" = postgres ] || exec "$@"
if [ "$(id -u)" = 0 ]; then
  echo "PostgreSQL does not run as root: run this image as user 999" >&2
  exit 1
fi

# The value of the variable $1, of the file that $1_FILE names, or $2.
setting() {
  eval "value=\${$1:-} file=\${$1_FILE:-}"
  if [ -n "$value" ] && [ -n "$file" ]; then
    echo "$1 and $1_FILE are both set: set one" >&2
    exit 1
  fi
  # shellcheck disable=SC2154  # eval sets them
  [ -z "$file" ] || value=$(cat "$file")
  [ -n "$value" ] || value=$2
}

if [ ! -s "$PGDATA/PG_VERSION" ]; then
  setting POSTGRES_USER postgres
  user=$value
  setting POSTGRES_DB "$user"
  database=$value
  setting POSTGRES_PASSWORD ''
  if [ -z "$value" ]; then
    echo "$PGDATA is empty and there is no password for the user $user: set POSTGRES_PASSWORD or POSTGRES_PASSWORD_FILE" >&2
    exit 1
  fi
  # initdb wants a file; one in memory is gone with the container.
  umask 077
  mkdir -p "$PGDATA"
  printf '%s\n' "$value" >/tmp/password
  # shellcheck disable=SC2086  # several arguments
  initdb --pgdata="$PGDATA" --username="$user" --pwfile=/tmp/password ${POSTGRES_INITDB_ARGS:-}
  rm /tmp/password
  printf '\nhost all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
  printf "\nlisten_addresses = '*'\n" >>"$PGDATA/postgresql.conf"
  [ "$database" = postgres ] ||
    printf 'create database "%s"\n' "$(printf %s "$database" | sed 's/"/""/g')" | postgres --single -D "$PGDATA" postgres >/dev/null
fi
unset value POSTGRES_PASSWORD
exec "$@"
