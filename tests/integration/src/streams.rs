//! What the streams of shards are asked to drop, and what becomes of their settings.

use std::{collections::HashMap, sync::Arc};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::{Process, Role, shared};
use futures::StreamExt;
use serde_json::Value;

use crate::{
    lost_tail::{bases, takes_writes},
    reshard::{is_out_of_date, patient, reshard_ends},
    shown::counted,
    world::{Api, PATIENCE, World, eventually, write_all},
};

/// What the server is asked to drop from streams.
struct Purges {
    client: async_nats::Client,
    asked: async_nats::Subscriber,
}

impl Purges {
    const ALL: &str = "$JS.API.STREAM.PURGE";

    async fn begin(world: &World<'_>) -> Result<Self> {
        let url = format!("nats://127.0.0.1:{}", world.stack.nats.port());
        let client = async_nats::connect(url).await?;
        let asked = client.subscribe(format!("{}.>", Self::ALL)).await?;
        client.flush().await?;
        Ok(Self { client, asked })
    }

    /// From which sequence on messages were to be kept in streams of this nest, by stream.
    async fn end(mut self, world: &World<'_>) -> Result<Vec<(String, Option<u64>)>> {
        // Two tokens: nobody answers that.
        let end = format!("{}.THE.END", Self::ALL);
        self.client.publish(end.clone(), "".into()).await?;
        self.client.flush().await?;
        let ours = format!("{}.{}_", Self::ALL, world.env.vars["NATS_STREAM_NAME"]);
        let mut purges = Vec::new();
        loop {
            let next = tokio::time::timeout(PATIENCE, self.asked.next()).await?;
            let message = next.context("the server goes on telling")?;
            if message.subject.as_str() == end {
                return Ok(purges);
            }
            if message.subject.starts_with(&ours) {
                let asked: Value = serde_json::from_slice(&message.payload)?;
                purges.push((message.subject.to_string(), asked["seq"].as_u64()));
            }
        }
    }
}

/// An API, and a worker that owns every shard and drops from the log at once what it has stored.
async fn running(world: &World<'_>) -> Result<(Arc<Api>, Process)> {
    let api = Arc::new(world.api().await?);
    let mut env = world.env.replica()?;
    env.set("LOG_TRIM_LAG", "1ms")
        .set("LOG_TRIM_INTERVAL", "20ms");
    let worker = env.start(Role::Worker).await?;
    let n_shards: f64 = world.env.vars["NATS_SHARDS"].parse()?;
    let url = env.worker_url();
    eventually("it owns every shard", async || {
        let owned = counted(&url, "birbnest_shard_owned", "").await?;
        Ok((owned == n_shards).then_some(()))
    })
    .await?;
    Ok((api, worker))
}

/// Waits until `versions` are stored and nothing is left in the log.
async fn is_trimmed(world: &World<'_>, versions: &HashMap<String, u64>) -> Result<()> {
    world.all_stored(versions.iter()).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await
}

/// Servers that are supported take "keep from the first message" for "keep none" (nats-server#8241), and drop what nobody
/// has stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_purged_of_a_life_of_which_nothing_is_stored() -> Result<()> {
    let mut world = patient(shared().await?).await?;
    let purges = Purges::begin(&world).await?;
    world.env.set("NATS_SHARDS", "8");
    let (api, worker) = running(&world).await?;
    is_trimmed(&world, &write_all(&api, "k", 3).await?).await?;
    // Streams in which never was a message, and new ones.
    reshard_ends(&world.env, 12, 0).await?;
    is_out_of_date(&api.process, 12).await?;
    is_out_of_date(&worker, 12).await?;
    world.env.set("NATS_SHARDS", "12");
    let (api, worker) = running(&world).await?;
    is_trimmed(&world, &write_all(&api, "k", 60).await?).await?;

    worker.kill().await?;
    api.process.kill().await?;
    let jetstream = world.jetstream().await?;
    for shard in 0..12 {
        let name = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
        jetstream.delete_stream(name).await?;
    }
    world.env.setup().await?;
    let stale = "select shard from shard_state where told_to < base";
    let stale = world.sql(stale).await?;
    ensure!(stale.trim().is_empty(), "of an earlier life: {stale}");
    let (api, _worker) = running(&world).await?;
    is_trimmed(&world, &write_all(&api, "k", 60).await?).await?;
    let purges = purges.end(&world).await?;
    ensure!(!purges.is_empty(), "nothing was watched");
    let of_all: Vec<_> = purges
        .iter()
        .filter(|(_, seq)| seq.is_none_or(|seq| seq <= 1))
        .collect();
    ensure!(of_all.is_empty(), "everything was to go: {of_all:?}");
    Ok(())
}

async fn sizes(world: &World<'_>) -> Result<Vec<i64>> {
    let jetstream = world.jetstream().await?;
    let mut sizes = Vec::new();
    for shard in 0..8 {
        let name = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
        let stream = jetstream.get_stream(name).await?;
        sizes.push(stream.cached_info().config.max_bytes);
    }
    Ok(sizes)
}

/// A process knows the settings that it was started with, and `setup` has given the stream others since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_and_a_new_life_leave_the_size_of_a_stream_as_it_is() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let versions = write_all(&api, "k", 40).await?;
    let mut env = world.env.clone();
    env.set("NATS_STREAM_MAX_BYTES", "24MiB");
    env.setup().await?;
    let larger = vec![24 << 20; 8];
    ensure!(sizes(&world).await? == larger, "setup changes them");
    let before = bases(&world).await?;
    // As if the log had lost its tail.
    world
        .sql("update shard_state set applied_to = applied_to + 1000")
        .await?;
    let _worker = world.worker().await?;
    eventually("every shard begins another life", async || {
        let now = bases(&world).await?;
        Ok(before
            .iter()
            .zip(&now)
            .all(|(old, new)| new > old)
            .then_some(()))
    })
    .await?;
    takes_writes(&api).await?;
    ensure!(sizes(&world).await? == larger, "{:?}", sizes(&world).await?);
    world.all_stored(versions.iter()).await
}
