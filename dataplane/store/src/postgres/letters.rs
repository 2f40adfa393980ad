//! Dead letters as people look after them: listed, read, tried again. Workers have theirs in `dead_keys`.

use birb_nest_core::{Key, Timestamp, Version};
use sqlx::{PgPool, Row as _, postgres::PgRow};

use super::{borrowed::Borrowed, database_error};

/// One that a newer write has made obsolete goes with the row of that write.
const LIST: &str = "\
select key, shard, version, dlq_seq, sqlstate, reason, attempts,
       (extract(epoch from first_failed_at) * 1000000)::bigint as first_failed_at,
       (extract(epoch from last_failed_at) * 1000000)::bigint as last_failed_at,
       (extract(epoch from next_try_at) * 1000000)::bigint as next_try_at
from dead_keys
where key > $1 and (not $2 or next_try_at is null)
order by key limit $3";

const FIND: &str = "\
select key, shard, version, dlq_seq, sqlstate, reason, attempts,
       (extract(epoch from first_failed_at) * 1000000)::bigint as first_failed_at,
       (extract(epoch from last_failed_at) * 1000000)::bigint as last_failed_at,
       (extract(epoch from next_try_at) * 1000000)::bigint as next_try_at
from dead_keys where key = $1 and version = $2";

const REPLAY: &str =
    "update dead_keys set next_try_at = clock_timestamp() where key = $1 and version = $2";

const REPLAY_PARKED: &str = "\
update dead_keys set next_try_at = clock_timestamp()
where key in (select key from dead_keys where next_try_at is null order by key limit $1)";

/// A write that PostgreSQL refused for good, without its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Letter {
    /// Its key.
    pub key: Key,
    /// The key's shard.
    pub shard: u16,
    /// Its version.
    pub version: Version,
    /// Its sequence in the dead-letter stream.
    pub sequence: u64,
    /// The code of the SQL standard with which it was refused the last time; empty when it was not PostgreSQL that did.
    pub sqlstate: String,
    /// Why, in PostgreSQL's words.
    pub reason: String,
    /// How often storing it was tried.
    pub n_attempts: u32,
    /// When that failed first.
    pub first_failed_at: Timestamp,
    /// When that failed last.
    pub last_failed_at: Timestamp,
    /// When it is tried again; `None` when it is parked.
    pub next_try_at: Option<Timestamp>,
}

pub(super) async fn list(
    pool: &PgPool,
    after: Option<&Key>,
    parked_only: bool,
    limit: u32,
) -> Result<Vec<Letter>, String> {
    let mut connection = Borrowed::from(pool).await?;
    let rows = sqlx::query(LIST)
        .bind(after.map_or("", Key::as_str))
        .bind(parked_only)
        .bind(i64::from(limit))
        .fetch_all(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    rows.iter().map(letter).collect()
}

pub(super) async fn find(
    pool: &PgPool,
    key: &Key,
    version: Version,
) -> Result<Option<Letter>, String> {
    let mut connection = Borrowed::from(pool).await?;
    let row = sqlx::query(FIND)
        .bind(key.as_str())
        .bind(version.as_i64())
        .fetch_optional(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    row.as_ref().map(letter).transpose()
}

pub(super) async fn replay(pool: &PgPool, key: &Key, version: Version) -> Result<bool, String> {
    let mut connection = Borrowed::from(pool).await?;
    let done = sqlx::query(REPLAY)
        .bind(key.as_str())
        .bind(version.as_i64())
        .execute(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    Ok(done.rows_affected() > 0)
}

pub(super) async fn replay_parked(pool: &PgPool, limit: u32) -> Result<u64, String> {
    let mut connection = Borrowed::from(pool).await?;
    let done = sqlx::query(REPLAY_PARKED)
        .bind(i64::from(limit))
        .execute(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    Ok(done.rows_affected())
}

fn letter(row: &PgRow) -> Result<Letter, String> {
    read(row)
        .map_err(|error| database_error(&error))?
        .ok_or_else(|| "a dead key is out of range".to_owned())
}

fn read(row: &PgRow) -> Result<Option<Letter>, sqlx::Error> {
    let number = |value: i64| u64::try_from(value).ok();
    let (Ok(key), Some(version), Some(sequence)) = (
        Key::parse(row.try_get("key")?),
        number(row.try_get("version")?).and_then(Version::new),
        number(row.try_get("dlq_seq")?),
    ) else {
        return Ok(None);
    };
    let time = |name| row.try_get::<i64, _>(name).map(Timestamp::from_micros);
    Ok(Some(Letter {
        key,
        shard: row.try_get::<i16, _>("shard")?.unsigned_abs(),
        version,
        sequence,
        sqlstate: row.try_get("sqlstate")?,
        reason: row.try_get("reason")?,
        n_attempts: row.try_get::<i32, _>("attempts")?.unsigned_abs(),
        first_failed_at: time("first_failed_at")?,
        last_failed_at: time("last_failed_at")?,
        next_try_at: row
            .try_get::<Option<i64>, _>("next_try_at")?
            .map(Timestamp::from_micros),
    }))
}
