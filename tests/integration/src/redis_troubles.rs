//! A Redis that lies, hangs, refuses or forgets: nothing old is served, and nothing stops.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use birb_nest_stack::{Environment, Options, Proxy, RedisOptions, Role, Stack};
use birb_nest_store::{Clock, redis::Cache};
use reqwest::{Method, StatusCode};

use crate::{
    reshard::{is_out_of_date, reshard_ends},
    shown::{counted, is_counted, is_told},
    world::{Api, PATIENCE, World, breakable, eventually},
};

async fn config(world: &World<'_>, setting: &str, value: &str) -> Result<()> {
    redis::cmd("CONFIG")
        .arg("SET")
        .arg(setting)
        .arg(value)
        .exec_async(&mut world.redis().await?)
        .await?;
    Ok(())
}

async fn health(api: &Api, status: &str) -> Result<()> {
    eventually(status, async || {
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["status"] == status).then_some(()))
    })
    .await
}

/// What a process is to be told that reaches Redis by a link of its own.
fn through(world: &World<'_>) -> Result<(Proxy, Environment)> {
    let link = world.stack.redis.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link);
    Ok((link, env))
}

/// Redis answers every API with `value`: the write that could not be told to it has been repaired.
async fn settles(apis: &[&Api], key: &str, value: &str) -> Result<()> {
    for api in apis {
        eventually("Redis has what is newest", async || {
            let answer = api.get(key).await?.expect(StatusCode::OK)?;
            let newest = answer.json()?["value"] == value;
            Ok((newest && answer.header("birb-source") == "redis").then_some(()))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_redis_restarted_with_an_older_snapshot_serves_nothing_old() -> Result<()> {
    let redis = RedisOptions {
        snapshots: true,
        ..RedisOptions::default()
    };
    let stack = Stack::fresh_with(Options {
        redis,
        ..Options::default()
    })
    .await?;
    let world = World::on(&stack).await?;
    let (api, other) = (world.api().await?, Api::start(&world.env.replica()?).await?);
    api.write("changed", "\"old\"").await?;
    api.write("deleted", "\"old\"").await?;
    api.write("kept", "\"kept\"").await?;
    let copy = stack.redis.snapshot().await?;
    api.write("changed", "\"new\"").await?;
    api.delete("deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    stack.redis.kill().await?;
    stack.redis.restore(&copy).await?;
    stack.redis.start().await?;
    let keys: Vec<String> = redis::cmd("KEYS")
        .arg("birb:*")
        .query_async(&mut world.redis().await?)
        .await?;
    println!("the old copy came back with {keys:?}, or was emptied already");
    for api in [&api, &other] {
        for _ in 0..5 {
            assert_eq!(api.read("changed").await?.as_deref(), Some("\"new\""));
            assert_eq!(api.read("deleted").await?, None);
            assert_eq!(api.read("kept").await?.as_deref(), Some("\"kept\""));
        }
    }
    settles(&[&api, &other], "changed", "new").await?;
    let mut n_flushes = 0.0;
    let mut told = String::new();
    for api in [&api, &other] {
        n_flushes += counted(&api.url, "birbnest_redis_flushes_total", "").await?;
        told += &api.process.log()?;
    }
    ensure!(n_flushes > 0.0, "whoever emptied Redis does not count it");
    ensure!(
        told.contains("it was not filled during this run of the server"),
        "nobody says that Redis was emptied"
    );
    Ok(())
}

#[tokio::test]
async fn a_redis_that_hangs_costs_a_moment_and_nothing_else() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on_with(&stack, &[("REDIS_TIMEOUT", "250ms")]).await?;
    let (api, other) = (world.api().await?, Api::start(&world.env.replica()?).await?);
    api.write("k", "\"old\"").await?;
    stack.redis.pause().await?;
    let answer = api
        .post("k", "{\"value\":\"new\"}")
        .await?
        .expect(StatusCode::CREATED)?;
    assert_eq!(answer.header("birb-cache"), "pending");
    for api in [&api, &other] {
        assert_eq!(
            api.get("k").await?.expect(StatusCode::OK)?.version()?,
            answer.version()?
        );
    }
    health(&api, "degraded").await?;
    // Once it is known to hang it costs nothing.
    let started = Instant::now();
    for _ in 0..20 {
        api.get("k").await?.expect(StatusCode::OK)?;
    }
    let each = started.elapsed() / 20;
    assert!(each.as_millis() < 100, "{each:?} per read");
    stack.redis.resume().await?;
    health(&api, "healthy").await?;
    settles(&[&api, &other], "k", "new").await
}

/// Each answer of Redis takes longer, and is believed all the same; nothing adds up to more than a few of them.
#[tokio::test]
async fn a_redis_that_is_slow_makes_answers_late_and_nothing_else() -> Result<()> {
    const LATE: Duration = Duration::from_millis(30);
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let (link, env) = through(&world)?;
    let api = Api::start(&env).await?;
    api.write("k", "0").await?;
    link.delay(LATE);
    let mut best = PATIENCE;
    for n in 1..20 {
        let began = Instant::now();
        let written = api
            .post("k", format!("{{\"value\":{n}}}"))
            .await?
            .expect(StatusCode::CREATED)?;
        let read = api.get("k").await?.expect(StatusCode::OK)?;
        best = best.min(began.elapsed());
        ensure!(read.version()? == written.version()?, "{read:?}");
        ensure!(written.header("birb-cache") != "pending", "{written:?}");
    }
    // There and back, for a write and for a read.
    ensure!(best >= 2 * LATE, "{best:?}: it was not slow");
    ensure!(best < 10 * LATE, "{best:?}");
    health(&api, "healthy").await
}

#[tokio::test]
async fn a_redis_without_memory_or_turned_replica_keeps_nothing_old() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let (api, other) = (world.api().await?, Api::start(&world.env.replica()?).await?);
    for key in ["a", "b"] {
        api.write(key, "\"old\"").await?;
        assert_eq!(other.read(key).await?.as_deref(), Some("\"old\""));
    }
    // Out of memory: what is older can still be deleted.
    config(&world, "maxmemory-policy", "noeviction").await?;
    config(&world, "maxmemory", "1").await?;
    api.write("a", "\"new\"").await?;
    for api in [&api, &other] {
        assert_eq!(api.read("a").await?.as_deref(), Some("\"new\""));
    }
    config(&world, "maxmemory", "0").await?;
    settles(&[&api, &other], "a", "new").await?;
    // A replica: it takes no writes, and what it holds is not believed for long.
    let mut redis = world.redis().await?;
    redis::cmd("REPLICAOF")
        .arg("127.0.0.1")
        .arg("1")
        .exec_async(&mut redis)
        .await?;
    let answer = api
        .post("b", "{\"value\":\"new\"}")
        .await?
        .expect(StatusCode::CREATED)?;
    assert_eq!(answer.header("birb-cache"), "pending");
    health(&api, "degraded").await?;
    health(&other, "degraded").await?;
    for api in [&api, &other] {
        assert_eq!(api.read("b").await?.as_deref(), Some("\"new\""));
    }
    redis::cmd("REPLICAOF")
        .arg("NO")
        .arg("ONE")
        .exec_async(&mut redis)
        .await?;
    health(&api, "healthy").await?;
    settles(&[&api, &other], "b", "new").await
}

/// As with too few replicas, or after it could not write its snapshot: what it holds cannot be deleted, and is not believed.
#[tokio::test]
async fn a_redis_that_takes_no_writes_keeps_nothing_old() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let (api, other) = (world.api().await?, Api::start(&world.env.replica()?).await?);
    api.write("k", "\"old\"").await?;
    assert_eq!(other.read("k").await?.as_deref(), Some("\"old\""));
    config(&world, "min-replicas-to-write", "1").await?;
    let answer = api
        .post("k", "{\"value\":\"new\"}")
        .await?
        .expect(StatusCode::CREATED)?;
    assert_eq!(answer.header("birb-cache"), "pending");
    health(&api, "degraded").await?;
    health(&other, "degraded").await?;
    for api in [&api, &other] {
        assert_eq!(api.read("k").await?.as_deref(), Some("\"new\""));
    }
    config(&world, "min-replicas-to-write", "0").await?;
    health(&api, "healthy").await?;
    settles(&[&api, &other], "k", "new").await
}

/// Slow as it is, it cannot hold anybody up.
#[tokio::test]
async fn a_redis_slower_than_its_deadline_is_done_without() -> Result<()> {
    let world = World::shared_with(&[("REDIS_TIMEOUT", "250ms")]).await?;
    let (one, env) = through(&world)?;
    let (two, other) = through(&world)?;
    let (api, other) = (Api::start(&env).await?, Api::start(&other).await?);
    api.write("k", "\"old\"").await?;
    assert_eq!(other.read("k").await?.as_deref(), Some("\"old\""));
    let slow = |delay| [&one, &two].map(|link| link.delay(delay));
    // There and back: 400 ms, of the 250 ms that a command may take.
    slow(Duration::from_millis(200));
    let answer = api.post("k", "{\"value\":\"new\"}").await?;
    let answer = answer.expect(StatusCode::CREATED)?;
    assert_eq!(answer.header("birb-cache"), "pending");
    health(&api, "degraded").await?;
    health(&other, "degraded").await?;
    let mut best = PATIENCE;
    for _ in 0..10 {
        let began = Instant::now();
        for api in [&api, &other] {
            assert_eq!(api.read("k").await?.as_deref(), Some("\"new\""));
        }
        best = best.min(began.elapsed());
    }
    ensure!(best < Duration::from_millis(200), "{best:?} for two reads");
    slow(Duration::ZERO);
    health(&api, "healthy").await?;
    health(&other, "healthy").await?;
    settles(&[&api, &other], "k", "new").await
}

/// A worker that cannot reach Redis owes it. Whoever can pays, by emptying it: an API that died meanwhile leaves nothing
/// old.
#[tokio::test]
async fn what_redis_was_not_told_of_is_owed_and_paid_by_whoever_reaches_it() -> Result<()> {
    let world = World::shared().await?;
    let ((link, env), (worker_link, worker_env)) = (through(&world)?, through(&world)?);
    let api = Api::start(&env).await?;
    let worker = worker_env.start(Role::Worker).await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    worker_link.cut();
    link.cut();
    let version = api
        .post("k", "{\"value\":2}")
        .await?
        .expect(StatusCode::CREATED)?
        .version()?;
    world.stored("k", version).await?;
    let owed = async || {
        let sql = "select count(*) from shard_state where redis_debt";
        anyhow::Ok(world.sql(sql).await?.trim() == "1")
    };
    eventually("it is owed", async || Ok(owed().await?.then_some(()))).await?;
    let debts = "birbnest_redis_debts_total";
    is_counted(&worker_env.worker_url(), debts, "incurred").await?;
    is_told(&worker, "Redis is owed what this shard stored").await?;
    // Something old, as a dead API might leave it.
    let old = "E00000000000000010000000000000000{\"key\":\"stale\",\"value\":0,\"version\":1,\"metadata\":{}}";
    redis::cmd("SET")
        .arg("birb:e:stale")
        .arg(old)
        .exec_async(&mut world.redis().await?)
        .await?;
    // The worker never reaches Redis again.
    link.heal();
    eventually("it is paid", async || Ok((!owed().await?).then_some(()))).await?;
    is_counted(&api.url, debts, "paid").await?;
    let paid = "emptied Redis: it had not been told of what these shards stored";
    is_told(&api.process, paid).await?;
    assert_eq!(world.in_redis("stale").await?, None);
    assert_eq!(api.read("stale").await?, None);
    assert_eq!(api.read("k").await?.as_deref(), Some("2"));
    Ok(())
}

/// A delete that is answered with 404 leaves nothing standing, whatever Redis has not been told.
#[tokio::test]
async fn a_delete_does_not_take_redis_at_its_word_that_there_is_nothing() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let (link, env) = through(&world)?;
    let cut_off = Api::start(&env).await?;
    for (key, batch) in [("one", false), ("many", true)] {
        // Redis knows that there is nothing.
        api.get(key).await?.expect(StatusCode::NOT_FOUND)?;
        link.cut();
        let pending = cut_off
            .post(key, "{\"value\":1}")
            .await?
            .expect(StatusCode::CREATED)?;
        assert_eq!(pending.header("birb-cache"), "pending");
        if batch {
            let body = format!("{{\"keys\":[\"{key}\"]}}");
            let answer = api
                .send(Method::POST, "/v1/cache/batch/delete", Some(body))
                .await?;
            assert_eq!(answer.json()?["results"][0]["status"], 204, "{answer:?}");
        } else {
            api.delete(key).await?.expect(StatusCode::NO_CONTENT)?;
        }
        link.heal();
        eventually("the link is back", async || {
            let ready = cut_off.send(Method::GET, "/readyz", None).await?;
            Ok((!ready.body.contains("redis")).then_some(()))
        })
        .await?;
        for api in [&api, &cut_off] {
            assert_eq!(api.read(key).await?, None, "{key}");
        }
    }
    Ok(())
}

/// As a worker leaves it that dies between its commit and its word to Redis: Redis has the older of two values of `k`.
async fn without_a_word_to_redis(world: &World<'_>, api: &Api) -> Result<()> {
    let worker = world.worker().await?;
    let mut redis = world.redis().await?;
    let old = api.write("k", "\"old\"").await?;
    world.stored("k", old).await?;
    let kept: Vec<u8> = redis::cmd("DUMP")
        .arg("birb:e:k")
        .query_async(&mut redis)
        .await?;
    let new = api.write("k", "\"new\"").await?;
    world.stored("k", new).await?;
    world.redis_is_told().await?;
    worker.terminate(PATIENCE).await?;
    world
        .sql(&format!(
            "update shard_state set told_to = least(told_to, {old})"
        ))
        .await?;
    redis::cmd("RESTORE")
        .arg("birb:e:k")
        .arg(0)
        .arg(kept)
        .arg("REPLACE")
        .exec_async(&mut redis)
        .await?;
    ensure!(api.read("k").await?.as_deref() == Some("\"old\""));
    Ok(())
}

/// Whatever its consumer had acknowledged.
#[tokio::test]
async fn what_a_worker_stored_without_telling_redis_is_told_by_the_next_one() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    without_a_word_to_redis(&world, &api).await?;
    let _next = world.worker().await?;
    eventually("Redis is told", async || {
        Ok((api.read("k").await?.as_deref() == Some("\"new\"")).then_some(()))
    })
    .await
}

