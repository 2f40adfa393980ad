//! Workers share the shards, and a hot key costs few row updates.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, ensure};
use async_nats::jetstream::consumer::PullConsumer;
use birb_nest_core::Key;
use birb_nest_stack::{Environment, Process, Role};
use birb_nest_store::LogConfig;
use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    dead_letters::n_ever_dead,
    shown::{counted, is_counted, is_told, metric},
    world::{PATIENCE, World, eventually, eventually_within},
};

struct Worker {
    process: Process,
    env: Environment,
}

async fn worker(world: &World<'_>) -> Result<Worker> {
    let mut env = world.env.replica()?;
    env.set("WORKER_REBALANCE_INTERVAL", "100ms");
    Ok(Worker {
        process: env.start(Role::Worker).await?,
        env,
    })
}

/// How many shards each owns, once all 8 are owned and nobody has more than `most`.
async fn spread(workers: &[&Worker], most: usize) -> Result<Vec<usize>> {
    spread_of(8, workers, most).await
}

/// As [`spread`], of another number of shards.
async fn spread_of(n_shards: usize, workers: &[&Worker], most: usize) -> Result<Vec<usize>> {
    spread_within(PATIENCE, n_shards, workers, most).await
}

async fn spread_within(
    patience: Duration,
    n_shards: usize,
    workers: &[&Worker],
    most: usize,
) -> Result<Vec<usize>> {
    eventually_within(patience, "the shards are spread", async || {
        let mut owned = Vec::new();
        for worker in workers {
            let shards = metric(&worker.env.worker_url(), "birbnest_shard_owned").await?;
            owned.push(shards.values().filter(|value| **value == 1.0).count());
        }
        let all = owned.iter().sum::<usize>() == n_shards && owned.iter().all(|n| *n <= most);
        Ok(all.then_some(owned))
    })
    .await
}

#[tokio::test]
async fn workers_share_the_shards_and_rebalance() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let first = worker(&world).await?;
    assert_eq!(spread(&[&first], 8).await?, [8]);
    let second = worker(&world).await?;
    assert_eq!(spread(&[&first, &second], 4).await?, [4, 4]);
    let third = worker(&world).await?;
    let mut three = spread(&[&first, &second, &third], 3).await?;
    three.sort_unstable();
    assert_eq!(three, [2, 3, 3]);
    for n in 0..40 {
        let key = format!("k{n}");
        let version = api.write(&key, "1").await?;
        world.stored(&key, version).await?;
    }
    // One leaves in order, one is killed: the shards of both are taken over.
    let status = third.process.terminate(Duration::from_secs(20)).await?;
    assert_eq!(status.code(), Some(0), "{}", third.process.last_lines(20));
    assert_eq!(spread(&[&first, &second], 4).await?, [4, 4]);
    second.process.kill().await?;
    // Its locks end with its connections, and the others look ten times a second: no timeout has to pass. The rest is
    // for a machine that is busy.
    let patience = Duration::from_secs(10);
    assert_eq!(spread_within(patience, 8, &[&first], 8).await?, [8]);
    for n in 0..40 {
        let key = format!("k{n}");
        let version = api.write(&key, "2").await?;
        world.stored(&key, version).await?;
    }
    Ok(())
}

