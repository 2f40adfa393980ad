//! The schema: making it, and judging the one that is there.

use std::{sync::Arc, time::Instant};

use birb_nest_core::{Base, Shard, ShardCount, Timestamp, Version};
use sqlx::{
    ConnectOptions, Connection, PgConnection, PgPool, Row as _,
    migrate::{MigrateError, Migrator},
};

use super::{borrowed::Borrowed, connect, database_error, reshard::as_i16};
use crate::{
    clock::{self, Clock},
    config::PostgresConfig,
    refusal::{OpenError, chain},
};

static MIGRATIONS: Migrator = sqlx::migrate!("../../migrations");

/// Lock that makes several `setup` take turns: "birs" in ASCII, "etup".
const SETUP_LOCK: (i32, i32) = (0x6269_7273, 0x6574_7570);

const CHECK: &str = "\
select pg_is_in_recovery() as standby, current_setting('server_version_num')::int as server,
       (extract(epoch from clock_timestamp()) * 1000000)::bigint as now,
       to_regclass('_sqlx_migrations') is not null as has_schema";

/// What is said of a server that is no primary.
const STANDBY: &str = "it is a standby; POSTGRES_HOST must name the primary";

/// Why a server cannot be used.
pub(super) enum Failure {
    /// It did not answer, or not what it was asked.
    NoAnswer(OpenError),
    /// It answered, and is not what is needed. It may stay so for long.
    Wrong(OpenError),
}

impl From<Failure> for OpenError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NoAnswer(error) | Failure::Wrong(error) => error,
        }
    }
}

/// The newest migration this binary knows.
fn newest_known() -> i64 {
    MIGRATIONS
        .iter()
        .map(|migration| migration.version)
        .max()
        .unwrap_or(0)
}

/// Fails on a connection to a standby.
pub(super) async fn refuse_standby(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let standby: bool = sqlx::query_scalar("select pg_is_in_recovery()")
        .fetch_one(connection)
        .await?;
    if standby {
        return Err(sqlx::Error::Configuration(STANDBY.into()));
    }
    Ok(())
}

/// Whether the server can be used by this binary; reads its clock on the way. Returns how many shards the nest has, once
/// that is recorded. A schema that is newer than the binary is refused at start alone: while a release rolls out, the old
/// processes run on it.
pub(super) async fn check(
    pool: &PgPool,
    server: &str,
    clock: &Clock,
    at_start: bool,
) -> Result<Option<i16>, Failure> {
    let mut connection = Borrowed::from(pool)
        .await
        .map_err(|why| Failure::NoAnswer(OpenError::unreachable(server, why)))?;
    let found = examine(&mut connection, server, clock, at_start).await;
    match found {
        Ok(_) => connection.done(),
        // The next one under this name may be the right one.
        Err(Failure::Wrong(_)) => connection.close(),
        Err(Failure::NoAnswer(_)) => {}
    }
    found
}

async fn examine(
    connection: &mut PgConnection,
    server: &str,
    clock: &Clock,
    at_start: bool,
) -> Result<Option<i16>, Failure> {
    let failed = |error: sqlx::Error| {
        Failure::NoAnswer(OpenError::unreachable(server, database_error(&error)))
    };
    let asked = Instant::now();
    let row = sqlx::query(CHECK)
        .fetch_one(&mut *connection)
        .await
        .map_err(failed)?;
    judge_server(
        server,
        row.try_get("server").map_err(failed)?,
        row.try_get("standby").map_err(failed)?,
    )
    .map_err(Failure::Wrong)?;
    let now: i64 = row.try_get("now").map_err(failed)?;
    clock.learn(clock::Source::Postgres, Timestamp::from_micros(now), asked);

    let found: i64 = if row.try_get("has_schema").map_err(failed)? {
        sqlx::query_scalar("select coalesce(max(version), 0) from _sqlx_migrations where success")
            .fetch_one(&mut *connection)
            .await
            .map_err(failed)?
    } else {
        0
    };
    if at_start || found < newest_known() {
        judge_schema(server, found).map_err(Failure::Wrong)?;
    }
    sqlx::query_scalar("select shards from nest_state")
        .fetch_optional(connection)
        .await
        .map_err(failed)
}

/// Whether the nest has as many shards as this process was told.
pub(super) fn judge_shards(server: &str, found: i16, told: ShardCount) -> Result<(), OpenError> {
    if found == as_i16(told) {
        return Ok(());
    }
    Err(OpenError::refused(
        server,
        format!(
            "it has a nest of {found} shards, but NATS_SHARDS is {told}; `birb-nest setup --reshard` changes the number of a nest"
        ),
    ))
}

fn judge_server(server: &str, version: i32, standby: bool) -> Result<(), OpenError> {
    if version < 150_000 {
        return Err(OpenError::refused(
            server,
            format!(
                "it runs PostgreSQL {}; 15 or newer is needed",
                version / 10_000
            ),
        ));
    }
    if standby {
        return Err(OpenError::unreachable(server, STANDBY));
    }
    Ok(())
}

fn judge_schema(server: &str, found: i64) -> Result<(), OpenError> {
    let known = newest_known();
    if found > known {
        return Err(OpenError::refused(
            server,
            format!(
                "its schema is at version {found}, newer than this binary, which knows {known}: run a newer birb-nest"
            ),
        ));
    }
    if found < known {
        return Err(OpenError::unreachable(
            server,
            format!(
                "its schema is at version {found}, this binary needs {known}: run `birb-nest setup`"
            ),
        ));
    }
    Ok(())
}