/// The log it would be read from is gone then: Redis is owed it.
#[tokio::test]
async fn what_a_worker_stored_without_telling_redis_is_owed_by_another_number_of_shards()
-> Result<()> {
    let mut world = World::shared().await?;
    let api = world.api().await?;
    without_a_word_to_redis(&world, &api).await?;
    reshard_ends(&world.env, 3, 0).await?;
    is_out_of_date(&api.process, 3).await?;
    world.env.set("NATS_SHARDS", "3");
    let (api, _worker) = (world.api().await?, world.worker().await?);
    eventually("Redis was emptied", async || {
        Ok((api.read("k").await?.as_deref() == Some("\"new\"")).then_some(()))
    })
    .await
}

async fn becomes_somebody_elses(redis: &mut redis::aio::MultiplexedConnection) -> Result<()> {
    let mut taken = redis::pipe();
    taken.atomic().cmd("FLUSHDB");
    taken.cmd("SET").arg("somebody").arg("else");
    Ok(taken.exec_async(redis).await?)
}

/// Whoever empties the database sees that it is ours in the same step: the last look at it is a second old.
#[tokio::test]
async fn a_database_that_has_just_become_somebody_elses_is_not_emptied() -> Result<()> {
    let world = World::shared().await?;
    let cache = Cache::open(world.config()?, Arc::new(Clock::new())).await?;
    let mut redis = world.redis().await?;
    becomes_somebody_elses(&mut redis).await?;
    ensure!(cache.flush().await.is_err());
    let kept: String = redis::cmd("GET")
        .arg("somebody")
        .query_async(&mut redis)
        .await?;
    assert_eq!(kept, "else");
    world.flush_redis().await?;
    eventually("it is ours again", async || Ok(cache.flush().await.ok())).await
}

