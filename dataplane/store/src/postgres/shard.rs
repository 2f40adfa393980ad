//! Owning a shard: the lock and the batches in one session, so that losing the one ends the other.

use std::time::Duration;

use birb_nest_core::{Base, Batch, Entry, Key, Shard, State, Timestamp, Version};
use sqlx::{Connection, PgConnection, Row as _};
use tokio::time::timeout;

use super::{
    connect, database_error,
    members::{OWNER_CLASS, application},
    within,
};
use crate::{config::PostgresConfig, metrics::METRICS};

/// Rows and the shard's new place in one statement, thus in one transaction.
///
/// Nothing is stored unless the shard still lives under the same base and stands before `$3`, its new place; without
/// one (null) the rows are stored ahead of it. `$4..$11` are arrays of one length with each key once: a short array
/// would be padded with nulls, a key twice is an error. A refused write that one of the rows replaces is over.
const APPLY: &str = "\
with moved as (
    update shard_state set applied_to = coalesce($3, applied_to), told_to = coalesce($12, told_to), updated_at = clock_timestamp()
    where shard = $1 and base = $2 and applied_to < coalesce($3, applied_to + 1)
    returning shard
), over as (
    delete from dead_keys d using unnest($4::text[], $5::bigint[]) as b (key, version)
    where d.key = b.key and d.version <= b.version and exists (select from moved)
    returning d.dlq_seq, d.key
), changed as (
    insert into cache_entries as t (key, version, deleted, written_at, expires_at, content_type, metadata, value)
    select b.key, b.version, b.deleted,
           timestamptz 'epoch' + b.written_at * interval '1 microsecond',
           timestamptz 'epoch' + b.expires_at * interval '1 microsecond',
           b.content_type, b.metadata, b.value
    from unnest($4::text[], $5::bigint[], $6::boolean[], $7::bigint[], $8::bigint[], $9::text[], $10::bytea[], $11::bytea[])
         as b (key, version, deleted, written_at, expires_at, content_type, metadata, value)
    where exists (select from moved)
    on conflict (key) do update
        set version = excluded.version, deleted = excluded.deleted, written_at = excluded.written_at,
            expires_at = excluded.expires_at, content_type = excluded.content_type, metadata = excluded.metadata,
            value = excluded.value
        where t.version < excluded.version
    returning 1
)
select (select count(*) from moved) as moved, (select count(*) from changed) as changed,
       array(select dlq_seq from over order by key) as over, array(select key from over order by key) as over_keys";

/// How far a shard has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardState {
    /// The base of its stream's present life.
    pub base: Base,
    /// Every message up to this version is stored.
    pub applied_to: Version,
    /// Redis was told of every message up to this version, or is owed it; what is before the present life does not matter.
    pub told_to: Version,
}

/// What a batch changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Rows inserted or replaced; fewer than the batch has when newer versions were there already.
    pub n_changed: u64,
    /// Dead letters that are over, by their sequences: their keys are stored now, or have newer writes.
    pub over: Vec<(u64, Key)>,
}

/// Why a batch was not stored. Nothing of it is then, unless the connection broke at the commit: in that case it may
/// be, and reading on from `applied_to` finds out.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The shard began another life, or stands beyond the batch: this owner is out of date.
    #[error("shard {0} moved on without its owner")]
    Superseded(Shard),
    /// PostgreSQL did not store it.
    #[error("shard {shard} cannot be stored: {why}")]
    Failed {
        /// The shard.
        shard: Shard,
        /// What PostgreSQL said.
        why: String,
        /// The five characters of the SQL standard, when the server answered.
        sqlstate: Option<String>,
    },
}

/// A shard's lock and the connection that holds it. Dropping it gives the shard up.
pub struct ShardSession {
    pub(super) connection: PgConnection,
    pub(super) shard: Shard,
    pub(super) limit: Duration,
}

impl ShardSession {
    /// Connects and takes the lock of `shard`; `None` when another worker holds it. `worker` names this one in
    /// `pg_stat_activity`.
    ///
    /// # Errors
    /// A sentence; nothing is held then.
    pub async fn claim(
        config: &PostgresConfig,
        shard: Shard,
        worker: &str,
    ) -> Result<Option<Self>, String> {
        let application = format!("{}shard {shard}", application(worker));
        let lock = (OWNER_CLASS, i32::from(shard.as_i16()));
        let connection = connect::connect_with_lock(config, &application, lock).await?;
        Ok(connection.map(|connection| Self {
            connection,
            shard,
            limit: config.postgres_timeout,
        }))
    }

