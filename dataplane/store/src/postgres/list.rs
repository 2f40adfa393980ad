//! Keys that begin alike, by ranges of the primary key.

use birb_nest_core::{Key, Range, Timestamp, Version};
use sqlx::{PgPool, Row as _, postgres::PgRow};

use super::{borrowed::Borrowed, database_error};

/// The newer of row and dead key for each key. The primary keys compare byte by byte, so what begins alike lies together;
/// the conditions are such that a plan made for any parameters is a scan of that range alone.
const LIST: &str = "\
select distinct on (key) key, version, deleted, size, expires_at, dead
from (
    (select key, version, deleted, octet_length(value) as size,
            (extract(epoch from expires_at) * 1000000)::bigint as expires_at, false as dead
     from cache_entries
     where key >= $1 and key > $2 and key < $3
     order by key limit $4)
    union all
    (select key, version, false, 0, null, true
     from dead_keys
     where key >= $1 and key > $2 and key < $3
     order by key limit $4)
) as known
order by key, version desc, dead limit $4";

const COUNT: &str = "\
select count(*) from (
    select from cache_entries
    where key >= $1 and key > $2 and key < $3
      and not deleted and (expires_at is null or expires_at > clock_timestamp())
    limit $4
) as counted";

const NEWEST: &str = "\
select key, version,
       octet_length(value) * case content_type when 'application/json' then 3 else 4 end / 3 + octet_length(metadata) as size
from cache_entries
where not deleted and (expires_at is null or expires_at > clock_timestamp())
  and ($1 is null or (version, key) < ($1, $2))
order by version desc, key desc limit $3";

/// A key that has a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Newest {
    /// The key.
    pub key: Key,
    /// Its version.
    pub version: Version,
    /// Bytes of its value and metadata, as Redis has them: what is not JSON takes a third more.
    pub size: u64,
}

/// A key that PostgreSQL knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The key.
    pub key: Key,
    /// Its version.
    pub version: Version,
    /// Whether that is a tombstone.
    pub deleted: bool,
    /// Bytes of its value.
    pub size: u64,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
    /// Whether its newest write is a dead letter: of that, only the version is known here.
    pub dead: bool,
}

pub(super) async fn page(pool: &PgPool, range: &Range, limit: u32) -> Result<Vec<Listed>, String> {
    let mut connection = Borrowed::from(pool).await?;
    let rows = sqlx::query(LIST)
        .bind(&range.prefix)
        .bind(range.after.as_ref().map_or("", Key::as_str))
        .bind(range.end())
        .bind(i64::from(limit))
        .fetch_all(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    rows.iter().map(row).collect()
}

pub(super) async fn count(pool: &PgPool, range: &Range, most: u32) -> Result<u64, String> {
    let mut connection = Borrowed::from(pool).await?;
    let n: i64 = sqlx::query_scalar(COUNT)
        .bind(&range.prefix)
        .bind(range.after.as_ref().map_or("", Key::as_str))
        .bind(range.end())
        .bind(i64::from(most))
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    Ok(n.unsigned_abs())
}

pub(super) async fn newest(
    pool: &PgPool,
    below: Option<&(Version, Key)>,
    limit: u32,
) -> Result<Vec<Newest>, String> {
    let mut connection = Borrowed::from(pool).await?;
    let rows = sqlx::query(NEWEST)
        .bind(below.map(|(version, _)| version.get().cast_signed()))
        .bind(below.map_or("", |(_, key)| key.as_str()))
        .bind(i64::from(limit))
        .fetch_all(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    let read = |error: sqlx::Error| database_error(&error);
    rows.iter()
        .map(|row| {
            let size: i32 = row.try_get("size").map_err(read)?;
            Ok(Newest {
                key: key(row)?,
                version: version(row)?,
                size: u64::from(size.unsigned_abs()),
            })
        })
        .collect()
}

fn key(row: &PgRow) -> Result<Key, String> {
    let key = row.try_get("key").map_err(|error| database_error(&error))?;
    Key::parse(key).map_err(|error| error.to_string())
}

fn version(row: &PgRow) -> Result<Version, String> {
    let version: i64 = row
        .try_get("version")
        .map_err(|error| database_error(&error))?;
    let version = u64::try_from(version).ok().and_then(Version::new);
    version.ok_or_else(|| "a version is out of range".to_owned())
}

fn row(row: &PgRow) -> Result<Listed, String> {
    let read = |error: sqlx::Error| database_error(&error);
    let size: i32 = row.try_get("size").map_err(read)?;
    let expires_at: Option<i64> = row.try_get("expires_at").map_err(read)?;
    Ok(Listed {
        key: key(row)?,
        version: version(row)?,
        deleted: row.try_get("deleted").map_err(read)?,
        size: u64::from(size.unsigned_abs()),
        expires_at: expires_at.map(Timestamp::from_micros),
        dead: row.try_get("dead").map_err(read)?,
    })
}
