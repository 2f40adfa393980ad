//! A NATS that was killed and cannot use its index reads its files again: what a newer message of a key had replaced is there
//! once more if the newer one was trimmed. The log is not behind its end then, and yet older than PostgreSQL.

use std::path::Path;

use anyhow::{Result, ensure};
use reqwest::{Method, StatusCode};

use crate::world::{World, breakable, eventually};

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

/// The keys, and how they stand in subjects.
const KEYS: [(&str, &str); 2] = [("key", "a2V5"), ("gone", "Z29uZQ")];

/// Which of the keys have a message in the log.
async fn in_log(world: &World<'_>, stream: &str) -> Result<Vec<&'static str>> {
    let stream = world.jetstream().await?.get_stream(stream).await?;
    let subjects = &stream.cached_info().config.subjects[0];
    let mut found = Vec::new();
    for (key, word) in KEYS {
        let subject = subjects.replace('*', word);
        if stream
            .get_last_raw_message_by_subject(&subject)
            .await
            .is_ok()
        {
            found.push(key);
        }
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_replaced_and_is_in_the_log_again_is_not_believed() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on_with(&stack, &[("NATS_SHARDS", "1"), ("LOG_TRIM_LAG", "10m")]).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let old = api.write("key", "1").await?;
    let removed = api.write("gone", "1").await?;
    let new = api.write("key", "2").await?;
    api.delete("gone").await?.expect(StatusCode::NO_CONTENT)?;
    // One more is not trimmed, so that the file stays.
    let last = api.write("neighbour", "3").await?;
    world.stored("neighbour", last).await?;
    // As the janitor does later.
    world
        .sql("delete from cache_entries where key = 'gone'")
        .await?;
    let name = format!("{}_0", world.env.vars["NATS_STREAM_NAME"]);
    let stream = world.jetstream().await?.get_stream(&name).await?;
    let last = stream.cached_info().state.last_sequence;
    stream.purge().sequence(last).await?;
    assert_eq!(in_log(&world, &name).await?, [""; 0]);
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
    assert_eq!(in_log(&world, &name).await?, ["key", "gone"]);
    for (key, version) in [("key", old), ("gone", removed)] {
        let tag = format!("\"{version}\"");
        let lost = api.post_if(key, &[("if-match", &tag)], "4").await?;
        lost.expect(StatusCode::PRECONDITION_FAILED)?;
    }
    world.flush_redis().await?;
    for _ in 0..3 {
        for headers in [&[][..], &[("cache-control", "no-cache")]] {
            let read = api.ask(Method::GET, "key", headers);
            let read = read.await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == new, "{old} is back: {read:?}");
            let read = api.ask(Method::GET, "gone", headers).await?;
            read.expect(StatusCode::NOT_FOUND)?;
        }
        // Whoever looks at the shard sees that all is stored.
        api.get("neighbour").await?.expect(StatusCode::OK)?;
        world.flush_redis().await?;
    }
    // It was all about them: they were not trimmed meanwhile.
    assert_eq!(in_log(&world, &name).await?, ["key", "gone"]);
    let if_new = format!("\"{new}\"");
    let won = api.post_if("key", &[("if-match", &if_new)], "5").await?;
    won.expect(StatusCode::CREATED)?;
    let won = api.post_if("gone", &[("if-none-match", "*")], "5").await?;
    won.expect(StatusCode::CREATED)?;
    Ok(())
}
