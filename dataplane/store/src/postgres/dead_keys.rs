//! Keys whose newest write PostgreSQL refused for good.

use std::{collections::HashMap, time::Duration};

use birb_nest_core::{Base, Key, Version};
use sqlx::Row as _;
use tokio::time::timeout;

use super::{
    database_error,
    shard::{ApplyError, ShardSession, failed, letters},
    within,
};

/// The refused writes of a batch, and the shard's place behind it.
const BURY: &str = "\
with moved as (
    update shard_state set applied_to = $3, updated_at = clock_timestamp()
    where shard = $1 and base = $2 and applied_to <= $3
    returning shard
), buried as (
    insert into dead_keys as t (key, shard, version, dlq_seq, sqlstate, reason, next_try_at)
    select b.key, $1, b.version, b.dlq_seq, b.sqlstate, b.reason,
           case when $9 then clock_timestamp() + $10 * interval '1 second' end
    from unnest($4::text[], $5::bigint[], $6::bigint[], $7::text[], $8::text[])
         as b (key, version, dlq_seq, sqlstate, reason)
    where exists (select from moved)
    on conflict (key) do update
        set version = excluded.version, dlq_seq = excluded.dlq_seq, sqlstate = excluded.sqlstate,
            reason = excluded.reason, attempts = 1, first_failed_at = excluded.first_failed_at,
            last_failed_at = excluded.last_failed_at, next_try_at = excluded.next_try_at
        where t.version <= excluded.version
), replaced as (
    select d.dlq_seq, d.key from dead_keys d join unnest($4::text[], $5::bigint[]) as b (key, version) on b.key = d.key
    where d.version < b.version and exists (select from moved)
)
select (select count(*) from moved), array(select dlq_seq from replaced order by key),
       array(select key from replaced order by key)";

const OF_KEYS: &str = "select key, version, dlq_seq from dead_keys where key = any($1)";

const DUE: &str = "\
select key, version, dlq_seq, attempts from dead_keys
where shard = $1 and next_try_at <= clock_timestamp()
order by next_try_at limit 16";

const REFUSED_AGAIN: &str = "\
update dead_keys set attempts = attempts + 1, last_failed_at = clock_timestamp(), sqlstate = $3, reason = $4,
       next_try_at = clock_timestamp() + $5 * interval '1 second'
where key = $1 and version = $2";

const COUNT: &str = "\
select count(next_try_at), count(*) - count(next_try_at) from dead_keys where shard = $1";

/// A refused write that lies in the dead-letter stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadKey {
    /// Its key.
    pub key: Key,
    /// Its version.
    pub version: Version,
    /// Its sequence in the dead-letter stream.
    pub sequence: u64,
    /// Why PostgreSQL refused it: the code of the SQL standard.
    pub sqlstate: String,
    /// Why PostgreSQL refused it: its words.
    pub reason: String,
}

/// A refused write whose next try is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueKey {
    /// Its key.
    pub key: Key,
    /// Its version.
    pub version: Version,
    /// Its sequence in the dead-letter stream.
    pub sequence: u64,
    /// How often storing it was tried.
    pub n_attempts: u32,
}

