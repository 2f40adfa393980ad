//! Whoever is led to a PostgreSQL that is a standby neither reads there nor owns anything, and says so.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::{Role, Stack};
use birb_nest_store::LogConfig;
use reqwest::{Method, StatusCode};

use crate::{
    dead_letters::n_ever_dead,
    shown::{is_shown, is_warned, lacks, metric},
    world::{Api, World, breakable, eventually},
};

const STANDBY: &str = "it is a standby; POSTGRES_HOST must name the primary";

/// Starts the PostgreSQL of `stack`, which must not run, as a standby; returns what makes it one.
async fn start_as_standby(stack: &Stack) -> Result<PathBuf> {
    let signal = stack.root().join("postgres/data/standby.signal");
    std::fs::write(&signal, "").with_context(|| format!("failed to write {}", signal.display()))?;
    stack.postgres.start().await?;
    let is_standby = stack.psql("postgres", "select pg_is_in_recovery()").await?;
    ensure!(is_standby == "t", "it is a primary");
    Ok(signal)
}

/// When the consumer of each shard was made.
async fn made_at(world: &World<'_>) -> Result<BTreeMap<String, String>> {
    let (jetstream, log) = (world.jetstream().await?, world.config::<LogConfig>()?);
    let mut made_at = BTreeMap::new();
    for shard in log.nats_shards.iter() {
        let stream = jetstream
            .get_stream(format!("{}_{shard}", log.nats_stream_name))
            .await?;
        let consumer = stream.consumer_info(&log.nats_consumer_name).await?;
        made_at.insert(consumer.stream_name, consumer.created.to_string());
    }
    Ok(made_at)
}

/// Neither by processes whose server becomes one, nor by one that begins with it.
#[tokio::test]
async fn a_standby_is_not_taken_for_the_primary() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    stack.postgres.stop().await?;
    let signal = start_as_standby(&stack).await?;
    let during = api.write("during", "1").await?;
    // What the others say may be of the time when the server was away. This one has never seen it otherwise.
    let fresh = Api::start_alone(&world.env.replica()?).await?;
    for api in [&fresh, &api] {
        api.get("never").await?.refused("UNAVAILABLE")?;
        is_warned(&api.process, STANDBY).await?;
        is_shown(&api.url, "birbnest_dependency_up", "postgres", 0.0).await?;
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        ensure!(health["checks"]["database"] == "down", "{health}");
    }
    is_warned(&worker, STANDBY).await?;
    stack.postgres.stop().await?;
    std::fs::remove_file(&signal)?;
    stack.postgres.start().await?;
    world.stored("during", during).await?;
    for api in [&fresh, &api] {
        is_shown(&api.url, "birbnest_dependency_up", "postgres", 1.0).await?;
        api.get("never").await?.expect(StatusCode::NOT_FOUND)?;
    }
    assert_eq!(n_ever_dead(&world).await?, 0);
    Ok(())
}

/// A standby gives out locks like the primary: a worker there would own shards that have owners, and take their
/// consumers.
#[tokio::test]
async fn a_worker_that_is_led_to_a_standby_owns_nothing() -> Result<()> {
    let (stack, elsewhere) = tokio::try_join!(breakable(), breakable())?;
    let world = World::on(&stack).await?;
    // A standby that lags: what is stored from now on is not there.
    stack.postgres.stop().await?;
    let copy = stack.postgres.snapshot().await?;
    stack.postgres.start().await?;
    elsewhere.postgres.stop().await?;
    elsewhere.postgres.restore(&copy).await?;
    start_as_standby(&elsewhere).await?;
    let (api, owner) = (world.api().await?, world.worker().await?);
    eventually("all shards have an owner", async || {
        let owned = metric(&world.env.worker_url(), "birbnest_shard_owned").await?;
        Ok((owned.values().sum::<f64>() == 8.0).then_some(()))
    })
    .await?;
    let before = made_at(&world).await?;

    let mut env = world.env.replica()?;
    env.set("POSTGRES_PORT", elsewhere.postgres.port().to_string());
    let astray = env.spawn(Role::Worker)?;
    let said = eventually("it has tried to count the workers", async || {
        let log = astray.log()?;
        let has_tried = log.contains("cannot count the workers") || log.contains("owning shard");
        Ok(has_tried.then_some(log))
    })
    .await?;
    ensure!(!said.contains("owning shard"), "{said}");
    is_warned(&astray, STANDBY).await?;
    for n in 0..40 {
        let key = format!("k{n}");
        let version = api.write(&key, "1").await?;
        world.stored(&key, version).await?;
    }
    lacks(&env.worker_url(), "database").await?;
    let after = made_at(&world).await?;
    ensure!(before == after, "made at {before:?}, and at {after:?}");
    let (said, of_owner) = (astray.log()?, owner.log()?);
    ensure!(!said.contains("owning shard"), "{said}");
    ensure!(!said.contains("PostgresWentBack"), "{said}");
    ensure!(!of_owner.contains("lost shard"), "{of_owner}");
    Ok(())
}