/// Somebody else took the database over, while the API was cut off from it or before its eyes: nothing is deleted there, nothing
/// put there, and nothing believed.
#[tokio::test]
async fn a_database_that_became_somebody_elses_is_left_alone() -> Result<()> {
    const FOREIGN: &str = "the database holds keys of something else";
    let world = World::shared().await?;
    let (link, env) = through(&world)?;
    let api = Api::start(&env).await?;
    let mut redis = world.redis().await?;
    let mut n_told = 0;
    for is_cut in [true, false] {
        api.write("k", "\"old\"").await?;
        if is_cut {
            link.cut();
        }
        becomes_somebody_elses(&mut redis).await?;
        link.heal();
        eventually("it is refused, again and again", async || {
            let n_now = api.process.log()?.matches(FOREIGN).count();
            Ok((n_now >= n_told + 3).then_some(()))
        })
        .await?;
        health(&api, "degraded").await?;
        let written = api.post("k", "{\"value\":\"new\"}").await?;
        let written = written.expect(StatusCode::CREATED)?;
        assert_eq!(written.header("birb-cache"), "pending");
        let read = api.get("k").await?.expect(StatusCode::OK)?;
        assert_eq!(read.header("birb-source"), "log");
        assert_eq!(read.version()?, written.version()?);
        let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut redis).await?;
        assert_eq!(keys, ["somebody"]);
        world.flush_redis().await?;
        health(&api, "healthy").await?;
        settles(&[&api], "k", "new").await?;
        n_told = api.process.log()?.matches(FOREIGN).count();
    }
    Ok(())
}