    /// How far the shard has come; also shows that the session, and so the lock, still stands.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn state(&mut self) -> Result<ShardState, String> {
        let row: Option<(i64, i64, i64)> = within(
            self.limit,
            sqlx::query_as("select base, applied_to, told_to from shard_state where shard = $1")
                .bind(self.shard.as_i16())
                .fetch_optional(&mut self.connection),
        )
        .await?;
        row.and_then(|(base, applied_to, told_to)| {
            Some(ShardState {
                base: Base::new(u64::try_from(base).ok()?)?,
                applied_to: Version::new(u64::try_from(applied_to).ok()?)?,
                told_to: Version::new(u64::try_from(told_to).ok()?)?,
            })
        })
        .ok_or_else(|| {
            format!(
                "shard_state lacks shard {}: run `birb-nest setup`",
                self.shard
            )
        })
    }

    /// Stores `batch`, read under `base`, and the shard's place behind it, in one transaction. Idempotent: an older
    /// version never replaces a newer one. Redis was told of what came before, up to `told_to`.
    ///
    /// # Errors
    /// [`ApplyError`]; unless it is permanent the session must be given up.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the outcome open and the session unusable.
    pub async fn apply(
        &mut self,
        base: Base,
        batch: &Batch,
        told_to: Version,
    ) -> Result<Applied, ApplyError> {
        self.store(base, Some(batch.through), Some(told_to), &batch.entries)
            .await
    }

    /// Stores `entries`, read under `base`, ahead of the shard's place, which does not move: whoever fails after this
    /// stores them again. For finding out which of a batch are refused.
    ///
    /// # Errors
    /// As [`ShardSession::apply`].
    ///
    /// # Cancel safety
    /// As [`ShardSession::apply`].
    pub async fn apply_ahead(
        &mut self,
        base: Base,
        entries: &[(Key, Entry)],
    ) -> Result<Applied, ApplyError> {
        self.store(base, None, None, entries).await
    }

    async fn store(
        &mut self,
        base: Base,
        through: Option<Version>,
        told_to: Option<Version>,
        entries: &[(Key, Entry)],
    ) -> Result<Applied, ApplyError> {
        let n = entries.len();
        let (mut keys, mut versions, mut deleted) = (
            Vec::with_capacity(n),
            Vec::with_capacity(n),
            Vec::with_capacity(n),
        );
        let (mut written, mut expires) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let (mut types, mut metadata, mut values) = (
            Vec::with_capacity(n),
            Vec::with_capacity(n),
            Vec::with_capacity(n),
        );
        for (key, entry) in entries {
            keys.push(key.as_str());
            versions.push(entry.version.as_i64());
            written.push(entry.written_at.as_micros());
            expires.push(entry.expires_at.map(Timestamp::as_micros));
            let content = match &entry.state {
                State::Present(content) => Some(content),
                State::Deleted => None,
            };
            deleted.push(content.is_none());
            types.push(content.map_or("", |content| content.content_type.as_str()));
            metadata.push(content.map_or(&[][..], |content| &content.metadata));
            values.push(content.map_or(&[][..], |content| &content.value));
        }
        let shard = self.shard;
        let base = i64::try_from(base.get()).unwrap_or(i64::MAX);
        let stored = sqlx::query(APPLY)
            .bind(shard.as_i16())
            .bind(base)
            .bind(through.map(Version::as_i64))
            .bind(keys)
            .bind(versions)
            .bind(deleted)
            .bind(written)
            .bind(expires)
            .bind(types)
            .bind(metadata)
            .bind(values)
            .bind(told_to.map(Version::as_i64))
            .fetch_one(&mut self.connection);
        // The server's own statement_timeout is shorter; this one is for a server that does not answer at all.
        let row = timeout(Duration::from_secs(40), stored)
            .await
            .map_err(|_| ApplyError::Failed {
                shard,
                why: "no answer within 40s".to_owned(),
                sqlstate: None,
            })?
            .map_err(|error| failed(shard, &error))?;
        let count = |column| {
            row.try_get::<i64, _>(column)
                .map_err(|error| failed(shard, &error))
        };
        let over_sequences: Vec<i64> =
            row.try_get("over").map_err(|error| failed(shard, &error))?;
        let over_keys: Vec<String> = row
            .try_get("over_keys")
            .map_err(|error| failed(shard, &error))?;
        if count("moved")? == 0 {
            return Err(ApplyError::Superseded(shard));
        }
        Ok(Applied {
            n_changed: u64::try_from(count("changed")?).unwrap_or(0),
            over: letters(over_sequences, over_keys),
        })
    }

    /// Records that the shard, whose life under `old` is stored to its end, begins another one under `new`, in which
    /// everything up to `applied_to` is stored: a stream goes on counting. Redis must be emptied, or owed that, before the life
    /// is open.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn begin_life(
        &mut self,
        old: Base,
        new: Base,
        applied_to: Version,
    ) -> Result<(), String> {
        let number = |base: Base| i64::try_from(base.get()).unwrap_or(i64::MAX);
        let changed = within(
            self.limit,
            sqlx::query(
                "update shard_state set base = $3, applied_to = $4, told_to = $4, updated_at = clock_timestamp()
                 where shard = $1 and base = $2 and applied_to < $3",
            )
            .bind(self.shard.as_i16())
            .bind(number(old))
            .bind(number(new))
            .bind(applied_to.as_i64())
            .execute(&mut self.connection),
        )
        .await?;
        if changed.rows_affected() == 1 {
            Ok(())
        } else {
            Err(format!("shard {} moved on without its owner", self.shard))
        }
    }

    /// Records that Redis was not told of a batch, which is stored, and must be emptied: [`super::Debt`].
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn set_redis_debt(&mut self) -> Result<(), String> {
        let setting = sqlx::query(
            "update shard_state set redis_debt = true where shard = $1 and not redis_debt",
        )
        .bind(self.shard.as_i16())
        .execute(&mut self.connection);
        let n_set = within(self.limit, setting).await?.rows_affected() as usize;
        if n_set > 0 {
            tracing::warn!(shard = %self.shard, "Redis is owed what this shard stored: whoever reaches it empties it");
        }
        METRICS.redis_debt("incurred", n_set);
        Ok(())
    }

    /// Records that Redis was told of everything up to `told_to`, where no later batch says so.
    ///
    /// # Errors
    /// A sentence; the session is of no use then.
    pub async fn set_told_to(&mut self, told_to: Version) -> Result<(), String> {
        let setting = sqlx::query("update shard_state set told_to = $2 where shard = $1")
            .bind(self.shard.as_i16())
            .bind(told_to.as_i64())
            .execute(&mut self.connection);
        within(self.limit, setting).await.map(drop)
    }

    /// Gives the shard up at once, instead of when the server notices.
    pub async fn release(self) {
        let _ = timeout(self.limit, self.connection.close()).await;
    }
}

