//! Nothing that comes late to Redis changes anything: not a stalled writer's value, not a stalled reader's.

use anyhow::{Result, ensure};
use birb_nest_stack::{Environment, Proxy};
use reqwest::StatusCode;

use crate::{
    shown::{counted, is_counted, is_told},
    world::{Answer, Api, World, eventually},
};

/// An API whose links to NATS and Redis can be stalled.
struct Stalled {
    api: std::sync::Arc<Api>,
    nats: Proxy,
    redis: Proxy,
}

impl Stalled {
    async fn start(world: &World<'_>) -> Result<Self> {
        let (nats, redis) = (world.stack.nats.proxy()?, world.stack.redis.proxy()?);
        let mut env: Environment = world.env.replica()?;
        env.through(&nats)
            .through(&redis)
            .set("NATS_PUBLISH_TIMEOUT", "20s")
            .set("REDIS_TIMEOUT", "250ms");
        Ok(Self {
            api: std::sync::Arc::new(Api::start(&env).await?),
            nats,
            redis,
        })
    }

    /// Starts a write of `key` and leaves it between its acknowledgement and what it would tell Redis.
    async fn write_up_to_install(
        &self,
        world: &World<'_>,
        key: &str,
        value: &str,
    ) -> Result<tokio::task::JoinHandle<Result<Answer>>> {
        let (_, before) = world.log_depth().await?;
        self.nats.stall();
        let leased_before = world.in_redis(key).await?;
        let write = tokio::spawn({
            let (api, key, body) = (
                self.api.clone(),
                key.to_owned(),
                format!("{{\"value\":{value}}}"),
            );
            async move { api.post(&key, body).await }
        });
        if leased_before.is_none() {
            eventually("the writer takes its lease", async || {
                Ok(world
                    .in_redis(key)
                    .await?
                    .filter(|value| value.starts_with('T')))
            })
            .await?;
        } else {
            // Nothing shows the lease of a key that has a value; the held publish does not show either. The write is in
            // the log only after the stall ends, and Redis is stalled before that.
        }
        self.redis.stall();
        self.nats.resume();
        eventually("the write is in the log", async || {
            Ok((world.log_depth().await?.1 > before).then_some(()))
        })
        .await?;
        Ok(write)
    }
}

