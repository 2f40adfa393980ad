//! What was written last, found without an index: one on what every write changes would cost every write.
//!
//! All of the table is read, but in pieces of neighbouring blocks: each is a statement that ends in good time, however large the
//! table is. A row that moves meanwhile may be passed over or found twice; it was just written.

use birb_nest_core::{Key, Version};
use sqlx::{PgPool, Row as _};

use super::{
    borrowed::Borrowed,
    database_error,
    list::{key, version},
};

/// Blocks per statement: 64 MiB.
const PIECE: i64 = 8192;

pub(super) const N_BLOCKS: &str =
    "select pg_relation_size('cache_entries') / current_setting('block_size')::bigint";

const NEWEST: &str = "\
select key, version,
       octet_length(value) * case content_type when 'application/json' then 3 else 4 end / 3 + octet_length(metadata) as size
from cache_entries
where ctid >= $1::text::tid and ctid < $2::text::tid
  and not deleted and (expires_at is null or expires_at > clock_timestamp())
  and ($3 is null or (version, key) < ($3, $4)) and version >= $5
order by version desc, key desc limit $6";

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

/// The search for the newest keys below some place.
#[derive(Debug)]
pub struct Search {
    below: Option<(Version, Key)>,
    limit: u32,
    /// Where it has come to.
    block: i64,
    /// Newest first.
    found: Vec<Newest>,
}

impl Search {
    /// For at most `limit` keys; only those below `below`, if there is one.
    #[must_use]
    pub const fn new(below: Option<(Version, Key)>, limit: u32) -> Self {
        Self {
            below,
            limit,
            block: 0,
            found: Vec::new(),
        }
    }

    /// The newest keys, greatest version first, of what was looked at.
    #[must_use]
    pub fn found(self) -> Vec<Newest> {
        self.found
    }

    /// Looks at another piece of the table; tells whether there is more.
    pub(super) async fn step(&mut self, pool: &PgPool) -> Result<bool, String> {
        let read = |error: sqlx::Error| database_error(&error);
        let end = self.block + PIECE;
        let below = self.below.as_ref();
        // Older ones than are there already need not be looked at.
        let is_full = self.found.len() >= self.limit as usize;
        let floor = self.found.last().filter(|_| is_full);
        let mut connection = Borrowed::from(pool).await?;
        let rows = sqlx::query(NEWEST)
            .bind(format!("({},0)", self.block))
            .bind(format!("({end},0)"))
            .bind(below.map(|(version, _)| version.as_i64()))
            .bind(below.map_or("", |(_, key)| key.as_str()))
            .bind(floor.map_or(0, |newest| newest.version.as_i64()))
            .bind(i64::from(self.limit))
            .fetch_all(&mut *connection)
            .await
            .map_err(read)?;
        let n_blocks: i64 = sqlx::query_scalar(N_BLOCKS)
            .fetch_one(&mut *connection)
            .await
            .map_err(read)?;
        connection.done();
        for row in &rows {
            let size: i32 = row.try_get("size").map_err(read)?;
            let Some(key) = key(row)? else {
                continue;
            };
            self.found.push(Newest {
                key,
                version: version(row)?,
                size: u64::from(size.unsigned_abs()),
            });
        }
        self.found
            .sort_unstable_by(|a, b| (b.version, &b.key).cmp(&(a.version, &a.key)));
        self.found.truncate(self.limit as usize);
        self.block = end;
        Ok(end < n_blocks)
    }
}
