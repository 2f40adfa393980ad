//! A NATS that was killed and cannot use its index reads its files again: what a newer message of a key had replaced is there
//! once more if the newer one was trimmed. The log is not behind its end then, and yet older than PostgreSQL.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::world::{Api, World, breakable, eventually};

/// As a NATS leaves it that is killed between removing and writing it, which it does whenever something is trimmed.
fn remove_index(streams: &Path) -> Result<usize> {
    let mut n_removed = 0;
    for entry in std::fs::read_dir(streams)? {
        let path = entry?.path();
        if path.is_dir() {
            n_removed += remove_index(&path)?;
        } else if path.ends_with("msgs/index.db") {
            std::fs::remove_file(&path)?;
            n_removed += 1;
        }
    }
    Ok(n_removed)
}

async fn shard_of(api: &Api, key: &str) -> Result<u64> {
    let path = format!("/v1/debug/{key}");
    let found = api.send(Method::GET, &path, None);
    let found: Value = found.await?.expect(StatusCode::OK)?.json()?;
    found["shard"].as_u64().context("a key has a shard")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_replaced_and_is_in_the_log_again_is_not_believed() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let old = api.write("key", "1").await?;
    let new = api.write("key", "2").await?;
    // One more of its shard is not trimmed, so that the file stays.
    let shard = shard_of(&api, "key").await?;
    let mut n = 0;
    let (neighbour, version) = loop {
        let key = format!("neighbour{n}");
        if shard_of(&api, &key).await? == shard {
            let version = api.write(&key, "3").await?;
            break (key, version);
        }
        n += 1;
    };
    world.stored("key", new).await?;
    world.stored(&neighbour, version).await?;
    let name = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
    let stream = world.jetstream().await?.get_stream(&name).await?;
    let last = stream.cached_info().state.last_sequence;
    stream.purge().sequence(last - (version - new) + 1).await?;
    stack.nats.kill().await?;
    ensure!(
        remove_index(stack.root())? > 0,
        "NATS has no index any more"
    );
    stack.nats.start().await?;
    // Until the log is back.
    eventually("a write succeeds", async || {
        let answer = api.post("again", "{\"value\":0}").await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await?;
    let if_old = format!("\"{old}\"");
    let lost = api.post_if("key", &[("if-match", &if_old)], "4").await?;
    lost.expect(StatusCode::PRECONDITION_FAILED)?;
    world.flush_redis().await?;
    for _ in 0..3 {
        for headers in [&[][..], &[("cache-control", "no-cache")]] {
            let read = api.ask(Method::GET, "key", headers);
            let read = read.await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == new, "{old} is back: {read:?}");
        }
        // Whoever looks at the shard sees that all is stored.
        api.get(&neighbour).await?.expect(StatusCode::OK)?;
        world.flush_redis().await?;
    }
    let if_new = format!("\"{new}\"");
    let won = api.post_if("key", &[("if-match", &if_new)], "5").await?;
    won.expect(StatusCode::CREATED)?;
    Ok(())
}