impl ApplyError {
    /// Whether storing the same again fails again, because of what is stored: SQLSTATE classes 22 (data), 23
    /// (constraints), 54 (limits) and P0001 (a trigger said no). A whitelist: everything else may pass.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Failed {
                sqlstate: Some(code),
                ..
            } => {
                code == "P0001"
                    || ["22", "23", "54"]
                        .iter()
                        .any(|class| code.starts_with(class))
            }
            Self::Failed { sqlstate: None, .. } | Self::Superseded(_) => false,
        }
    }
}

/// Dead letters by their sequences and keys.
pub(super) fn letters(sequences: Vec<i64>, keys: Vec<String>) -> Vec<(u64, Key)> {
    let letter = |(sequence, key): (i64, String)| {
        Some((u64::try_from(sequence).ok()?, Key::parse(&key).ok()?))
    };
    sequences.into_iter().zip(keys).filter_map(letter).collect()
}

pub(super) fn failed(shard: Shard, error: &sqlx::Error) -> ApplyError {
    ApplyError::Failed {
        shard,
        why: database_error(error),
        sqlstate: error
            .as_database_error()
            .and_then(sqlx::error::DatabaseError::code)
            .map(|code| code.into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_write_itself_is_to_blame_for_is_permanent() {
        let check = |code: Option<&str>, expected: bool| {
            let error = ApplyError::Failed {
                shard: Shard::from_index(0),
                why: String::new(),
                sqlstate: code.map(str::to_owned),
            };
            assert_eq!(error.is_permanent(), expected, "{code:?}");
        };
        for code in ["22001", "22P02", "23502", "23514", "54000", "P0001"] {
            check(Some(code), true);
        }
        // Serialisation, deadlock, disk, locks, admin, I/O, read only, missing table, column or grant, no answer.
        for code in [
            "40001", "40P01", "53100", "53300", "55P03", "57014", "57P01", "58030", "25006",
            "42P01", "42703", "42501", "P0002", "XX000",
        ] {
            check(Some(code), false);
        }
        check(None, false);
        assert!(!ApplyError::Superseded(Shard::from_index(0)).is_permanent());
    }
}