#[tokio::test]
async fn a_stalled_writers_late_install_changes_nothing() -> Result<()> {
    let world = World::shared().await?;
    let stalled = Stalled::start(&world).await?;
    let other = world.api().await?;
    for round in 0..3 {
        let key = format!("k{round}");
        let write = stalled.write_up_to_install(&world, &key, "\"old\"").await?;
        world.flush_redis().await?;
        let newer = other.write(&key, "\"new\"").await?;
        stalled.redis.resume();
        let older = write.await??.expect(StatusCode::CREATED)?.version()?;
        assert!(older < newer);
        for api in [&other, &*stalled.api] {
            assert_eq!(
                api.get(&key).await?.expect(StatusCode::OK)?.version()?,
                newer
            );
        }
        // Whoever notices that the marker is gone empties Redis once more, and a read fills it.
        eventually("Redis has the newer one", async || {
            let kept = world.in_redis(&key).await?.unwrap_or_default();
            ensure!(!kept.contains("\"old\""), "{kept}");
            let read = other.get(&key).await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == newer, "{read:?}");
            Ok(kept.contains("\"new\"").then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_late_install_into_an_empty_redis_stays_out() -> Result<()> {
    let world = World::shared().await?;
    let stalled = Stalled::start(&world).await?;
    let other = world.api().await?;
    let write = stalled.write_up_to_install(&world, "k", "\"old\"").await?;
    let newer = other.write("k", "\"new\"").await?;
    world.flush_redis().await?;
    stalled.redis.resume();
    write.await??.expect(StatusCode::CREATED)?;
    assert_eq!(
        world.in_redis("k").await?,
        None,
        "only a token's holder creates a key"
    );
    assert_eq!(
        other.get("k").await?.expect(StatusCode::OK)?.version()?,
        newer
    );
    Ok(())
}

/// The lease itself comes late, after a newer write: neither it nor the install behind it may bring the older value.
#[tokio::test]
async fn a_lease_that_comes_late_lets_nothing_old_in() -> Result<()> {
    let world = World::shared().await?;
    let redis = world.stack.redis.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&redis)
        .set("REDIS_CONNECTIONS", "1")
        .set("REDIS_TIMEOUT", "250ms");
    let api = Api::start(&env).await?;
    let other = world.api().await?;
    for round in 0..3 {
        let key = format!("k{round}");
        redis.stall();
        let older = api
            .post(&key, "{\"value\":\"old\"}")
            .await?
            .expect(StatusCode::CREATED)?;
        assert_eq!(older.header("birb-cache"), "pending");
        let newer = other.write(&key, "\"new\"").await?;
        // Evicted, for example.
        redis::cmd("DEL")
            .arg(format!("birb:e:{key}"))
            .exec_async(&mut world.redis().await?)
            .await?;
        redis.resume();
        // What was held comes, in its order; then a command of ours, or a new connection.
        eventually("the late commands are through", async || {
            Ok((api.get(&key).await?.header("birb-source") == "redis").then_some(()))
        })
        .await?;
        for api in [&other, &api] {
            assert_eq!(
                api.get(&key).await?.expect(StatusCode::OK)?.version()?,
                newer
            );
        }
        let kept = world.in_redis(&key).await?.unwrap_or_default();
        assert!(!kept.contains("\"old\""), "{kept}");
    }
    Ok(())
}

#[tokio::test]
async fn a_stalled_readers_late_fill_changes_nothing() -> Result<()> {
    let world = World::shared().await?;
    let stalled = Stalled::start(&world).await?;
    let other = world.api().await?;
    for (round, flush) in [(0, false), (1, true)] {
        let key = format!("k{round}");
        stalled.nats.stall();
        let read = tokio::spawn({
            let (api, key) = (stalled.api.clone(), key.clone());
            async move { api.get(&key).await }
        });
        eventually("the reader takes its lease", async || {
            Ok(world
                .in_redis(&key)
                .await?
                .filter(|value| value.starts_with('T')))
        })
        .await?;
        if flush {
            world.flush_redis().await?;
        }
        // Breaks the reader's token, or finds it gone.
        let newer = other.write(&key, "\"new\"").await?;
        stalled.nats.resume();
        read.await??;
        for api in [&other, &*stalled.api] {
            assert_eq!(
                api.get(&key).await?.expect(StatusCode::OK)?.version()?,
                newer
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_write_that_redis_cannot_be_told_of_says_so_and_is_repaired() -> Result<()> {
    let world = World::shared().await?;
    let stalled = Stalled::start(&world).await?;
    let other = world.api().await?;
    other.write("k", "\"old\"").await?;
    assert_eq!(other.read("k").await?.as_deref(), Some("\"old\""));
    other.write("overtaken", "\"old\"").await?;
    let write = stalled.write_up_to_install(&world, "k", "\"new\"").await?;
    let answer = write.await??.expect(StatusCode::CREATED)?;
    assert_eq!(answer.header("birb-cache"), "pending");
    let overtaken = stalled.api.post("overtaken", "{\"value\":\"new\"}").await?;
    assert_eq!(overtaken.header("birb-cache"), "pending");
    other.write("overtaken", "\"newest\"").await?;
    let waiting = "birbnest_redis_repairs_pending";
    is_counted(&stalled.api.url, waiting, "").await?;
    stalled.redis.cut();
    stalled.redis.resume();
    stalled.redis.heal();
    eventually("nothing waits for repair", async || {
        let n_waiting = counted(&stalled.api.url, waiting, "").await?;
        Ok((n_waiting == 0.0).then_some(()))
    })
    .await?;
    is_told(&stalled.api.process, "repaired Redis: it has nothing older").await?;
    // What is older is deleted, and nothing put in its place.
    assert_eq!(world.in_redis("k").await?, None);
    let kept = world.in_redis("overtaken").await?.unwrap_or_default();
    assert!(kept.contains("\"newest\""), "{kept}");
    assert_eq!(other.read("k").await?.as_deref(), Some("\"new\""));
    Ok(())
}

/// What waits in a process for its way to NATS when the connection is lost is not sent over the next one: nobody would have
/// checked the log before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_was_queued_for_a_lost_connection_is_never_sent() -> Result<()> {
    let world = World::shared().await?;
    let link = world.stack.nats.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link).set("NATS_PUBLISH_TIMEOUT", "1s");
    let api = Api::start(&env).await?;
    let write = async |n: usize| api.write(&format!("k{n}"), "1").await;
    for n in 0..20 {
        write(n).await?;
    }
    let (_, before) = world.log_depth().await?;
    link.stall();
    // More than the sockets on the way can hold.
    let value = format!("{{\"value\":\"{}\"}}", "x".repeat(1_000_000));
    let writes = (0..32).map(async |n| api.post(&format!("queued{n}"), value.clone()).await);
    let answers = futures::future::try_join_all(writes).await?;
    ensure!(
        answers
            .iter()
            .any(|answer| answer.refused("UNKNOWN_OUTCOME").is_ok()),
        "none was on its way"
    );
    for answer in &answers {
        ensure!(
            answer.status == StatusCode::SERVICE_UNAVAILABLE,
            "{answer:?}"
        );
    }
    link.cut();
    link.heal();
    eventually("writes are taken again", async || {
        let answer = api.post("again", "{\"value\":1}").await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await?;
    for n in 0..50 {
        write(n).await?;
    }
    let (_, after) = world.log_depth().await?;
    ensure!(after == before + 51, "{} came late", after - before - 51);
    Ok(())
}