/// Nobody else is there who could store it, and left to itself the batch would wait for an hour.
#[tokio::test]
async fn a_worker_that_is_told_to_stop_stores_the_batch_in_hand() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_BATCH_TIMEOUT", "1h");
    let worker = env.start(Role::Worker).await?;
    let version = api.write("k", "1").await?;
    eventually("it is in hand", async || {
        let ages = metric(&env.worker_url(), "birbnest_log_oldest_age_seconds").await?;
        Ok(ages.values().any(|age| *age > 0.0).then_some(()))
    })
    .await?;
    assert_eq!(world.row("k").await?, None);
    let status = worker.terminate(Duration::from_secs(20)).await?;
    assert_eq!(status.code(), Some(0), "{}", worker.last_lines(20));
    let row = world.row("k").await?;
    assert_eq!(row.map(|row| row.0), Some(version));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_owner_loses_its_shards_and_writes_nothing_late() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let mut env = world.env.replica()?;
    env.set("WORKER_REBALANCE_INTERVAL", "100ms")
        .set("WORKER_STALL_TIMEOUT", "1s");
    let stalled = Worker {
        process: env.start(Role::Worker).await?,
        env,
    };
    assert_eq!(spread(&[&stalled], 8).await?, [8]);
    let writing = async |round: u64| {
        stream::iter(0..200u64)
            .map(|n| {
                let api = api.clone();
                async move {
                    Ok::<_, anyhow::Error>((
                        n % 20,
                        api.write(&format!("k{}", n % 20), &round.to_string())
                            .await?,
                    ))
                }
            })
            .buffer_unordered(32)
            .try_fold([0u64; 20], async |mut newest, (k, version)| {
                newest[k as usize] = newest[k as usize].max(version);
                Ok(newest)
            })
            .await
    };
    writing(0).await?;
    // In the middle of its batches.
    let (first, _) = tokio::try_join!(writing(1), async {
        eventually("it stores", async || {
            Ok((world
                .sql("select 1 from cache_entries limit 1")
                .await?
                .trim()
                == "1")
                .then_some(()))
        })
        .await?;
        stalled.process.pause().await
    })?;
    let mut env = world.env.replica()?;
    env.set("WORKER_REBALANCE_INTERVAL", "100ms")
        .set("WORKER_STALL_TIMEOUT", "1s");
    let heir = Worker {
        process: env.start(Role::Worker).await?,
        env,
    };
    for (k, version) in first.iter().enumerate() {
        world.stored(&format!("k{k}"), *version).await?;
    }
    assert_eq!(spread(&[&heir], 8).await?, [8]);
    is_counted(
        &heir.env.worker_url(),
        "birbnest_worker_evictions_total",
        "",
    )
    .await?;
    is_told(&heir.process, "a worker has stored nothing for").await?;
    let taken = heir.process.log()?.matches("owning shard").count();
    assert!(taken >= 8, "{}", heir.process.log()?);
    let second = writing(2).await?;
    for (k, version) in second.iter().enumerate() {
        world.stored(&format!("k{k}"), *version).await?;
    }
    let before = world
        .sql("select key, version, value from cache_entries order by key")
        .await?;
    stalled.process.resume().await?;
    // It finds its sessions ended, comes back as a member, and gets its share.
    assert_eq!(spread(&[&stalled, &heir], 4).await?, [4, 4]);
    let log = stalled.process.log()?;
    assert!(
        log.contains("lost shard"),
        "its sessions were not ended:\n{log}"
    );
    assert_eq!(
        world
            .sql("select key, version, value from cache_entries order by key")
            .await?,
        before
    );
    for k in 0..20 {
        assert_eq!(api.read(&format!("k{k}")).await?.as_deref(), Some("2"));
    }
    Ok(())
}

#[tokio::test]
async fn more_workers_than_shards_leave_some_idle() -> Result<()> {
    let world = World::shared().await?;
    let mut workers = Vec::new();
    for _ in 0..9 {
        workers.push(worker(&world).await?);
    }
    let owned = spread(&workers.iter().collect::<Vec<_>>(), 1).await?;
    assert_eq!(owned.iter().filter(|n| **n == 0).count(), 1);
    Ok(())
}

#[tokio::test]
async fn the_consumer_shows_what_is_not_stored_yet() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    for n in 0..20 {
        api.write(&format!("k{n}"), "1").await?;
    }
    let _worker = worker(&world).await?;
    eventually("the lag is zero", async || {
        let jetstream = world.jetstream().await?;
        let mut lag = 0;
        for shard in 0..8 {
            let stream = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
            let consumer: Result<PullConsumer, _> = jetstream
                .get_consumer_from_stream("birb-worker", stream)
                .await;
            let Ok(mut consumer) = consumer else {
                return Ok(None);
            };
            let info = consumer.info().await?;
            lag += info.num_pending + info.num_ack_pending as u64;
        }
        Ok((lag == 0).then_some(()))
    })
    .await?;
    let rows = world.sql("select count(*) from cache_entries").await?;
    assert_eq!(rows.trim(), "20");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_writes_to_a_hot_key_cost_few_row_updates() -> Result<()> {
    const N_WRITES: u64 = 10_000;
    // On a slow machine few writes come in the usual time.
    let world = World::shared_with(&[("WORKER_BATCH_TIMEOUT", "100ms")]).await?;
    let api = Arc::new(world.api().await?);
    let worker = worker(&world).await?;
    let last = stream::iter(0..N_WRITES)
        .map(|n| {
            let api = api.clone();
            async move { api.write("hot", &n.to_string()).await }
        })
        .buffer_unordered(64)
        .try_fold(0, async |newest, version| Ok(newest.max(version)))
        .await?;
    world.stored("hot", last).await?;
    let changed = metric(
        &worker.env.worker_url(),
        "birbnest_worker_rows_changed_total",
    )
    .await?;
    let updates: f64 = changed.values().sum();
    println!("{N_WRITES} writes to one key: {updates} row updates");
    assert!(updates < N_WRITES as f64 / 10.0, "{updates} row updates");
    let (version, _, value) = world.row("hot").await?.unwrap();
    assert_eq!(version, last);
    assert_eq!(api.read("hot").await?, Some(value));
    Ok(())
}

