//! `birb-nest setup`: the schema, the shard streams, the claim on Redis. Idempotent, and safe when several run at
//! once: they take turns under one lock in PostgreSQL.

use std::sync::Arc;

use birb_nest_core::Base;

use crate::{
    clock::Clock,
    config::{LogConfig, PostgresConfig, RedisConfig},
    jetstream::{BareSession, Gate},
    postgres::{Numbers, SetupSession},
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
    if let Some(Numbers {
        target: Some(target),
        ..
    }) = database.numbers().await?
    {
        return Err(database.refused(&format!(
            "its nest is being resharded: `birb-nest setup --reshard {target}` goes on with that"
        )));
    }
    database.claim_shards(log.nats_shards).await?;
    tracing::info!("schema is up to date");
    let began_again = prepare_shards(&mut database, &log, &clock).await?;
    redis::claim(redis.clone(), &clock, began_again).await?;
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
    server.prepare_rehydration().await?;
    let mut began_again = false;
    for shard in log.nats_shards.iter() {
        let recorded = database.shard_state(shard).await?;
        match (
            server.look(shard).await?.map(|look| (look.base, look.gate)),
            recorded,
        ) {
            // Workers store what is left of it and open the next life.
            (Some((base, Gate::Fenced | Gate::Resharding)), _) => {
                tracing::warn!(
                    "the log of shard {shard} is fenced in its life {base}: a running worker ends that"
                );
            }
            (Some((base, Gate::Open)), Some((recorded, _))) if base == recorded => {
                server.update(shard, base).await?
            }
            (Some((base, Gate::Open)), Some((recorded, _))) if base < recorded => {
                tracing::error!(
                    "the log of shard {shard} is of an earlier life ({base}) than PostgreSQL ({recorded}): fencing it"
                );
                server.set_gate(shard, base, Gate::Fenced).await?;
            }
            // PostgreSQL is new, or was put back: what the log still has is stored again.
            (Some((base, Gate::Open)), recorded) => {
                let known = recorded.map_or("nothing of it".to_owned(), |(base, _)| {
                    format!("its earlier life {base}")
                });
                tracing::error!(
                    "PostgresWentBack: the log of shard {shard} lives under base {base}, PostgreSQL knows {known}: storing \
                     all that is left in the log"
                );
                database.begin_life(shard, base, true).await?;
                began_again = true;
            }
            (None, recorded) => {
                let now = u64::try_from(clock.now().as_micros()).unwrap_or(0);
                let number = now.max(database.above_all_versions().await?);
                let base = Base::new(number).ok_or_else(|| {
                    OpenError::refused(server.server(), "the clock shows a time too far ahead")
                })?;
                // Recorded first: should this end in between, the next run finds no stream and begins anew.
                database.begin_life(shard, base, recorded.is_some()).await?;
                server.create(shard, base, Gate::Open).await?;
                if recorded.is_some() {
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
