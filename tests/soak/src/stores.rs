//! What the servers hold once nothing is asked any more, read from the servers themselves.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use birb_nest_stack::{Environment, Stack};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use serde_json::Value;

/// How long Redis may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Values of so many bytes, and all that belongs to them, are compared; of larger ones only the versions.
const SMALL: usize = 200;
/// As many bytes of Redis hold a small one.
const HEAD: isize = 1000;
/// Keys per question to Redis.
const AT_ONCE: usize = 500;
/// Kind, version, `expires_at`: what stands before the body of an entry in Redis.
const HEADER: usize = 33;

/// A row of PostgreSQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Of the newest change that is stored.
    pub version: u64,
    /// It is a tombstone.
    pub is_deleted: bool,
    /// How many milliseconds of its time to live were left when it was asked for; fewer than none if it was over.
    pub left: Option<i64>,
    /// Of a small one.
    pub value: Option<Value>,
}

impl Row {
    /// Version and value, if it has one.
    #[must_use]
    pub fn found(&self) -> Option<(u64, i64)> {
        self.stored().filter(|_| !self.is_expired())
    }

    /// Version and value, also of what has expired.
    #[must_use]
    pub fn stored(&self) -> Option<(u64, i64)> {
        let value = self.value.as_ref().and_then(Value::as_i64);
        let value = value.filter(|_| !self.is_deleted);
        value.map(|value| (self.version, value))
    }

    /// Its time to live was over when it was asked for.
    #[must_use]
    pub fn is_expired(&self) -> bool {
        self.left.is_some_and(|left| left < 0)
    }
}

/// All rows of PostgreSQL, by their keys.
pub type Rows = HashMap<String, Row>;

/// A connection with more patience than the client's own half a second: this machine may be busy.
pub(crate) async fn redis_at(url: &str) -> Result<MultiplexedConnection> {
    let settings = redis::AsyncConnectionConfig::new()
        .set_connection_timeout(Some(PATIENCE))
        .set_response_timeout(Some(PATIENCE));
    Ok(redis::Client::open(url)?
        .get_multiplexed_async_connection_with_config(&settings)
        .await?)
}

/// All of it.
struct Stores<'a> {
    stack: &'a Stack,
    env: &'a Environment,
}

/// Waits until nothing is left to be stored, nothing is dead, and Redis has of no key anything else than PostgreSQL. Returns
/// what that has.
///
/// # Errors
/// It is not so after `patience`: a sentence about what is in the way.
pub async fn agree(stack: &Stack, env: &Environment, patience: Duration) -> Result<Rows> {
    let stores = Stores { stack, env };
    let agreed = within(patience, async || stores.judge().await).await;
    agreed.with_context(|| format!("the stores do not agree after {patience:?}"))
}

/// Waits until nothing is left to be stored. Returns what PostgreSQL has.
///
/// # Errors
/// It is not so after `patience`: a sentence about what is in the way.
pub async fn drained(stack: &Stack, env: &Environment, patience: Duration) -> Result<Rows> {
    let stores = Stores { stack, env };
    within(patience, async || stores.all_is_stored().await).await?;
    stores.rows().await
}

async fn within<T>(patience: Duration, look: impl AsyncFn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        match look().await {
            Err(_) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            looked => return looked,
        }
    }
}