/// A worker that is there and can never store keeps nothing from one that can.
#[tokio::test]
async fn a_worker_that_can_never_store_leaves_the_shards_to_others() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    // Without the right to write rows.
    let role = format!("useless_{}", world.env.vars["POSTGRES_DB"]);
    world
        .sql(&format!(
            "create role {role} login password 'useless';
             grant select on all tables in schema public to {role}; grant update on shard_state to {role}"
        ))
        .await?;
    let mut env = world.env.replica()?;
    env.set("POSTGRES_USER", role)
        .set("POSTGRES_PASSWORD", "useless")
        .set("WORKER_REBALANCE_INTERVAL", "100ms");
    let useless = Worker {
        process: env.start(Role::Worker).await?,
        env,
    };
    assert_eq!(spread(&[&useless], 8).await?, [8]);
    let able = worker(&world).await?;
    assert_eq!(spread(&[&useless, &able], 4).await?, [4, 4]);
    let mut written = std::collections::HashMap::new();
    for n in 0..40 {
        let key = format!("k{n}");
        written.insert(key.clone(), api.write(&key, "1").await?);
    }
    world.all_stored(written.iter()).await?;
    let rests = metric(&useless.env.worker_url(), "birbnest_worker_rests_total").await?;
    assert!(rests.values().sum::<f64>() >= 1.0, "it went on trying");
    assert_eq!(n_ever_dead(&world).await?, 0);
    Ok(())
}

/// One that hangs and owns nothing is still a member. Its share goes to those that work, until it wakes up.
#[tokio::test]
async fn a_worker_that_hangs_without_a_shard_keeps_no_share() -> Result<()> {
    let world = World::shared_with(&[("NATS_SHARDS", "2"), ("WORKER_STALL_TIMEOUT", "2s")]).await?;
    let mut workers = [
        worker(&world).await?,
        worker(&world).await?,
        worker(&world).await?,
    ];
    let owned = spread_of(2, &workers.each_ref(), 1).await?;
    workers.rotate_left(owned.iter().position(|n| *n == 0).unwrap());
    let [idle, leaves, stays] = workers;
    eventually("it counts three", async || {
        let members = metric(&stays.env.worker_url(), "birbnest_worker_members").await?;
        Ok((members.values().sum::<f64>() == 3.0).then_some(()))
    })
    .await?;
    idle.process.pause().await?;
    leaves.process.kill().await?;
    assert_eq!(spread_of(2, &[&stays], 2).await?, [2]);
    idle.process.resume().await?;
    assert_eq!(spread_of(2, &[&idle, &stays], 1).await?, [1, 1]);
    Ok(())
}

