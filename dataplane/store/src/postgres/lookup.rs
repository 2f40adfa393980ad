//! Reading rows.

use birb_nest_core::{Base, Content, Entry, Key, Shard, ShardCount, State, Timestamp, Version};
use sqlx::{PgPool, Row as _, postgres::PgRow};

use super::{DeadLetter, Row, borrowed::Borrowed, database_error, reshard::as_i16};

/// One row per key, in their order, with the base of its shard in the same snapshot; none when the nest has another number
/// of shards than `$3`, among which the keys belong elsewhere.
const LOOKUP: &str = "\
select s.base, s.applied_to, d.version as dead_version, d.dlq_seq, e.version, e.deleted, e.content_type, e.metadata, e.value,
       (extract(epoch from e.written_at) * 1000000)::bigint as written_at,
       (extract(epoch from e.expires_at) * 1000000)::bigint as expires_at
from unnest($1::text[], $2::smallint[]) with ordinality as k (key, shard, place)
join shard_state s on s.shard = k.shard join nest_state n on n.shards = $3
left join cache_entries e on e.key = k.key
left join dead_keys d on d.key = k.key and d.version > coalesce(e.version, 0)
order by k.place";

pub(super) async fn many(
    pool: &PgPool,
    shards: ShardCount,
    keys: &[(Key, Shard)],
) -> Result<Vec<Row>, String> {
    let names: Vec<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
    let places: Vec<i16> = keys.iter().map(|(_, shard)| shard.as_i16()).collect();
    let mut connection = Borrowed::from(pool).await?;
    let rows = sqlx::query(LOOKUP)
        .bind(names)
        .bind(places)
        .bind(as_i16(shards))
        .fetch_all(&mut *connection)
        .await
        .map_err(|error| database_error(&error))?;
    connection.done();
    if rows.len() != keys.len() {
        return Err(format!(
            "the nest does not have {shards} shards, or one is missing in shard_state"
        ));
    }
    rows.iter().map(row).collect()
}

fn row(row: &PgRow) -> Result<Row, String> {
    read(row)
        .map_err(|error| database_error(&error))?
        .ok_or_else(|| "a version is out of range".to_owned())
}

fn read(row: &PgRow) -> Result<Option<Row>, sqlx::Error> {
    let Some(base) = number(row.try_get("base")?).and_then(Base::new) else {
        return Ok(None);
    };
    let Some(applied_to) = number(row.try_get("applied_to")?).and_then(Version::new) else {
        return Ok(None);
    };
    let dead = match (
        row.try_get::<Option<i64>, _>("dead_version")?,
        row.try_get::<Option<i64>, _>("dlq_seq")?,
    ) {
        (Some(version), Some(sequence)) => {
            match (number(version).and_then(Version::new), number(sequence)) {
                (Some(version), Some(sequence)) => Some(DeadLetter { version, sequence }),
                _ => return Ok(None),
            }
        }
        _ => None,
    };
    let Some(version) = row.try_get::<Option<i64>, _>("version")? else {
        return Ok(Some(Row {
            base,
            applied_to,
            entry: None,
            dead,
        }));
    };
    let Some(version) = number(version).and_then(Version::new) else {
        return Ok(None);
    };
    let state = if row.try_get("deleted")? {
        State::Deleted
    } else {
        State::Present(Content {
            content_type: row.try_get("content_type")?,
            metadata: row.try_get::<Vec<u8>, _>("metadata")?.into(),
            value: row.try_get::<Vec<u8>, _>("value")?.into(),
        })
    };
    Ok(Some(Row {
        base,
        applied_to,
        entry: Some(Entry {
            version,
            written_at: Timestamp::from_micros(row.try_get("written_at")?),
            expires_at: row
                .try_get::<Option<i64>, _>("expires_at")?
                .map(Timestamp::from_micros),
            state,
        }),
        dead,
    }))
}

fn number(value: i64) -> Option<u64> {
    u64::try_from(value).ok()
}
