//! A message of a newer format: old processes wait for it to be taken care of, and serve nothing older in its place.

use anyhow::{Context, Result};
use async_nats::jetstream;
use birb_nest_core::Key;
use reqwest::StatusCode;

use crate::{
    shown::{is_counted, is_told},
    world::{World, eventually},
};

/// What no release so far can read, and what it says of it.
const HELD: [(&[u8], &str); 2] = [
    (
        &[2, 9, 9],
        "message format 2 is newer than this release reads",
    ),
    (&[1, 1, 0], "message is cut short or garbled"),
];

/// Writes `key` to the log in these words; returns the version.
async fn write_what_is_held(world: &World<'_>, key: &str, words: &'static [u8]) -> Result<u64> {
    let jetstream = world.jetstream().await?;
    let shards = world.config::<birb_nest_store::LogConfig>()?.nats_shards;
    let key = Key::parse(key)?;
    let name = format!(
        "{}_{}",
        world.env.vars["NATS_STREAM_NAME"],
        shards.shard_of(&key)
    );
    let stream = jetstream.get_stream(&name).await?;
    let subject = stream.cached_info().config.subjects[0].replace('*', &key.to_token());
    let sequence = publish(&jetstream, subject, words).await?;
    let base = world
        .sql(&format!(
            "select base from shard_state where shard = {}",
            shards.shard_of(&key).index()
        ))
        .await?;
    Ok(base.trim().parse::<u64>()? + sequence)
}

async fn publish(
    jetstream: &jetstream::Context,
    subject: String,
    words: &'static [u8],
) -> Result<u64> {
    let acknowledgement = jetstream.publish(subject, words.into()).await?;
    Ok(acknowledgement.await?.sequence)
}

#[tokio::test]
async fn a_message_of_a_newer_format_is_held_and_not_lost() -> Result<()> {
    for (words, why) in HELD {
        is_held(words, why).await.context(why)?;
    }
    Ok(())
}

async fn is_held(words: &'static [u8], why: &str) -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    write_what_is_held(&world, "held", words).await?;
    let worker = world.worker().await?;
    eventually("the worker says why it waits", async || {
        Ok(worker.log()?.contains(why).then_some(()))
    })
    .await?;
    let lost = "birbnest_worker_shards_lost_total";
    is_counted(&world.env.worker_url(), lost, "log_held").await?;
    let dead = world.sql("select count(*) from dead_keys").await?;
    assert_eq!(dead.trim(), "0");
    assert!(world.log_depth().await?.0 >= 1, "it was dropped");
    // Other shards go on.
    for n in 0..16 {
        api.write(&format!("k{n}"), "1").await?;
    }
    eventually("the other shards are stored", async || {
        let rows = world.sql("select count(*) from cache_entries").await?;
        Ok((rows.trim().parse::<u32>()? >= 10).then_some(()))
    })
    .await
}

#[tokio::test]
async fn an_old_api_serves_nothing_in_place_of_a_message_of_a_newer_format() -> Result<()> {
    for (words, why) in HELD {
        nothing_in_its_place(words).await.context(why)?;
    }
    Ok(())
}

async fn nothing_in_its_place(words: &'static [u8]) -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let old = api.write("k", "\"old\"").await?;
    world.stored("k", old).await?;
    // There is a row, and nothing in Redis.
    world.flush_redis().await?;
    let newer = write_what_is_held(&world, "k", words).await?;
    for _ in 0..2 {
        let read = api
            .get("k")
            .await?
            .expect(StatusCode::SERVICE_UNAVAILABLE)?;
        assert_eq!(read.json()?["code"], "UNAVAILABLE");
        let body = format!(
            "{{\"keys\":[\"k\",{}]}}",
            (0..50)
                .map(|n| format!("\"n{n}\""))
                .collect::<Vec<_>>()
                .join(",")
        );
        let batch = api
            .send(reqwest::Method::POST, "/v1/cache/batch/get", Some(body))
            .await?
            .expect(StatusCode::OK)?
            .json()?;
        assert_eq!(batch["errors"]["k"]["code"], "UNAVAILABLE", "{batch}");
        assert_eq!(batch["missing"].as_array().map(Vec::len), Some(50));
    }
    is_counted(&api.url, "birbnest_errors_total", "log_held").await?;
    is_told(&api.process, "the log holds the newest write of this key").await?;
    // A worker of the newer release stores it: its row is as good as any, though the message stays for a while.
    worker.kill().await?;
    world
        .sql(&format!(
            "update cache_entries set version = {newer}, value = convert_to('\"newer\"', 'UTF8') where key = 'k'"
        ))
        .await?;
    assert_eq!(api.read("k").await?.as_deref(), Some("\"newer\""));
    Ok(())
}
