//! Removing rows of entries that are long gone, in small steps along the primary key.
//!
//! A tombstone or an expired row may only go when nothing older of its key can come any more: when its shard has come
//! past it, and the key has no dead letter. There is no index on `expires_at` (it would end HOT updates), so all keys
//! are walked past.

use std::time::Duration;

use birb_nest_core::{Key, ShardCount, Version};
use sqlx::{PgConnection, Row as _};

use super::{connect, database_error, members::application, newest::N_BLOCKS, within};
use crate::config::PostgresConfig;

/// The lock that makes one worker at a time the janitor: "birj" in ASCII.
const JANITOR_LOCK: (i32, i32) = (0x6269_726a, 0);

/// The session that has the lock and has begun no statement for `$3` seconds: nobody is behind it any more, and nothing told
/// PostgreSQL. A statement may take 30 s.
const END_SILENT: &str = "\
with silent as materialized (
    select pid from pg_locks l join pg_stat_activity a using (pid)
    where l.locktype = 'advisory' and l.granted and l.objsubid = 2
      and l.classid::bigint = $1 and l.objid::bigint = $2
      and l.database = (select oid from pg_database where datname = current_database())
      and a.query_start < clock_timestamp() - $3 * interval '1 second'
      and (a.state <> 'active' or a.query_start < clock_timestamp() - interval '40 seconds')
)
select count(*) from silent where pg_terminate_backend(pid, 1000)";

/// A key of these blocks.
const IN_BLOCKS: &str = "\
select key from cache_entries where ctid >= $1::text::tid and ctid < $2::text::tid limit 1";
/// As many blocks as it takes to find one, most likely, where many rows are dead.
const SOME_BLOCKS: i64 = 64;

const WALK: &str = "\
select key, version,
       (deleted and written_at < clock_timestamp() - $3 * interval '1 second')
       or coalesce(expires_at < clock_timestamp() - $3 * interval '1 second', false) as gone
from cache_entries where key > $1 order by key limit $2";

/// Rows that somebody is writing right now are left for the next round.
const REAP: &str = "\
with doomed as (
    select t.key from cache_entries t
    join unnest($1::text[], $2::bigint[]) as b (key, version) on t.key = b.key and t.version = b.version
    where not exists (select from dead_keys d where d.key = t.key)
    order by t.key for update of t skip locked
)
delete from cache_entries t using doomed where t.key = doomed.key";

/// The right to walk, for as long as the session lives.
pub struct Janitor {
    connection: PgConnection,
    applied_to: Vec<Version>,
    shards: ShardCount,
    limit: Duration,
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Rows removed.
    pub n_reaped: u64,
    /// The last key that was looked at, or what is in the place of one; `None` when there were no more.
    pub last: Option<String>,
}

impl Janitor {
    /// Becomes the janitor; `None` when another worker is, and has asked for something within `patience`: it does so many times a
    /// second.
    ///
    /// # Errors
    /// A sentence; nobody is hindered then.
    pub async fn claim(
        config: &PostgresConfig,
        shards: ShardCount,
        worker: &str,
        patience: Duration,
    ) -> Result<Option<Self>, String> {
        let application = format!("{}janitor", application(worker));
        let mut connection = connect::connect(config, &application).await?;
        let (class, object) = JANITOR_LOCK;
        let ending = sqlx::query_scalar(END_SILENT)
            .bind(i64::from(class))
            .bind(i64::from(object))
            .bind(patience.as_secs_f64())
            .fetch_one(&mut connection);
        let n_ended: i64 = within(config.postgres_timeout, ending).await?;
        if n_ended > 0 {
            tracing::warn!("a janitor's session asks for nothing any more: it was ended");
        }
        let locking = connect::lock_or_close(config, connection, JANITOR_LOCK);
        let Some(mut connection) = locking.await? else {
            return Ok(None);
        };
        let asking = sqlx::query_scalar("select applied_to from shard_state order by shard")
            .fetch_all(&mut connection);
        let applied: Vec<i64> = within(config.postgres_timeout, asking).await?;
        let applied_to: Vec<Version> = applied
            .into_iter()
            .filter_map(|version| Version::new(u64::try_from(version).ok()?))
            .collect();
        if applied_to.len() != usize::from(shards.get()) {
            return Err("shard_state lacks a shard: run `birb-nest setup`".to_owned());
        }
        Ok(Some(Self {
            connection,
            applied_to,
            shards,
            limit: Duration::from_secs(30),
        }))
    }

    /// A key that lies on the disk where `part` of the table, from 0.0 to 1.0, is before it; empty, which comes before all keys,
    /// if there is none.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn somewhere(&mut self, part: f64) -> Result<String, String> {
        let counting = sqlx::query_scalar(N_BLOCKS).fetch_one(&mut self.connection);
        let n_blocks: i64 = within(self.limit, counting).await?;
        let block = (n_blocks as f64 * part) as i64;
        let looking = sqlx::query_scalar(IN_BLOCKS)
            .bind(format!("({block},0)"))
            .bind(format!("({},0)", block + SOME_BLOCKS))
            .fetch_optional(&mut self.connection);
        let found: Option<String> = within(self.limit, looking).await?;
        Ok(found.unwrap_or_default())
    }

    /// Looks at the `n` keys after `after` (empty: from the first) and removes the rows of those that have been gone
    /// for `grace`.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn step(&mut self, after: &str, n: u32, grace: Duration) -> Result<Step, String> {
        let walking = sqlx::query(WALK)
            .bind(after)
            .bind(i64::from(n))
            .bind(grace.as_secs_f64())
            .fetch_all(&mut self.connection);
        let rows = within(self.limit, walking).await?;
        let (mut keys, mut versions, mut last) = (Vec::new(), Vec::new(), None);
        for row in rows {
            let read = |error: sqlx::Error| database_error(&error);
            let name: String = row.try_get("key").map_err(read)?;
            last = Some(name.clone());
            // What is no key somebody else wrote.
            let Ok(key) = Key::parse(&name) else {
                continue;
            };
            let version: i64 = row.try_get("version").map_err(read)?;
            let applied_to = self.applied_to[self.shards.shard_of(&key).index()];
            if row.try_get("gone").map_err(read)? && version <= applied_to.as_i64() {
                keys.push(name);
                versions.push(version);
            }
        }
        let mut n_reaped = 0;
        if !keys.is_empty() {
            let reaping = sqlx::query(REAP)
                .bind(keys)
                .bind(versions)
                .execute(&mut self.connection);
            n_reaped = within(self.limit, reaping).await?.rows_affected();
        }
        Ok(Step { n_reaped, last })
    }
}