impl ShardSession {
    /// Those of `keys` that are dead: the version of the refused write, and its sequence in the dead-letter stream.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn dead_keys(
        &mut self,
        keys: &[&str],
    ) -> Result<HashMap<String, (Version, u64)>, String> {
        let rows: Vec<(String, i64, i64)> = within(
            self.limit,
            sqlx::query_as(OF_KEYS)
                .bind(keys)
                .fetch_all(&mut self.connection),
        )
        .await?;
        rows.into_iter()
            .map(|(key, version, sequence)| {
                let version = u64::try_from(version).ok().and_then(Version::new);
                let sequence = u64::try_from(sequence).ok();
                version
                    .zip(sequence)
                    .map(|place| (key, place))
                    .ok_or_else(|| "a dead key is out of range".to_owned())
            })
            .collect()
    }

    /// Records the refused writes of a batch whose other rows are stored, and the shard's place behind it (or where it is, for a
    /// log that is stored ahead), in one transaction. Each is tried again after `retry_after`, or parked without it.
    /// A key whose dead letter is newer keeps that one.
    /// Returns the dead letters in whose place they are now: most are gone from their stream by that, but not those of a time
    /// when their keys belonged to other shards.
    ///
    /// # Errors
    /// As [`ShardSession::apply`].
    ///
    /// # Cancel safety
    /// As [`ShardSession::apply`].
    pub async fn bury(
        &mut self,
        base: Base,
        through: Version,
        dead: &[DeadKey],
        retry_after: Option<Duration>,
    ) -> Result<Vec<(u64, Key)>, ApplyError> {
        let shard = self.shard;
        let (moved, sequences, keys): (i64, Vec<i64>, Vec<String>) = timeout(
            self.limit,
            sqlx::query_as(BURY)
                .bind(shard.as_i16())
                .bind(i64::try_from(base.get()).unwrap_or(i64::MAX))
                .bind(through.as_i64())
                .bind(
                    dead.iter()
                        .map(|dead| dead.key.as_str())
                        .collect::<Vec<_>>(),
                )
                .bind(
                    dead.iter()
                        .map(|dead| dead.version.as_i64())
                        .collect::<Vec<_>>(),
                )
                .bind(
                    dead.iter()
                        .map(|dead| i64::try_from(dead.sequence).unwrap_or(i64::MAX))
                        .collect::<Vec<_>>(),
                )
                .bind(
                    dead.iter()
                        .map(|dead| dead.sqlstate.as_str())
                        .collect::<Vec<_>>(),
                )
                .bind(
                    dead.iter()
                        .map(|dead| dead.reason.as_str())
                        .collect::<Vec<_>>(),
                )
                .bind(retry_after.is_some())
                .bind(retry_after.unwrap_or_default().as_secs_f64())
                .fetch_one(&mut self.connection),
        )
        .await
        .map_err(|_| ApplyError::Failed {
            shard,
            why: format!("no answer within {:?}", self.limit),
            sqlstate: None,
        })?
        .map_err(|error| failed(shard, &error))?;
        if moved == 0 {
            return Err(ApplyError::Superseded(shard));
        }
        Ok(letters(sequences, keys))
    }

    /// Refused writes of the shard that are due to be tried again, at most 16.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn due_dead_keys(&mut self) -> Result<Vec<DueKey>, String> {
        let rows = within(
            self.limit,
            sqlx::query(DUE)
                .bind(self.shard.as_i16())
                .fetch_all(&mut self.connection),
        )
        .await?;
        rows.iter()
            .map(|row| {
                let read = |error: sqlx::Error| database_error(&error);
                let number = |value: i64| u64::try_from(value).ok();
                Ok(DueKey {
                    key: Key::parse(row.try_get("key").map_err(read)?)
                        .map_err(|error| error.to_string())?,
                    version: number(row.try_get("version").map_err(read)?)
                        .and_then(Version::new)
                        .ok_or("a version is out of range")?,
                    sequence: number(row.try_get("dlq_seq").map_err(read)?)
                        .ok_or("a sequence is out of range")?,
                    n_attempts: u32::try_from(row.try_get::<i32, _>("attempts").map_err(read)?)
                        .unwrap_or(0),
                })
            })
            .collect()
    }

    /// Records that a refused write was refused once more, and when it is tried again; without a time it is parked.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn refused_again(
        &mut self,
        due: &DueKey,
        sqlstate: &str,
        reason: &str,
        retry_after: Option<Duration>,
    ) -> Result<(), String> {
        within(
            self.limit,
            sqlx::query(REFUSED_AGAIN)
                .bind(due.key.as_str())
                .bind(due.version.as_i64())
                .bind(sqlstate)
                .bind(reason)
                .bind(retry_after.map(|wait| wait.as_secs_f64()))
                .execute(&mut self.connection),
        )
        .await?;
        Ok(())
    }

    /// How many refused writes of the shard wait for another try, and how many are parked.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn count_dead_keys(&mut self) -> Result<(u64, u64), String> {
        let (waiting, parked): (i64, i64) = within(
            self.limit,
            sqlx::query_as(COUNT)
                .bind(self.shard.as_i16())
                .fetch_one(&mut self.connection),
        )
        .await?;
        Ok((waiting.unsigned_abs(), parked.unsigned_abs()))
    }
}
