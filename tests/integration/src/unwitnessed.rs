//! A log loses its tail when nobody is left who saw it: PostgreSQL alone knows how far it went. Whoever starts next notices
//! before anything is written over it.

use std::{collections::HashMap, sync::Arc};

use anyhow::{Result, ensure};
use birb_nest_stack::{Role, Stack};
use reqwest::{Method, StatusCode};

use crate::{
    lost_tail::{bases, takes_writes},
    world::{Api, World, breakable, eventually, write_all},
};

async fn two_shards(stack: &Stack) -> Result<World<'_>> {
    let mut world = World::not_set_up(stack).await?;
    world.env.set("NATS_SHARDS", "2");
    world.env.setup().await?;
    Ok(world)
}

/// Writes that are stored, then are gone from the log; nobody runs any more but the servers.
async fn lose_tail(world: &World<'_>) -> Result<HashMap<String, u64>> {
    let (api, worker) = (Arc::new(world.api().await?), world.worker().await?);
    write_all(&api, "kept", 20).await?;
    let nats = &world.stack.nats;
    let copy = nats.snapshot().await?;
    let lost = write_all(&api, "lost", 40).await?;
    world.all_stored(lost.iter()).await?;
    api.process.kill().await?;
    worker.kill().await?;
    nats.kill().await?;
    nats.restore(&copy).await?;
    nats.start().await?;
    Ok(lost)
}

async fn n_fenced(api: &Api) -> Result<u64> {
    let ready = api.send(Method::GET, "/readyz", None).await?.json()?;
    Ok(ready["fenced_shards"].as_u64().unwrap_or_default())
}

/// The first writes of every shard are certainly not written: an unknown outcome would mean that one was on its way.
async fn takes_nothing(api: &Api, keys: impl Iterator<Item = &String>) -> Result<()> {
    for key in keys {
        api.post(key, "{\"value\":\"repeated\"}")
            .await?
            .refused("UNAVAILABLE")?;
    }
    Ok(())
}

/// What was lost is there, and what is written from now on is newer.
async fn goes_on(world: &World<'_>, api: &Arc<Api>, lost: &HashMap<String, u64>) -> Result<()> {
    takes_writes(api).await?;
    world.flush_redis().await?;
    for (key, version) in lost {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == *version, "{version} is newest: {read:?}");
    }
    let again = write_all(api, "lost", 40).await?;
    ensure!(
        again.iter().all(|(key, version)| *version > lost[key]),
        "{again:?} after {lost:?}"
    );
    world.all_stored(again.iter()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_lost_while_nobody_ran_is_noticed_before_the_first_write() -> Result<()> {
    let stack = breakable().await?;
    let mut world = two_shards(&stack).await?;
    // Who cannot ask PostgreSQL in time asks again later: not what is looked at here.
    world.env.set("POSTGRES_TIMEOUT", "20s");
    let lost = lose_tail(&world).await?;
    let before = bases(&world).await?;
    let api = Arc::new(world.api().await?);
    takes_nothing(&api, lost.keys()).await?;
    ensure!(n_fenced(&api).await? == 2);
    for (key, version) in &lost {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == *version, "{version} is newest: {read:?}");
    }
    let worker = world.worker().await?;
    goes_on(&world, &api, &lost).await?;
    let after = bases(&world).await?;
    ensure!(before.iter().zip(&after).all(|(old, new)| new > old));
    worker.kill().await?;
    api.process.kill().await?;

    // The same without an API.
    let lost = lose_tail(&world).await?;
    let before = bases(&world).await?;
    let worker = world.worker().await?;
    eventually("both shards begin another life", async || {
        let after = bases(&world).await?;
        Ok(before
            .iter()
            .zip(&after)
            .all(|(old, new)| new > old)
            .then_some(()))
    })
    .await?;
    let n_fenced = worker.log()?.matches("lost its tail: fencing it").count();
    ensure!(n_fenced == 2, "{}", worker.last_lines(20));
    goes_on(&world, &Arc::new(world.api().await?), &lost).await
}

/// Nobody can ask it until it is back: then it is asked, though nothing has happened to the log since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_lost_while_nobody_ran_is_noticed_when_postgresql_is_back() -> Result<()> {
    let stack = breakable().await?;
    let world = two_shards(&stack).await?;
    let lost = lose_tail(&world).await?;
    stack.postgres.kill().await?;
    let api = Arc::new(Api::start_alone(&world.env).await?);
    ensure!(n_fenced(&api).await? == 0, "who told it?");
    stack.postgres.start().await?;
    eventually("both shards are fenced", async || {
        Ok((n_fenced(&api).await? == 2).then_some(()))
    })
    .await?;
    takes_nothing(&api, lost.keys()).await?;
    let _worker = world.worker().await?;
    goes_on(&world, &api, &lost).await
}

/// Its connection stood all the time, and nobody asks the log for its end but who takes the shard over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_lost_under_an_heir_that_stood_by_is_noticed_when_it_takes_over() -> Result<()> {
    let mut world = World::not_set_up(birb_nest_stack::shared().await?).await?;
    world.env.set("NATS_SHARDS", "1");
    world.env.setup().await?;
    let (api, owner) = (Arc::new(world.api().await?), world.worker().await?);
    let lost = write_all(&api, "lost", 40).await?;
    world.all_stored(lost.iter()).await?;
    let heir = world.env.replica()?.start(Role::Worker).await?;
    let before = bases(&world).await?;
    api.process.kill().await?;
    // It keeps the shard for as long as it stands still.
    owner.pause().await?;
    let jetstream = world.jetstream().await?;
    let name = format!("{}_0", world.env.vars["NATS_STREAM_NAME"]);
    let stream = jetstream.get_stream(&name).await?;
    jetstream.delete_stream(&name).await?;
    jetstream
        .create_stream(stream.cached_info().config.clone())
        .await?;
    owner.kill().await?;
    eventually("the shard begins another life", async || {
        Ok((bases(&world).await? > before).then_some(()))
    })
    .await?;
    let log = heir.log()?;
    ensure!(
        log.contains("it lives under base") && !log.contains("lost the log"),
        "{log}"
    );
    goes_on(&world, &Arc::new(world.api().await?), &lost).await
}
