//! Reads with `Cache-Control: no-cache` do not believe Redis, and put right what it holds.

use anyhow::{Context, Result};
use reqwest::{Method, StatusCode};

use crate::{
    conditions::trimmed,
    world::{Answer, Api, World, breakable, eventually},
};

async fn fresh(api: &Api, key: &str) -> Result<Answer> {
    api.ask(
        Method::GET,
        key,
        &[("cache-control", "max-age=0, No-Cache")],
    )
    .await
}

/// Has Redis hold `bytes` for `key`.
async fn lie(world: &World<'_>, key: &str, bytes: &str) -> Result<()> {
    redis::cmd("SET")
        .arg(format!("birb:e:{key}"))
        .arg(bytes)
        .exec_async(&mut world.redis().await?)
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_fresh_read_sees_past_a_redis_that_lies_and_puts_it_right() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    api.write("k", "1").await?;
    let older = world.in_redis("k").await?.context("cached")?;
    for source in ["log", "postgres"] {
        let newer = api.write("k", "2").await?;
        let worker = if source == "postgres" {
            let worker = world.eager_worker().await?;
            trimmed(&world).await?;
            Some(worker)
        } else {
            None
        };
        lie(&world, "k", &older).await?;
        assert_eq!(api.read("k").await?.as_deref(), Some("1"), "no lie");
        let answer = fresh(&api, "k").await?.expect(StatusCode::OK)?;
        assert_eq!(answer.version()?, newer);
        assert_eq!(answer.header("birb-source"), source);
        assert_eq!(answer.header("birb-cache"), "");
        assert_eq!(api.read("k").await?.as_deref(), Some("2"));
        drop(worker);
    }
    // A value where there is none: deleted, and never written.
    api.delete("k").await?.expect(StatusCode::NO_CONTENT)?;
    let mut oldest = older;
    oldest.replace_range(1..17, "0000000000000001");
    for key in ["k", "never"] {
        lie(&world, key, &oldest).await?;
        api.get(key).await?.expect(StatusCode::OK)?;
        fresh(&api, key).await?.expect(StatusCode::NOT_FOUND)?;
        api.get(key).await?.expect(StatusCode::NOT_FOUND)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_fresh_read_leaves_what_is_right_in_redis() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    api.write("k", "1").await?;
    let before = world.in_redis("k").await?.context("cached")?;
    fresh(&api, "k").await?.expect(StatusCode::OK)?;
    assert_eq!(world.in_redis("k").await?.as_deref(), Some(before.as_str()));
    Ok(())
}

#[tokio::test]
async fn a_fresh_read_needs_the_log_and_says_if_redis_stays_behind() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    api.write("deleted", "1").await?;
    api.delete("deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    // What is in the log needs no PostgreSQL; what is not does.
    stack.postgres.kill().await?;
    fresh(&api, "k").await?.expect(StatusCode::OK)?;
    fresh(&api, "never").await?.refused("UNAVAILABLE")?;
    stack.postgres.start().await?;
    stack.redis.kill().await?;
    let answer = fresh(&api, "k").await?.expect(StatusCode::OK)?;
    assert_eq!(answer.version()?, version);
    assert_eq!(answer.header("birb-cache"), "pending");
    let absent = fresh(&api, "deleted")
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    assert_eq!(absent.header("birb-cache"), "pending");
    stack.redis.start().await?;
    stack.nats.kill().await?;
    eventually("other reads believe the row", async || {
        let answer = api.get("k").await?;
        Ok((answer.header("birb-cache") == "unconfirmed").then_some(()))
    })
    .await?;
    fresh(&api, "k").await?.refused("UNAVAILABLE")
}