/// Somebody else fetches from the consumer of a shard's owner, as a former owner might: what it takes is not lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_reader_of_the_consumer_took_is_stored_nevertheless() -> Result<()> {
    let world = World::shared_with(&[("NATS_SHARDS", "1")]).await?;
    let api = Arc::new(world.api().await?);
    let owner = worker(&world).await?;
    let first = api.write("first", "1").await?;
    world.stored("first", first).await?;
    let stream = format!("{}_0", world.env.vars["NATS_STREAM_NAME"]);
    let former: PullConsumer = world
        .jetstream()
        .await?
        .get_consumer_from_stream("birb-worker", stream)
        .await
        .map_err(|error| anyhow::anyhow!("no consumer: {error}"))?;
    let taking = async {
        let taken = AtomicU64::new(0);
        eventually("the former owner takes some messages", async || {
            let request = former
                .batch()
                .max_messages(5)
                .expires(Duration::from_millis(500));
            let mut messages = request.messages().await?;
            while let Some(Ok(_)) = messages.next().await {
                taken.fetch_add(1, Ordering::Relaxed);
            }
            Ok((taken.load(Ordering::Relaxed) >= 3).then_some(()))
        })
        .await
    };
    let writing = async {
        let mut written = std::collections::HashMap::new();
        for n in 0..200 {
            let key = format!("k{n}");
            written.insert(key.clone(), api.write(&key, "1").await?);
        }
        anyhow::Ok(written)
    };
    let ((), written) = tokio::try_join!(taking, writing)?;
    world.all_stored(written.iter()).await?;
    let log = owner.process.log()?;
    assert!(log.contains("another reader uses it"), "{log}");
    Ok(())
}

/// As `a_stalled_owner_loses_its_shards_and_writes_nothing_late`, with the defaults and for as long as a machine may
/// hang: every timeout of PostgreSQL, NATS and our own has passed when the owner goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_stopped_for_a_minute_writes_nothing_late() -> Result<()> {
    const STOPPED: Duration = Duration::from_secs(60);
    // WORKER_STALL_TIMEOUT, some looks that are a second apart, and half as much again for a machine that is busy.
    const TAKEN_OVER: Duration = Duration::from_secs(25);
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut env = world.env.replica()?;
    // What is in hand when it is stopped is written as soon as it goes on, if anything is.
    env.set("WORKER_BATCH_TIMEOUT", "10s");
    let stopped = Worker {
        process: env.start(Role::Worker).await?,
        env,
    };
    assert_eq!(spread(&[&stopped], 8).await?, [8]);
    // Nobody writes this key again: what comes late is not older than what is there.
    let once = api.write("once", "1").await?;
    for n in 0..20 {
        api.write(&format!("k{n}"), "\"old\"").await?;
    }
    let shard = world
        .config::<LogConfig>()?
        .nats_shards
        .shard_of(&Key::parse("once")?);
    let (url, label) = (stopped.env.worker_url(), format!("shard=\"{shard}\""));
    eventually("it is in hand", async || {
        let lag = counted(&url, "birbnest_log_lag", &label).await?;
        Ok((lag > 0.0).then_some(()))
    })
    .await?;
    stopped.process.pause().await?;
    let since = tokio::time::Instant::now();
    ensure!(world.row("once").await?.is_none(), "it is stored already");
    let env = world.env.replica()?;
    let heir = Worker {
        process: env.start(Role::Worker).await?,
        env,
    };
    let mut written = std::collections::HashMap::new();
    for n in 0..20 {
        let key = format!("k{n}");
        written.insert(key.clone(), api.write(&key, "\"new\"").await?);
    }
    world.stored("once", once).await?;
    world.all_stored(written.iter()).await?;
    let took = since.elapsed();
    ensure!(took < TAKEN_OVER, "the heir took {took:?}");
    // Behind the back of the nest: a late write of it would be seen.
    world
        .sql("delete from cache_entries where key = 'once'")
        .await?;
    let stored = async || {
        let rows = "select key, version, value, written_at, xmin from cache_entries order by key";
        let places = "select shard, base, applied_to from shard_state order by shard";
        anyhow::Ok((world.sql(rows).await?, world.sql(places).await?))
    };
    let before = stored().await?;
    // The one fixed time that a test waits: it is what is tested.
    tokio::time::sleep_until(since + STOPPED).await;
    stopped.process.resume().await?;
    eventually(
        "it finds that its shards are not its own any more",
        async || Ok(stopped.process.log()?.contains("lost shard").then_some(())),
    )
    .await?;
    let lost = "birbnest_worker_shards_lost_total";
    is_counted(&stopped.env.worker_url(), lost, "").await?;
    assert_eq!(spread(&[&stopped, &heir], 4).await?, [4, 4]);
    assert_eq!(stored().await?, before, "something was written late");
    for (key, version) in &written {
        assert_eq!(api.get(key).await?.version()?, *version);
    }
    println!(
        "stopped for {:?}; the heir had stored all after {took:?}",
        since.elapsed()
    );
    Ok(())
}