impl Stores<'_> {
    async fn judge(&self) -> Result<Rows> {
        self.all_is_stored().await?;
        let dead = self.sql("select count(*) from dead_keys").await?;
        ensure!(dead == "0", "{dead} dead letters that no fault made");
        let owed = self.sql("select count(*) from shard_state where redis_debt");
        let owed = owed.await?;
        ensure!(
            owed == "0",
            "Redis was not told of what {owed} shards stored"
        );
        let rows = self.rows().await?;
        self.redis_agrees_with(&rows).await?;
        Ok(rows)
    }

    /// The log has nothing that PostgreSQL has not.
    async fn all_is_stored(&self) -> Result<()> {
        let url = format!("nats://127.0.0.1:{}", self.stack.nats.port());
        let log = async_nats::jetstream::new(async_nats::connect(url).await?);
        let shards = self
            .sql("select shard, base, applied_to from shard_state order by shard")
            .await?;
        for line in shards.lines() {
            let [shard, base, applied_to] = fields(line)?;
            let (base, applied_to): (u64, u64) = (base.parse()?, applied_to.parse()?);
            let name = format!("{}_{shard}", self.env.vars["NATS_STREAM_NAME"]);
            let stream = log.get_stream(&name).await?;
            let last = base + stream.cached_info().state.last_sequence;
            ensure!(
                last <= applied_to,
                "the log of shard {shard} goes to {last}, and only what goes to {applied_to} is stored"
            );
        }
        Ok(())
    }

    async fn rows(&self) -> Result<Rows> {
        let found = self
            .sql(&format!(
                "select key, version, deleted, coalesce(floor(extract(epoch from expires_at - clock_timestamp()) * 1000)::bigint::text, ''),
                        case when octet_length(value) <= {SMALL} then convert_from(value, 'UTF8') else '' end
                 from cache_entries"
            ))
            .await?;
        let row = |line: &str| {
            let [key, version, is_deleted, left, value] = fields(line)?;
            let row = Row {
                version: version.parse()?,
                is_deleted: is_deleted == "t",
                left: (!left.is_empty()).then(|| left.parse()).transpose()?,
                value: serde_json::from_str(value).ok(),
            };
            Ok((key.to_owned(), row))
        };
        found.lines().map(row).collect()
    }

    /// Redis may have nothing of a key, or that somebody looks it up; what it has is what the row says.
    async fn redis_agrees_with(&self, rows: &Rows) -> Result<()> {
        let (port, db) = (self.stack.redis.port(), &self.env.vars["REDIS_DB"]);
        let mut redis = redis_at(&format!("redis://127.0.0.1:{port}/{db}")).await?;
        let keys: Vec<String> = redis.keys("birb:e:*").await?;
        for keys in keys.chunks(AT_ONCE) {
            let mut pipe = redis::pipe();
            for key in keys {
                pipe.getrange(key, 0, HEAD - 1);
            }
            let found: Vec<Vec<u8>> = pipe.query_async(&mut redis).await?;
            for (key, found) in keys.iter().zip(found) {
                let key = key.trim_start_matches("birb:e:");
                if let Err(error) = agrees(&found, rows.get(key)) {
                    let found = String::from_utf8_lossy(&found);
                    let sight = format!(
                        "{key}: {found:.200} in Redis, {:?} in PostgreSQL; what the nest itself says: {}",
                        rows.get(key),
                        self.debug(key).await
                    );
                    return Err(error.context(sight));
                }
            }
        }
        Ok(())
    }

    async fn debug(&self, key: &str) -> String {
        let url = format!("{}/v1/debug/{key}", self.env.api_url());
        match reqwest::get(url).await {
            Ok(answer) => answer.text().await.unwrap_or_default(),
            Err(error) => error.to_string(),
        }
    }

    async fn sql(&self, sql: &str) -> Result<String> {
        let found = self.stack.psql(&self.env.vars["POSTGRES_DB"], sql).await?;
        Ok(found.trim_end().to_owned())
    }
}

/// Whether what Redis has of a key is what its row says. The format is that of `dataplane/store/src/redis/value.rs`.
fn agrees(found: &[u8], row: Option<&Row>) -> Result<()> {
    let is_there = row.is_some_and(|row| !row.is_deleted && !row.is_expired());
    match found.first() {
        // It went meanwhile; somebody looks it up.
        None | Some(b'T') => return Ok(()),
        Some(b'N') => {
            ensure!(!is_there, "Redis says that there is no value");
            return Ok(());
        }
        Some(b'E' | b'D') => {}
        Some(_) => bail!("Redis has what nobody writes there"),
    }
    let row = row.context("PostgreSQL has nothing of it")?;
    let version = found.get(1..17).context("it has a version")?;
    let version: u64 = std::str::from_utf8(version)?.parse()?;
    ensure!(
        version == row.version && (found[0] == b'D') == row.is_deleted,
        "another version"
    );
    if let (b'E', Some(value)) = (found[0], &row.value) {
        let document: Value = serde_json::from_slice(&found[HEADER.min(found.len())..])?;
        ensure!(document["value"] == *value, "another value");
    }
    Ok(())
}

fn fields<const N: usize>(line: &str) -> Result<[&str; N]> {
    let found: Vec<&str> = line.split('|').collect();
    let n = found.len();
    found
        .try_into()
        .ok()
        .with_context(|| format!("{n} columns instead of {N}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_redis_has_is_what_the_row_says() {
        let row = |is_deleted: bool, is_expired: bool| Row {
            version: 7,
            is_deleted,
            left: is_expired.then_some(-1),
            value: (!is_deleted).then(|| Value::from(5)),
        };
        let (present, deleted, expired) = (row(false, false), row(true, false), row(false, true));
        let check = |found: &str, row: Option<&Row>| agrees(found.as_bytes(), row).is_ok();
        let zeros = "0".repeat(15);
        let entry = |version: u8, value: u8| {
            format!("E{zeros}{version}{zeros}0{{\"key\":\"k\",\"value\":{value}}}")
        };
        for row in [None, Some(&present), Some(&deleted)] {
            assert!(check("", row));
            assert!(check("T0123", row));
            assert!(!check("?", row));
        }
        assert!(check("N", None) && check("N", Some(&deleted)) && check("N", Some(&expired)));
        assert!(!check("N", Some(&present)));
        assert!(check(&entry(7, 5), Some(&present)));
        assert!(check(&entry(7, 5), Some(&expired)));
        assert!(!check(&entry(7, 4), Some(&present)), "another value");
        assert!(!check(&entry(6, 5), Some(&present)), "an older version");
        assert!(!check(&entry(8, 5), Some(&present)), "what is not stored");
        assert!(!check(&entry(7, 5), Some(&deleted)));
        assert!(!check(&entry(7, 5), None));
        let tombstone = format!("D{zeros}7{zeros}0");
        assert!(check(&tombstone, Some(&deleted)));
        assert!(!check(&tombstone, Some(&present)));
    }
}