/// `setup`'s connection, which holds the lock under which only one of them works.
pub(crate) struct SetupSession {
    pub(super) connection: PgConnection,
    pub(super) server: String,
}

impl SetupSession {
    /// Connects and waits for its turn.
    pub async fn open(config: &PostgresConfig, clock: &Arc<Clock>) -> Result<Self, OpenError> {
        let server = connect::server_name(config);
        let unreachable =
            |error: sqlx::Error| OpenError::unreachable(&server, database_error(&error));
        let options = connect::options(config, "birb-nest setup")?
            .options([("lock_timeout", "0"), ("statement_timeout", "0")]);
        let mut connection = options.connect().await.map_err(unreachable)?;
        let asked = Instant::now();
        let row = sqlx::query(CHECK)
            .fetch_one(&mut connection)
            .await
            .map_err(unreachable)?;
        let now: i64 = row.try_get("now").map_err(unreachable)?;
        clock.learn(clock::Source::Postgres, Timestamp::from_micros(now), asked);
        judge_server(
            &server,
            row.try_get("server").map_err(unreachable)?,
            row.try_get("standby").map_err(unreachable)?,
        )?;
        sqlx::query("select pg_advisory_lock($1, $2)")
            .bind(SETUP_LOCK.0)
            .bind(SETUP_LOCK.1)
            .execute(&mut connection)
            .await
            .map_err(unreachable)?;
        Ok(Self { connection, server })
    }

    /// Brings the schema to this binary's version.
    pub async fn migrate(&mut self) -> Result<(), OpenError> {
        match MIGRATIONS.run(&mut self.connection).await {
            Ok(()) => Ok(()),
            Err(MigrateError::VersionMissing(found)) => {
                judge_schema(&self.server, found).and(Err(OpenError::refused(
                    &self.server,
                    format!("its schema has migration {found}, which this binary does not know"),
                )))
            }
            Err(MigrateError::VersionMismatch(version)) => Err(OpenError::refused(
                &self.server,
                format!("migration {version} was applied from another text than this binary has"),
            )),
            Err(error) => Err(OpenError::unreachable(
                &self.server,
                format!("migration failed: {}", chain(&error)),
            )),
        }
    }

    /// Records that this nest has `shards` shards, unless it was set up for another number.
    pub async fn claim_shards(&mut self, shards: ShardCount) -> Result<(), OpenError> {
        let found: i16 = sqlx::query_scalar(
            "with new as (insert into nest_state (shards) values ($1) on conflict do nothing returning shards)
             select shards from new union all select shards from nest_state limit 1",
        )
        .bind(as_i16(shards))
        .fetch_one(&mut self.connection)
        .await
        .map_err(|error| self.unreachable(&error))?;
        judge_shards(&self.server, found, shards)
    }

    /// The base recorded for `shard` and how far it was applied.
    pub async fn shard_state(
        &mut self,
        shard: Shard,
    ) -> Result<Option<(Base, Version)>, OpenError> {
        let row: Option<(i64, i64)> =
            sqlx::query_as("select base, applied_to from shard_state where shard = $1")
                .bind(shard.as_i16())
                .fetch_optional(&mut self.connection)
                .await
                .map_err(|error| self.unreachable(&error))?;
        Ok(row.and_then(|(base, applied_to)| {
            Some((
                Base::new(u64::try_from(base).ok()?)?,
                Version::new(u64::try_from(applied_to).ok()?)?,
            ))
        }))
    }

    /// A number greater than every version this database knows.
    pub async fn above_all_versions(&mut self) -> Result<u64, OpenError> {
        // Only asked when a stream begins its life; the scan is over an empty table then, or after a disaster.
        let highest: i64 = sqlx::query_scalar(
            "select greatest((select coalesce(max(version), 0) from cache_entries),
                             (select coalesce(max(applied_to), 0) from shard_state))",
        )
        .fetch_one(&mut self.connection)
        .await
        .map_err(|error| self.unreachable(&error))?;
        Ok(u64::try_from(highest).unwrap_or(0) + 1)
    }

    /// Records that `shard`'s life under `base` begins; nothing of it is applied yet. With `owes_redis`, also that Redis
    /// may hold what is lost: should `setup` not come to emptying it, whoever reaches it next does.
    pub async fn begin_life(
        &mut self,
        shard: Shard,
        base: Base,
        owes_redis: bool,
    ) -> Result<(), OpenError> {
        let base = i64::try_from(base.get()).unwrap_or(i64::MAX);
        sqlx::query(
            "insert into shard_state as s (shard, base, applied_to, told_to, redis_debt) values ($1, $2, $2, $2, $3)
             on conflict (shard) do update set base = $2, applied_to = $2, told_to = $2, updated_at = clock_timestamp(),
                 redis_debt = s.redis_debt or $3",
        )
        .bind(shard.as_i16())
        .bind(base)
        .bind(owes_redis)
        .execute(&mut self.connection)
        .await
        .map_err(|error| self.unreachable(&error))?;
        Ok(())
    }

    /// A refusal of this server.
    pub fn refused(&self, why: &str) -> OpenError {
        OpenError::refused(&self.server, why)
    }

    /// Lets the next one work.
    pub async fn close(self) {
        let _ = self.connection.close().await;
    }

    pub(super) fn unreachable(&self, error: &sqlx::Error) -> OpenError {
        OpenError::unreachable(&self.server, database_error(error))
    }
}
