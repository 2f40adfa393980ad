//! `birb-nest setup`: the schema, the shard streams, the claim on Redis. Idempotent, and safe when several run at
//! once: they take turns under one lock in PostgreSQL.

use std::sync::Arc;

use birb_nest_core::Base;

use crate::{
    clock::Clock,
    config::{LogConfig, PostgresConfig, RedisConfig},
    jetstream::BareSession,
    postgres::SetupSession,
    redis,
    refusal::OpenError,
};

/// Brings all three servers to where this binary needs them.
///
/// # Errors
/// [`OpenError`]: what stands in the way and what to do about it. Doing it again goes on where this ended.
pub async fn run(
    postgres: &PostgresConfig,
    redis: &RedisConfig,
    log: LogConfig,
) -> Result<(), OpenError> {
    let clock = Arc::new(Clock::new());
    let log = Arc::new(log);
    let mut database = SetupSession::open(postgres, &clock).await?;
    database.migrate().await?;
    database.claim_shards(log.nats_shards).await?;
    tracing::info!("schema is up to date");
    let began_again = prepare_shards(&mut database, &log, &clock).await?;
    redis::claim(redis, &clock, began_again).await?;
    tracing::info!("Redis is claimed");
    database.close().await;
    Ok(())
}

/// Makes every shard's stream exist under the base that PostgreSQL records; returns whether a shard that had lived
/// before began another life.
async fn prepare_shards(
    database: &mut SetupSession,
    log: &Arc<LogConfig>,
    clock: &Clock,
) -> Result<bool, OpenError> {
    let server = BareSession::open(log).await?;
    server.prepare_dead_letters().await?;
    let mut began_again = false;
    for shard in log.nats_shards.iter() {
        let recorded = database.shard_state(shard).await?;
        match (server.base(shard).await?, recorded) {
            (Some(base), Some((recorded, _))) if base == recorded => {
                server.update(shard, base).await?
            }
            // PostgreSQL is new, or lost everything: what the log still has will be stored again.
            (Some(base), None) => {
                tracing::warn!(
                    "PostgreSQL knows nothing of shard {shard}, whose log exists: storing all that is left in it"
                );
                database.begin_life(shard, base).await?;
            }
            (Some(base), Some((recorded, _))) => {
                return Err(OpenError::refused(
                    server.server(),
                    format!(
                        "the log of shard {shard} lives under base {base}, PostgreSQL under {recorded}: one of them was \
                         restored from a backup, see docs/OPERATIONS.md"
                    ),
                ));
            }
            (None, recorded) => {
                let now = u64::try_from(clock.now().as_micros()).unwrap_or(0);
                let number = now.max(database.above_all_versions().await?);
                let base = Base::new(number).ok_or_else(|| {
                    OpenError::refused(server.server(), "the clock shows a time too far ahead")
                })?;
                // Recorded first: should this end in between, the next run finds no stream and begins anew.
                database.begin_life(shard, base).await?;
                server.create(shard, base).await?;
                if recorded.is_some_and(|(old, applied_to)| applied_to.get() > old.get()) {
                    tracing::warn!(
                        "the log of shard {shard} was gone: what had not been stored yet is lost"
                    );
                    began_again = true;
                }
                tracing::info!("made the log of shard {shard}, base {base}");
            }
        }
    }
    Ok(began_again)
}
