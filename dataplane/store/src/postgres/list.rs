//! Keys that begin alike, by ranges of the primary key.

use birb_nest_core::{Key, Place, Range, Timestamp, Version};
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

/// A page of at most `limit` rows, and where the next one begins if there may be one. What is no key, since somebody else wrote
/// it, is left out.
pub(super) async fn page(
    pool: &PgPool,
    range: &Range,
    limit: u32,
) -> Result<(Vec<Listed>, Option<Place>), String> {
    let mut connection = Borrowed::from(pool).await?;
    let rows = sqlx::query(LIST)
        .bind(&range.prefix)
        .bind(range.after.as_ref().map_or("", Place::as_str))
        .bind(range.end())
        .bind(i64::from(limit))
        .fetch_all(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    let last = rows.last().map(name).transpose()?;
    let next = last.filter(|_| rows.len() >= limit as usize);
    let mut listed = Vec::with_capacity(rows.len());
    for found in &rows {
        listed.extend(row(found)?);
    }
    Ok((listed, next.as_deref().map(Place::behind)))
}

pub(super) async fn count(pool: &PgPool, range: &Range, most: u32) -> Result<u64, String> {
    let mut connection = Borrowed::from(pool).await?;
    let n: i64 = sqlx::query_scalar(COUNT)
        .bind(&range.prefix)
        .bind(range.after.as_ref().map_or("", Place::as_str))
        .bind(range.end())
        .bind(i64::from(most))
        .fetch_one(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    Ok(n.unsigned_abs())
}

fn name(row: &PgRow) -> Result<String, String> {
    row.try_get("key").map_err(|error| database_error(&error))
}

/// `None` if it is no key.
pub(super) fn key(row: &PgRow) -> Result<Option<Key>, String> {
    let name = name(row)?;
    let key = Key::parse(&name);
    if let Err(error) = &key {
        tracing::debug!(name, %error, "a row of something that is no key");
    }
    Ok(key.ok())
}

pub(super) fn version(row: &PgRow) -> Result<Version, String> {
    let version: i64 = row
        .try_get("version")
        .map_err(|error| database_error(&error))?;
    let version = u64::try_from(version).ok().and_then(Version::new);
    version.ok_or_else(|| "a version is out of range".to_owned())
}

fn row(row: &PgRow) -> Result<Option<Listed>, String> {
    let Some(key) = key(row)? else {
        return Ok(None);
    };
    let read = |error: sqlx::Error| database_error(&error);
    let size: i32 = row.try_get("size").map_err(read)?;
    let expires_at: Option<i64> = row.try_get("expires_at").map_err(read)?;
    Ok(Some(Listed {
        key,
        version: version(row)?,
        deleted: row.try_get("deleted").map_err(read)?,
        size: u64::from(size.unsigned_abs()),
        expires_at: expires_at.map(Timestamp::from_micros),
        dead: row.try_get("dead").map_err(read)?,
    }))
}
