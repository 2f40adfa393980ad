//! A server that is down makes the nest slower or says 503; it never makes it wrong.

use std::sync::Arc;

use anyhow::{Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::{
    shown::{is_shown, is_told, lacks},
    world::{Answer, Api, World, breakable, eventually, write_all},
};

async fn comes_true(api: &Api, what: &str, status: &str, check: &str) -> Result<()> {
    let is_up = status == "healthy";
    eventually(what, async || {
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["status"] == status
            && health["checks"][check] == if is_up { "ok" } else { "down" })
        .then_some(()))
    })
    .await?;
    let dependency = match check {
        "database" => "dependency=\"postgres\"",
        "nats" => "dependency=\"nats\"",
        _ => "dependency=\"redis\"",
    };
    let value = if is_up { 1.0 } else { 0.0 };
    is_shown(&api.url, "birbnest_dependency_up", dependency, value).await
}

fn refused(answer: Answer) -> Result<()> {
    let answer = answer.expect(StatusCode::SERVICE_UNAVAILABLE)?;
    assert_eq!(answer.json()?["code"], "UNAVAILABLE");
    assert_ne!(answer.header("retry-after"), "");
    Ok(())
}

#[tokio::test]
async fn without_redis_everything_goes_on() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let first = api.write("before", "1").await?;
    stack.redis.kill().await?;
    assert_eq!(api.read("before").await?.as_deref(), Some("1"));
    let answer = api
        .post("during", "{\"value\":2}")
        .await?
        .expect(StatusCode::CREATED)?;
    assert_eq!(answer.header("birb-cache"), "pending");
    assert_eq!(api.read("during").await?.as_deref(), Some("2"));
    world.stored("during", answer.version()?).await?;
    world.stored("before", first).await?;
    comes_true(&api, "degraded", "degraded", "redis").await?;
    api.send(Method::GET, "/readyz", None)
        .await?
        .expect(StatusCode::OK)?;
    stack.redis.start().await?;
    comes_true(&api, "healthy", "healthy", "redis").await?;
    is_told(&api.process, "lost Redis at").await?;
    is_told(&api.process, " is ready").await?;
    for (key, value) in [("before", "1"), ("during", "2")] {
        assert_eq!(api.read(key).await?.as_deref(), Some(value));
    }
    eventually("Redis answers again", async || {
        Ok((api.get("during").await?.header("birb-source") == "redis").then_some(()))
    })
    .await
}

#[tokio::test]
async fn without_postgresql_writes_and_hits_go_on_and_misses_are_503() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let worker = world.eager_worker().await?;
    let version = api.write("stored", "1").await?;
    api.write("hit", "1").await?;
    world.stored("stored", version).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    redis::cmd("DEL")
        .arg("birb:e:stored")
        .exec_async(&mut world.redis().await?)
        .await?;
    stack.postgres.kill().await?;
    assert_eq!(api.read("hit").await?.as_deref(), Some("1"));
    refused(api.get("stored").await?)?;
    refused(api.get("never").await?)?;
    let body = r#"{"keys":["hit","stored","never"]}"#.to_owned();
    let batch = api
        .send(Method::POST, "/v1/cache/batch/get", Some(body))
        .await?
        .expect(StatusCode::OK)?
        .json()?;
    assert_eq!(batch["missing"], json!([]));
    assert_eq!(
        batch["errors"],
        json!({"stored": {"code": "UNAVAILABLE"}, "never": {"code": "UNAVAILABLE"}})
    );
    let during = api.write("during", "2").await?;
    assert_eq!(api.read("during").await?.as_deref(), Some("2"));
    // Whether there is something to delete cannot be known.
    api.delete("stored").await?.expect(StatusCode::NO_CONTENT)?;
    api.get("stored").await?.expect(StatusCode::NOT_FOUND)?;
    comes_true(&api, "degraded", "degraded", "database").await?;
    api.send(Method::GET, "/readyz", None)
        .await?
        .expect(StatusCode::OK)?;
    stack.postgres.start().await?;
    world.stored("during", during).await?;
    comes_true(&api, "healthy", "healthy", "database").await?;
    is_told(&api.process, "lost PostgreSQL at").await?;
    is_told(&api.process, " is ready").await?;
    api.get("stored").await?.expect(StatusCode::NOT_FOUND)?;
    api.get("never").await?.expect(StatusCode::NOT_FOUND)?;
    drop(worker);
    Ok(())
}

