//! Another number of shards, as `setup --reshard` records it.

use birb_nest_core::{Base, Key, ShardCount};
use sqlx::{Connection, PgConnection};

use super::{SetupSession, database_error};
use crate::refusal::OpenError;

/// Dead keys that are given their new shards at once.
const PAGE: i64 = 1000;

const PLACES: &str = "\
insert into shard_state (shard, base, applied_to, told_to, redis_debt)
select place - 1, $1, $1 + sequence, $1 + sequence, $3 from unnest($2::bigint[]) with ordinality as p (sequence, place)
on conflict (shard) do update set base = excluded.base, applied_to = excluded.applied_to, told_to = excluded.told_to,
    redis_debt = excluded.redis_debt,
    updated_at = clock_timestamp()";

const MOVE_DEAD_KEYS: &str = "\
update dead_keys d set shard = b.shard from unnest($1::text[], $2::smallint[]) as b (key, shard) where d.key = b.key";

/// What PostgreSQL records of a nest's shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Numbers {
    /// How many there are.
    pub present: ShardCount,
    /// How many there are to be, while that is under way.
    pub target: Option<ShardCount>,
}

/// How the shards of another number begin.
#[derive(Debug)]
pub(crate) struct Beginning {
    /// The base of all of them: greater than every version before.
    pub base: Base,
    /// Where the stream of each of them ends now: it goes on counting from there.
    pub sequences: Vec<u64>,
}

impl SetupSession {
    /// Whether a nest was ever set up here.
    pub async fn has_nest(&mut self) -> Result<bool, OpenError> {
        sqlx::query_scalar("select to_regclass('nest_state') is not null")
            .fetch_one(&mut self.connection)
            .await
            .map_err(|error| self.unreachable(&error))
    }

    /// How many shards there are, and are to be; `None` when nobody has said so yet.
    pub async fn numbers(&mut self) -> Result<Option<Numbers>, OpenError> {
        let row: Option<(i16, Option<i16>)> =
            sqlx::query_as("select shards, resharding_to from nest_state")
                .fetch_optional(&mut self.connection)
                .await
                .map_err(|error| self.unreachable(&error))?;
        let count = |number: i16| {
            let count = u16::try_from(number).ok().map(ShardCount::new);
            count.and_then(Result::ok).ok_or_else(|| {
                OpenError::refused(&self.server, format!("it records {number} shards"))
            })
        };
        row.map(|(present, target)| {
            Ok(Numbers {
                present: count(present)?,
                target: target.map(count).transpose()?,
            })
        })
        .transpose()
    }

    /// Records that the nest is to have `target` shards, or with `None` that it has what it is to have.
    pub async fn aim(&mut self, target: Option<ShardCount>) -> Result<(), OpenError> {
        sqlx::query("update nest_state set resharding_to = $1")
            .bind(target.map(as_i16))
            .execute(&mut self.connection)
            .await
            .map_err(|error| self.unreachable(&error))?;
        Ok(())
    }

    /// Gives the nest `target` shards in place of `present`, all at once: from now on nothing of the former ones is stored
    /// any more.
    ///
    /// Every message of the former shards must be stored by now.
    pub async fn reshard(
        &mut self,
        present: ShardCount,
        target: ShardCount,
        beginning: &Beginning,
    ) -> Result<(), OpenError> {
        let done = renumber(&mut self.connection, present, target, beginning).await;
        match done {
            Ok(true) => Ok(()),
            Ok(false) => Err(OpenError::unreachable(
                &self.server,
                "its shards changed meanwhile: run it again",
            )),
            Err(error) => Err(OpenError::unreachable(
                &self.server,
                format!(
                    "failed to record {target} shards: {}",
                    database_error(&error)
                ),
            )),
        }
    }
}

/// Whether the nest still was what it was taken for; nothing is changed if not.
async fn renumber(
    connection: &mut PgConnection,
    present: ShardCount,
    target: ShardCount,
    beginning: &Beginning,
) -> Result<bool, sqlx::Error> {
    let mut transaction = connection.begin().await?;
    let inside = &mut *transaction;
    // Whoever stores a batch or buries a letter has done so before this, or finds another base.
    sqlx::query("lock table shard_state, dead_keys in share row exclusive mode")
        .execute(&mut *inside)
        .await?;
    let renumbered =
        sqlx::query("update nest_state set shards = $2 where shards = $1 and resharding_to = $2")
            .bind(as_i16(present))
            .bind(as_i16(target))
            .execute(&mut *inside)
            .await?;
    // What Redis was perhaps not told of, nobody will read again.
    let (furthest, owes): (i64, bool) = sqlx::query_as(
        "select coalesce(max(applied_to), 0),
                coalesce(bool_or(redis_debt or (applied_to > base and told_to < applied_to)), false)
         from shard_state",
    )
    .fetch_one(&mut *inside)
    .await?;
    let base = i64::try_from(beginning.base.get()).unwrap_or(i64::MAX);
    if renumbered.rows_affected() != 1 || furthest >= base {
        return Ok(false);
    }
    let sequences: Vec<i64> = beginning
        .sequences
        .iter()
        .map(|sequence| i64::try_from(*sequence).unwrap_or(i64::MAX))
        .collect();
    sqlx::query("delete from shard_state where shard >= $1")
        .bind(as_i16(target))
        .execute(&mut *inside)
        .await?;
    sqlx::query(PLACES)
        .bind(base)
        .bind(sequences)
        .bind(owes)
        .execute(&mut *inside)
        .await?;
    let mut after = String::new();
    loop {
        let keys: Vec<String> =
            sqlx::query_scalar("select key from dead_keys where key > $1 order by key limit $2")
                .bind(&after)
                .bind(PAGE)
                .fetch_all(&mut *inside)
                .await?;
        let Some(last) = keys.last() else { break };
        after.clone_from(last);
        let (keys, shards): (Vec<String>, Vec<i16>) = keys
            .iter()
            .filter_map(|key| Key::parse(key).ok())
            .map(|key| (key.to_string(), target.shard_of(&key).as_i16()))
            .unzip();
        sqlx::query(MOVE_DEAD_KEYS)
            .bind(keys)
            .bind(shards)
            .execute(&mut *inside)
            .await?;
    }
    transaction.commit().await?;
    Ok(true)
}

pub(super) fn as_i16(shards: ShardCount) -> i16 {
    i16::try_from(shards.get()).expect("at most 64")
}
