//! Reads see every acknowledged write, wherever it is on its way.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Result, ensure};
use reqwest::StatusCode;

use crate::world::{PATIENCE, World, breakable, eventually};

#[tokio::test]
async fn read_your_writes_after_flushall() -> Result<()> {
    let world = World::shared().await?;
    let (writer, reader) = (
        world.api().await?,
        crate::world::Api::start(&world.env.replica()?).await?,
    );
    for round in 0..20 {
        let version = writer.write("k", &round.to_string()).await?;
        world.flush_redis().await?;
        let answer = reader.get("k").await?.expect(StatusCode::OK)?;
        assert_eq!(answer.version()?, version);
        assert_eq!(answer.header("birb-source"), "log");
        assert_eq!(answer.header("etag"), format!("\"{version}\""));
        // That read filled Redis, which is emptied once more if its missing marker was noticed since.
        eventually("a read fills Redis", async || {
            let source = reader.get("k").await?.header("birb-source") == "redis";
            Ok(source.then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_is_in_the_log_is_read_without_postgresql() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    api.write("pending", "1").await?;
    world.flush_redis().await?;
    stack.postgres.kill().await?;
    let answer = api.get("pending").await?.expect(StatusCode::OK)?;
    assert_eq!(answer.header("birb-source"), "log");
    Ok(())
}

/// The worker stores and trims all the time; each write is read while it moves from the log to PostgreSQL. Asked in
/// the other order, or trimmed before the commit, a read would find it in neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_is_never_invisible_on_its_way_from_the_log_to_postgresql() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let _worker = world.eager_worker().await?;
    let done = Arc::new(AtomicBool::new(false));
    let mut redis = world.redis().await?;
    let flusher = tokio::spawn({
        let done = done.clone();
        async move {
            while !done.load(Ordering::Relaxed) {
                redis::cmd("FLUSHDB").exec_async(&mut redis).await?;
            }
            anyhow::Ok(())
        }
    });
    let clients = (0..8).map(|client| {
        let api = api.clone();
        tokio::spawn(async move {
            for round in 0..40u64 {
                let key = format!("k{client}");
                let written = api.write(&key, &round.to_string()).await?;
                for _ in 0..3 {
                    let answer = api.get(&key).await?.expect(StatusCode::OK)?;
                    ensure!(
                        answer.version()? == written,
                        "wrote {written}, then read {answer:?}"
                    );
                }
            }
            anyhow::Ok(())
        })
    });
    for client in futures::future::join_all(clients).await {
        client??;
    }
    done.store(true, Ordering::Relaxed);
    flusher.await??;
    let sources = api.metric("birbnest_cache_reads_total").await?;
    assert!(
        sources.keys().any(|labels| labels.contains("postgres")),
        "no read met a trimmed log, so nothing was shown: {sources:?}"
    );
    Ok(())
}

#[tokio::test]
async fn rows_are_in_postgresql_within_a_second() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    api.write("warm", "0").await?;
    world.stored("warm", 1).await?;
    let (mut version, mut best) = (0, PATIENCE);
    // The best of some counts: each look at PostgreSQL takes its time, on a machine that does other things.
    for _ in 0..5 {
        let started = std::time::Instant::now();
        version = api.write("k", "\"v\"").await?;
        world.stored("k", version).await?;
        best = best.min(started.elapsed());
    }
    assert!(best.as_millis() < 1000, "{best:?}");
    assert_eq!(
        world.row("k").await?,
        Some((version, false, "\"v\"".to_owned()))
    );
    let deleted = api.delete("k").await?.expect(StatusCode::NO_CONTENT)?;
    assert_eq!(deleted.body, "");
    eventually("the tombstone is stored", async || {
        Ok(world.row("k").await?.filter(|row| row.1 && row.0 > version))
    })
    .await?;
    api.get("k").await?.expect(StatusCode::NOT_FOUND)?;
    api.delete("k").await?.expect(StatusCode::NOT_FOUND)?;
    Ok(())
}

#[tokio::test]
async fn a_writes_trace_context_travels_with_it_into_the_log() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let client = reqwest::Client::new();
    for (key, sent) in [("traced", trace), ("nonsense", "00-nonsense")] {
        let request = client.post(format!("{}/v1/cache/{key}", api.url));
        let request = request
            .header("content-type", "application/json")
            .header("traceparent", sent);
        assert_eq!(
            request.body("{\"value\":1}").send().await?.status(),
            StatusCode::CREATED
        );
    }
    let jetstream = world.jetstream().await?;
    let mut found = Vec::new();
    for shard in 0..8 {
        let stream = jetstream
            .get_stream(format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]))
            .await?;
        for sequence in 1..=stream.cached_info().state.last_sequence {
            let message = stream.direct_get(sequence).await?;
            found.extend(
                message
                    .headers
                    .get("traceparent")
                    .map(|value| value.as_str().to_owned()),
            );
        }
    }
    assert_eq!(found, [trace]);
    Ok(())
}