/// An API that did not see it being written takes it for the newest only if PostgreSQL says so: its server may have been killed,
/// and have messages again that were replaced since.
#[tokio::test]
async fn what_a_log_had_before_a_session_is_unconfirmed_without_postgresql() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let writer = Arc::new(world.api().await?);
    let written = write_all(&writer, "k", 40).await?;
    writer.write("gone", "1").await?;
    writer
        .delete("gone")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    writer
        .post("short", r#"{"value":1,"ttl":1}"#)
        .await?
        .expect(StatusCode::CREATED)?;
    let reader = Api::start(&world.env.replica()?).await?;
    stack.postgres.kill().await?;
    world.flush_redis().await?;
    let keys: Vec<&String> = written.keys().collect();
    // A few keys are looked up one by one, many at once.
    for keys in [&keys[..5], &keys[..]] {
        let body = json!({ "keys": keys }).to_string();
        let batch = reader
            .send(Method::POST, "/v1/cache/batch/get", Some(body))
            .await?
            .expect(StatusCode::OK)?;
        assert_eq!(batch.header("birb-cache"), "unconfirmed");
        let entries = &batch.json()?["entries"];
        ensure!(entries.as_object().map(|found| found.len()) == Some(keys.len()));
    }
    for (key, version) in written.iter().take(5) {
        let read = reader.get(key).await?.expect(StatusCode::OK)?;
        assert_eq!(read.header("birb-cache"), "unconfirmed", "{read:?}");
        assert_eq!(read.version()?, *version);
        let kept = world.in_redis(key).await?;
        ensure!(!kept.is_some_and(|kept| kept.starts_with('E')), "{key}");
        let strong = [("cache-control", "no-cache")];
        refused(reader.ask(Method::GET, key, &strong).await?)?;
    }
    // They may have been written again since.
    refused(reader.get("gone").await?)?;
    eventually("it has expired", async || {
        let read = reader.get("short").await?;
        if read.status == StatusCode::OK {
            assert_eq!(read.header("birb-cache"), "unconfirmed");
            return Ok(None);
        }
        refused(read).map(Some)
    })
    .await?;
    // Who was there knows better.
    for (key, version) in written.iter().take(5) {
        let read = writer.get(key).await?.expect(StatusCode::OK)?;
        assert_eq!(read.header("birb-cache"), "", "{read:?}");
        assert_eq!(read.version()?, *version);
    }
    for key in ["gone", "short"] {
        writer.get(key).await?.expect(StatusCode::NOT_FOUND)?;
    }
    // Emptied once more, it would lose what is read then.
    world.empty_redis().await?;
    stack.postgres.start().await?;
    comes_true(&reader, "healthy", "healthy", "database").await?;
    for (key, version) in &written {
        let read = reader.get(key).await?.expect(StatusCode::OK)?;
        assert_eq!(read.header("birb-cache"), "", "{read:?}");
        assert_eq!(read.version()?, *version);
        let kept = world.in_redis(key).await?;
        ensure!(kept.is_some_and(|kept| kept.starts_with('E')), "{key}");
    }
    for key in ["gone", "short"] {
        reader.get(key).await?.expect(StatusCode::NOT_FOUND)?;
    }
    Ok(())
}

#[tokio::test]
async fn without_nats_hits_go_on_and_nothing_unconfirmed_is_called_absent() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let version = api.write("stored", "1").await?;
    api.write("hit", "1").await?;
    world.stored("stored", version).await?;
    redis::cmd("DEL")
        .arg("birb:e:stored")
        .exec_async(&mut world.redis().await?)
        .await?;
    stack.nats.kill().await?;
    comes_true(&api, "unhealthy", "unhealthy", "nats").await?;
    lacks(&world.env.worker_url(), "nats").await?;
    assert_eq!(api.read("hit").await?.as_deref(), Some("1"));
    let unconfirmed = api.get("stored").await?.expect(StatusCode::OK)?;
    assert_eq!(unconfirmed.header("birb-cache"), "unconfirmed");
    refused(api.get("never").await?)?;
    refused(api.post("k", "{\"value\":1}").await?)?;
    refused(api.delete("hit").await?)?;
    let ready = api
        .send(Method::GET, "/readyz", None)
        .await?
        .expect(StatusCode::SERVICE_UNAVAILABLE)?;
    assert_eq!(ready.json()?["missing"], json!(["nats"]));
    api.send(Method::GET, "/livez", None)
        .await?
        .expect(StatusCode::OK)?;
    stack.nats.start().await?;
    comes_true(&api, "healthy", "healthy", "nats").await?;
    is_told(&api.process, "lost the log: NATS at").await?;
    is_told(&api.process, "log is ready: NATS at").await?;
    api.get("never").await?.expect(StatusCode::NOT_FOUND)?;
    api.write("k", "1").await?;
    Ok(())
}

#[tokio::test]
async fn an_api_that_starts_before_its_servers_waits_for_them() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    stack.stop().await?;
    let process = world.env.spawn(birb_nest_stack::Role::Api)?;
    let url = format!("{}/readyz", world.env.api_url());
    eventually("it answers, and is not ready", async || {
        Ok(match reqwest::get(&url).await {
            Ok(answer) if answer.status() == StatusCode::SERVICE_UNAVAILABLE => {
                Some(answer.text().await?)
            }
            _ => None,
        })
    })
    .await
    .map(|body| {
        assert_eq!(
            body,
            r#"{"ready":false,"missing":["nats","redis","database"],"fenced_shards":0}"#
        )
    })?;
    stack.start().await?;
    eventually("it is ready", async || {
        Ok((reqwest::get(&url).await?.status() == StatusCode::OK).then_some(()))
    })
    .await?;
    let status = process
        .terminate(std::time::Duration::from_secs(20))
        .await?;
    assert_eq!(status.code(), Some(0));
    Ok(())
}
