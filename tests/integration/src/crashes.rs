//! Whatever is killed, at whatever moment: every acknowledged write is found.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::{Role, shared};
use reqwest::StatusCode;

use crate::{
    dead_letters::{REFUSE, n_ever_dead},
    world::{Api, PATIENCE, World, breakable, eventually},
};

#[tokio::test]
async fn a_worker_killed_between_commit_and_trim_loses_and_repeats_nothing() -> Result<()> {
    let world = World::shared_with(&[("LOG_TRIM_LAG", "1h")]).await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let mut versions = Vec::new();
    for n in 0..50 {
        versions.push(api.write(&format!("k{n}"), &n.to_string()).await?);
    }
    for (n, version) in versions.iter().enumerate() {
        world.stored(&format!("k{n}"), *version).await?;
    }
    // Stored, and by LOG_TRIM_LAG not trimmed.
    worker.kill().await?;
    assert_eq!(world.log_depth().await?.0, 50);
    let before = world
        .sql("select xmin, key, version from cache_entries order by key")
        .await?;

    let heir = world.eager_worker().await?;
    let version = api.write("after", "1").await?;
    world.stored("after", version).await?;
    let unchanged =
        "select xmin, key, version from cache_entries where key <> 'after' order by key";
    assert_eq!(
        world.sql(unchanged).await?,
        before,
        "rows were written again"
    );
    eventually("the heir trims the log", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    for n in 0..50 {
        assert_eq!(api.read(&format!("k{n}")).await?, Some(n.to_string()));
    }
    drop(heir);
    Ok(())
}

/// The steps of a batch, and whether one of its writes is refused. Such a batch is read again by the next owner, should the one
/// before it be killed soon: these come last.
const STEPS: [(&str, bool); 5] = [
    ("committed-batch", false),
    ("told-redis", false),
    ("published-letter", true),
    ("recorded-letters", true),
    ("committed-batch", true),
];

/// Between any two steps of a batch: what is stored is told to Redis, and what is refused is set aside, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_after_any_step_of_a_batch_leaves_nothing_old_and_nothing_twice()
-> Result<()> {
    let mut world = World::not_set_up(shared().await?).await?;
    world.env.set("NATS_SHARDS", "1");
    world.env.setup().await?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    // Redis does not hear of what is written here.
    let link = world.stack.redis.proxy()?;
    let mut env = world.env.replica()?;
    let far = Api::start(env.through(&link)).await?;
    link.cut();
    let mut n_dead = 0;
    for (n, (step, is_refused)) in STEPS.iter().enumerate() {
        let poison = is_refused.then(|| format!("poison-{n}"));
        let mut versions = HashMap::new();
        let keys = (0..10).map(|key| format!("{n}-{key}"));
        for key in keys.chain(poison.clone()) {
            api.write(&key, "\"old\"").await?;
            let written = far.post(&key, "{\"value\":\"new\"}").await?;
            ensure!(written.header("birb-cache") == "pending", "{written:?}");
            versions.insert(key, written.expect(StatusCode::CREATED)?.version()?);
        }
        let mut dying = world.env.replica()?;
        dying.set("BIRBNEST_DIES_AFTER", *step);
        let killed = dying.spawn(Role::Worker)?;
        let status = tokio::time::timeout(PATIENCE, killed.wait()).await??;
        let said = killed.log()?;
        ensure!(
            status.code().is_none() && said.contains(&format!("BIRBNEST_DIES_AFTER={step}")),
            "{step}: {status}\n{said}"
        );
        let heir = world.worker().await?;
        let stored = versions
            .iter()
            .filter(|(key, _)| Some(*key) != poison.as_ref());
        world.all_stored(stored).await?;
        n_dead += u64::from(*is_refused);
        let newest = poison.as_ref().map_or(0, |poison| versions[poison]);
        eventually("the refused write is set aside", async || {
            let dead = "select count(*), coalesce(max(version), 0) from dead_keys";
            let dead = world.sql(dead).await?;
            let (count, last) = dead.trim().split_once('|').context("two columns")?;
            Ok((count == n_dead.to_string() && last.parse::<u64>()? >= newest).then_some(()))
        })
        .await?;
        eventually("Redis has nothing old", async || {
            for key in versions.keys() {
                if world
                    .in_redis(key)
                    .await?
                    .is_some_and(|kept| kept.contains("old"))
                {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .await
        .with_context(|| format!("after {step}"))?;
        for (key, version) in &versions {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == *version, "{step}, {key}: {read:?}");
        }
        let jetstream = world.jetstream().await?;
        let letters = jetstream
            .get_stream(&world.env.vars["NATS_DLQ_STREAM_NAME"])
            .await?;
        let n_letters = letters.cached_info().state.messages;
        ensure!(n_letters == n_dead, "{step}: {n_letters} letters");
        heir.kill().await?;
    }
    Ok(())
}

/// The next owner reads it together with what came later, so that all of it is stored once more.
#[tokio::test]
async fn a_refused_write_that_the_next_owner_reads_again_keeps_its_letter() -> Result<()> {
    let world = World::shared_with(&[("NATS_SHARDS", "1")]).await?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    let poison = api.write("poison", "\"bad\"").await?;
    let mut env = world.env.replica()?;
    env.set("BIRBNEST_DIES_AFTER", "recorded-letters");
    let killed = env.spawn(Role::Worker)?;
    tokio::time::timeout(PATIENCE, killed.wait()).await??;
    let after = api.write("after", "1").await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_BATCH_SIZE", "2")
        .set("WORKER_BATCH_TIMEOUT", "10s")
        .set("LOG_TRIM_LAG", "1ms")
        .set("LOG_TRIM_INTERVAL", "20ms");
    let _heir = env.start(Role::Worker).await?;
    world.stored("after", after).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    world.flush_redis().await?;
    let read = api.get("poison").await?.expect(StatusCode::OK)?;
    ensure!(read.version()? == poison, "{read:?}");
    ensure!(n_ever_dead(&world).await? == 1);
    Ok(())
}

#[tokio::test]
async fn an_api_killed_between_acknowledgement_and_install_leaves_nothing_old() -> Result<()> {
    let world = World::shared().await?;
    let other = world.api().await?;
    other.write("k", "\"old\"").await?;
    assert!(
        world
            .in_redis("k")
            .await?
            .context("cached")?
            .contains("\"old\"")
    );

    let redis = world.stack.redis.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&redis).set("REDIS_TIMEOUT", "250ms");
    let doomed = Arc::new(Api::start(&env).await?);
    let (_, before) = world.log_depth().await?;
    // Neither lease nor install get through; the write goes on without, and is killed while it tries to tell Redis.
    redis.stall();
    let write = tokio::spawn({
        let doomed = doomed.clone();
        async move { doomed.post("k", "{\"value\":\"new\"}").await }
    });
    eventually("the write is in the log", async || {
        Ok((world.log_depth().await?.1 > before).then_some(()))
    })
    .await?;
    doomed.process.kill().await?;
    // It may have been answered in between; what matters is what Redis holds.
    drop(write.await?);
    redis.cut();
    assert!(
        world
            .in_redis("k")
            .await?
            .context("cached")?
            .contains("\"old\""),
        "nothing to show"
    );

    let _worker = world.worker().await?;
    eventually("reads see what is in the log", async || {
        Ok((other.read("k").await?.as_deref() == Some("\"new\"")).then_some(()))
    })
    .await?;
    Ok(())
}

/// What clients were told, checked against what is there in the end.
#[derive(Default)]
struct Acknowledged {
    newest: Mutex<HashMap<String, (u64, u64)>>,
    n_writes: AtomicU64,
    n_refused: AtomicU64,
}

async fn write_until(
    done: Arc<AtomicBool>,
    api: Arc<Api>,
    client: usize,
    told: Arc<Acknowledged>,
) -> Result<()> {
    let mut round = 0u64;
    while !done.load(Ordering::Relaxed) {
        round += 1;
        let key = format!("c{client}-{}", round % 20);
        let answer = api.post(&key, format!("{{\"value\":{round}}}")).await?;
        match answer.status {
            StatusCode::CREATED => {
                told.n_writes.fetch_add(1, Ordering::Relaxed);
                let version = answer.version()?;
                let mut newest = told.newest.lock().unwrap();
                let (known, _) = newest.get(&key).copied().unwrap_or_default();
                ensure!(
                    version > known,
                    "version of {key} went from {known} to {version}"
                );
                newest.insert(key, (version, round));
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                ensure!(
                    !answer.header("retry-after").is_empty(),
                    "503 without Retry-After: {answer:?}"
                );
                told.n_refused.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            _ => ensure!(false, "unexpected answer: {answer:?}"),
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_write_survives_kill_9_of_nats_postgresql_redis_and_workers_under_load()
-> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let (done, told) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(Acknowledged::default()),
    );
    let clients: Vec<_> = (0..8)
        .map(|client| tokio::spawn(write_until(done.clone(), api.clone(), client, told.clone())))
        .collect();
    let progress = async |n: u64| {
        let goal = told.n_writes.load(Ordering::Relaxed) + n;
        eventually("writes go on", async || {
            Ok((told.n_writes.load(Ordering::Relaxed) >= goal).then_some(()))
        })
        .await
    };
    for _ in 0..2 {
        progress(300).await?;
        stack.nats.kill().await?;
        stack.nats.start().await?;
        progress(300).await?;
        stack.postgres.kill().await?;
        // Writes go on into the log.
        progress(300).await?;
        stack.postgres.start().await?;
        progress(300).await?;
        stack.redis.kill().await?;
        progress(100).await?;
        stack.redis.start().await?;
    }
    worker.kill().await?;
    progress(100).await?;
    let _heir = world.worker().await?;
    progress(100).await?;
    done.store(true, Ordering::Relaxed);
    for client in clients {
        client.await??;
    }
    let newest = told.newest.lock().unwrap().clone();
    println!(
        "{} writes acknowledged, {} refused, {} keys",
        told.n_writes.load(Ordering::Relaxed),
        told.n_refused.load(Ordering::Relaxed),
        newest.len()
    );
    for (key, (version, round)) in &newest {
        world.stored(key, *version).await?;
        let (stored, _, value) = world.row(key).await?.context("a row")?;
        // A write whose outcome was unknown may have come after the last acknowledged one.
        ensure!(
            stored > *version || value == round.to_string(),
            "{key}: {stored} holds {value}, {version} was {round}"
        );
        let read = api.get(key).await?.expect(StatusCode::OK)?.version()?;
        ensure!(
            read >= *version,
            "{key}: read {read} after {version} was acknowledged"
        );
    }
    Ok(())
}
