//! Warming Redis stays within what Redis holds and a worker may do, and goes on after whatever was away.

use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use async_nats::jetstream::{
    consumer::pull,
    stream::{Config, StorageType, Stream},
};
use birb_nest_stack::{Options, RedisOptions, Role, Stack};
use reqwest::{Method, StatusCode};

use crate::{
    shown::{is_told, lacks, metric},
    world::{Answer, Api, PATIENCE, World, breakable, eventually, eventually_within},
};

/// Rows as if they had been written long ago, the last one newest: `n` keys that begin with `prefix`, as long as `length`,
/// whose values have `size` bytes.
async fn insert(
    world: &World<'_>,
    prefix: &str,
    n: u32,
    length: usize,
    size: u32,
) -> Result<Vec<String>> {
    let digits = length - prefix.len();
    world
        .sql(&format!(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select '{prefix}' || lpad(n::text, {digits}, '0'), n, false, now(), 'application/json', '',
                    convert_to('\"' || repeat('x', {size} - 2) || '\"', 'UTF8')
             from generate_series(1, {n}) n"
        ))
        .await?;
    Ok((1..=n).map(|n| format!("{prefix}{n:0digits$}")).collect())
}

async fn rehydrate(api: &Api, body: serde_json::Value) -> Result<Answer> {
    let body = Some(body.to_string());
    api.send(Method::POST, "/v1/rehydrate", body).await
}

async fn n_warm(world: &World<'_>, keys: &[String]) -> Result<usize> {
    let places: Vec<String> = keys.iter().map(|key| format!("birb:e:{key}")).collect();
    let found: Vec<Option<String>> = redis::cmd("MGET")
        .arg(places)
        .query_async(&mut world.redis().await?)
        .await?;
    let entries = found.iter().flatten();
    Ok(entries.filter(|value| value.starts_with('E')).count())
}

async fn redis_info(world: &World<'_>, name: &str) -> Result<u64> {
    let info: String = redis::cmd("INFO")
        .query_async(&mut world.redis().await?)
        .await?;
    let line = info.lines().find_map(|line| line.strip_prefix(name));
    Ok(line.unwrap_or(":").trim_start_matches(':').parse()?)
}

/// How often the worker of `world` counted a request that went so; none while it does not answer yet.
async fn counted(world: &World<'_>, kind: &str, how: &str) -> Result<f64> {
    let name = "birbnest_worker_rehydrations_total";
    let counts = metric(&world.env.worker_url(), name).await;
    let counts = counts.unwrap_or_default();
    let counts = counts.iter().filter(|(labels, _)| {
        labels.contains(&format!("kind=\"{kind}\"")) && labels.contains(&format!("how=\"{how}\""))
    });
    Ok(counts.map(|(_, n)| n).sum())
}

async fn all_are_warm(world: &World<'_>, keys: &[String]) -> Result<()> {
    eventually("all are warm", async || {
        Ok((n_warm(world, keys).await? == keys.len()).then_some(()))
    })
    .await
}

/// Asks for `keys`, and waits until a worker has tried to warm them and failed.
async fn ask_in_vain(world: &World<'_>, api: &Api, keys: &[String]) -> Result<()> {
    rehydrate(api, serde_json::json!({ "keys": keys }))
        .await?
        .expect(StatusCode::ACCEPTED)?;
    eventually("the request waits", async || {
        Ok((counted(world, "keys", "waits").await? >= 1.0).then_some(()))
    })
    .await
}

#[tokio::test]
async fn what_comes_back_into_an_empty_redis_fits_its_maxmemory() -> Result<()> {
    const MAXMEMORY: u64 = 8 << 20;
    let stack = Stack::fresh_with(Options {
        redis: RedisOptions {
            maxmemory_bytes: Some(MAXMEMORY),
            ..RedisOptions::default()
        },
        ..Options::default()
    })
    .await?;
    let mut world = World::on(&stack).await?;
    world.env.set("WORKER_REHYDRATE_MAX_KEYS", "1000000");
    // Several times what Redis can hold.
    let keys = insert(&world, "k", 3000, 10, 10_000).await?;
    let worker = world.worker().await?;
    // JSON as it is, and as bytes, which take more room.
    for (n_flushes, content_type) in [(1.0, "application/json"), (2.0, "application/octet-stream")]
    {
        let change = format!("update cache_entries set content_type = '{content_type}'");
        world.sql(&change).await?;
        world.flush_redis().await?;
        eventually("it is through", async || {
            Ok((counted(&world, "everything", "ended").await? >= n_flushes).then_some(()))
        })
        .await?;
        let n_warm_keys = n_warm(&world, &keys).await?;
        let newest = n_warm(&world, &keys[keys.len() - n_warm_keys..]).await?;
        let (used, evicted) = (
            redis_info(&world, "used_memory").await?,
            redis_info(&world, "evicted_keys").await?,
        );
        println!("{n_warm_keys} keys, {used} bytes used, {evicted} evicted");
        ensure!((100..800).contains(&n_warm_keys), "{n_warm_keys} keys");
        ensure!(
            newest == n_warm_keys,
            "{newest} of the newest {n_warm_keys}"
        );
        ensure!(used < MAXMEMORY && evicted == 0, "{used} bytes, {evicted}");
    }
    let log = worker.log()?;
    for line in [
        "warming Redis with what was written last",
        "warmed Redis with what was written last",
    ] {
        ensure!(log.contains(line), "no line `{line}`: {log}");
    }
    Ok(())
}

/// How many keys of a prefix are warm is read at the workers while they are at it.
#[tokio::test]
async fn how_far_warming_has_come_can_be_read() -> Result<()> {
    const N: u32 = 2000;
    let mut world = World::shared().await?;
    world.env.set("WORKER_REHYDRATE_RATE", "500");
    let api = world.api().await?;
    insert(&world, "k", N, 10, 10).await?;
    let _worker = world.worker().await?;
    let n_warmed = async || {
        let name = "birbnest_worker_keys_warmed_total";
        let counts = metric(&world.env.worker_url(), name).await?;
        anyhow::Ok(counts.values().sum::<f64>())
    };
    let before = n_warmed().await?;
    let asked = rehydrate(&api, serde_json::json!({ "prefix": "k" })).await?;
    let asked = asked.expect(StatusCode::ACCEPTED)?.json()?;
    ensure!(asked["requested"] == N, "{asked}");
    let seen = RefCell::new(Vec::new());
    eventually("it has come to the end", async || {
        let n = n_warmed().await? - before;
        if seen.borrow().last() != Some(&n) {
            seen.borrow_mut().push(n);
        }
        Ok((n >= f64::from(N)).then_some(()))
    })
    .await?;
    let seen = seen.into_inner();
    println!("seen: {seen:?}");
    ensure!(seen.last() == Some(&f64::from(N)), "{seen:?}");
    ensure!(seen.is_sorted(), "{seen:?}");
    let midway = seen.iter().filter(|n| (1.0..f64::from(N)).contains(*n));
    ensure!(midway.count() >= 2, "{seen:?}");
    Ok(())
}

#[tokio::test]
async fn warming_is_no_faster_than_its_rate() -> Result<()> {
    const N: u32 = 3000;
    let mut world = World::shared().await?;
    world.env.set("WORKER_REHYDRATE_RATE", "500");
    let api = world.api().await?;
    let keys = insert(&world, "k", N, 10, 10).await?;
    let _worker = world.worker().await?;
    let started = Instant::now();
    rehydrate(&api, serde_json::json!({ "prefix": "k" }))
        .await?
        .expect(StatusCode::ACCEPTED)?;
    all_are_warm(&world, &keys).await?;
    let took = started.elapsed();
    println!("{N} keys took {took:?}");
    // Between its six pages a worker rests so long that each has its second.
    ensure!(took >= Duration::from_secs(5), "{took:?}");
    Ok(())
}

/// Neither a NATS that was restarted nor a PostgreSQL that is away for longer than anything is tried ends a job.
#[tokio::test]
async fn a_job_goes_on_after_nats_and_postgresql_were_away() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let keys = insert(&world, "job:", 1200, 10, 10).await?;
    let job = rehydrate(&api, serde_json::json!({ "prefix": "job:" }))
        .await?
        .expect(StatusCode::ACCEPTED)?
        .json()?["job"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    stack.nats.restart().await?;
    stack.postgres.kill().await?;
    // It is not ready without PostgreSQL.
    let worker = world.env.spawn(Role::Worker)?;
    is_told(&worker, "probes and metrics are on").await?;
    lacks(&world.env.worker_url(), "database").await?;
    eventually_within(4 * PATIENCE, "it is tried again and again", async || {
        Ok((counted(&world, "prefix", "waits").await? >= 4.0).then_some(()))
    })
    .await?;
    let log = worker.log()?;
    let waits = log
        .lines()
        .find(|line| line.contains("warming Redis with a prefix waits"));
    ensure!(
        waits.is_some_and(|line| line.contains(&job) && line.contains("job:")),
        "{log}"
    );
    stack.postgres.start().await?;
    eventually_within(2 * PATIENCE, "it is done", async || {
        Ok((counted(&world, "prefix", "ended").await? >= 1.0).then_some(()))
    })
    .await?;
    ensure!(n_warm(&world, &keys).await? == keys.len());
    Ok(())
}

#[tokio::test]
async fn a_job_waits_for_redis() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let keys = insert(&world, "job:", 1200, 10, 10).await?;
    stack.redis.kill().await?;
    rehydrate(&api, serde_json::json!({ "prefix": "job:" }))
        .await?
        .expect(StatusCode::ACCEPTED)?;
    let _worker = world.env.spawn(Role::Worker)?;
    eventually_within(2 * PATIENCE, "it waits", async || {
        Ok((counted(&world, "prefix", "waits").await? >= 1.0).then_some(()))
    })
    .await?;
    stack.redis.start().await?;
    eventually_within(2 * PATIENCE, "it is done", async || {
        Ok((counted(&world, "prefix", "ended").await? >= 1.0).then_some(()))
    })
    .await?;
    ensure!(n_warm(&world, &keys).await? == keys.len());
    Ok(())
}

/// A try that failed leaves tokens behind: they are gone when the request comes again, and not taken for those of
/// somebody else.
#[tokio::test]
async fn keys_of_which_redis_refused_one_are_all_warm_once_it_takes_that_one() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let keys = insert(&world, "k", 100, 10, 10).await?;
    let mut redis = world.redis().await?;
    // For a list no token can be taken.
    let last = format!("birb:e:{}", keys[keys.len() - 1]);
    let mut push = redis::cmd("LPUSH");
    let () = push.arg(&last).arg("").query_async(&mut redis).await?;
    ask_in_vain(&world, &api, &keys).await?;
    let mut delete = redis::cmd("DEL");
    let () = delete.arg(&last).query_async(&mut redis).await?;
    all_are_warm(&world, &keys).await
}

/// Redis gives out tokens, and takes nothing in their place: the request comes again.
#[tokio::test]
async fn keys_that_redis_did_not_take_are_all_warm_once_it_takes_them() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let keys = insert(&world, "k", 100, 10, 10).await?;
    let mut redis = world.redis().await?;
    let mut allow = async |rule: &str| -> Result<()> {
        let mut command = redis::cmd("ACL");
        let command = command.arg("SETUSER").arg("default").arg(rule);
        Ok(command.exec_async(&mut redis).await?)
    };
    allow("-evalsha").await?;
    ask_in_vain(&world, &api, &keys).await?;
    allow("+evalsha").await?;
    all_are_warm(&world, &keys).await
}

/// What PostgreSQL has may be old while the log does not answer: it is not for Redis, and the request comes again.
#[tokio::test]
async fn keys_that_cannot_be_judged_without_the_log_are_asked_for_again() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let keys = insert(&world, "k", 100, 10, 10).await?;
    let jetstream = world.jetstream().await?;
    for shard in 0..8 {
        let name = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
        jetstream.delete_stream(name).await?;
    }
    ask_in_vain(&world, &api, &keys).await?;
    ensure!(n_warm(&world, &keys).await? == 0);
    world.env.setup().await?;
    all_are_warm(&world, &keys).await
}

/// How many there are is said if PostgreSQL can tell in time; they are warmed in any case.
#[tokio::test]
async fn a_prefix_is_warmed_though_its_keys_could_not_be_counted() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("POSTGRES_TIMEOUT", "1s");
    let api = Api::start(&env).await?;
    let keys = insert(&world, "k", 100, 10, 10).await?;
    let lock = "begin; lock table cache_entries in access exclusive mode; select pg_sleep(60)";
    let asking = async {
        eventually("the table is locked", async || {
            let held =
                "select count(*) from pg_locks where mode = 'AccessExclusiveLock' and granted
                and relation = 'cache_entries'::regclass
                and database = (select oid from pg_database where datname = current_database())";
            Ok((world.sql(held).await?.trim() == "1").then_some(()))
        })
        .await?;
        let asked = rehydrate(&api, serde_json::json!({ "prefix": "k" })).await?;
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
            where query like '%pg_sleep(60)' and pid <> pg_backend_pid() and datname = current_database()";
        world.sql(end).await?;
        anyhow::Ok(asked)
    };
    let (locked, asked) = tokio::join!(world.sql(lock), asking);
    ensure!(locked.is_err(), "{locked:?}");
    let asked = asked?.expect(StatusCode::ACCEPTED)?.json()?;
    ensure!(asked["requested"] == 0 && asked["more"] == true, "{asked}");
    let _worker = world.worker().await?;
    all_are_warm(&world, &keys).await
}

/// Fills the queue but for less than a MiB, with lines that are no keys: nobody has anything to do for them.
async fn fill_queue(world: &World<'_>) -> Result<(Stream, u64)> {
    let jetstream = world.jetstream().await?;
    let queue = world.env.vars["NATS_REHYDRATE_STREAM_NAME"].clone();
    let queue = jetstream.get_stream(queue).await?;
    let config = &queue.cached_info().config;
    ensure!(config.storage == StorageType::File, "{config:?}");
    let nothing = bytes::Bytes::from(vec![1u8; 1 << 20]);
    let mut n_filled = 0;
    let subject = config.subjects[0].clone();
    while jetstream
        .publish(subject.clone(), nothing.clone())
        .await?
        .await
        .is_ok()
    {
        n_filled += 1;
        ensure!(n_filled < 20, "it is never full");
    }
    Ok((queue, n_filled))
}

#[tokio::test]
async fn an_empty_redis_is_warmed_though_the_workers_could_not_be_asked_at_first() -> Result<()> {
    let stack = breakable().await?;
    let mut world = World::on(&stack).await?;
    world.env.set("WORKER_REHYDRATE_MAX_KEYS", "1000000");
    let api = world.api().await?;
    let keys = insert(&world, "k", 100, 10, 10).await?;
    let (queue, _) = fill_queue(&world).await?;
    // To the last byte, nearly.
    let (jetstream, subject) = (
        world.jetstream().await?,
        &queue.cached_info().config.subjects[0],
    );
    for size in [100_000, 1_000, 1] {
        let little = bytes::Bytes::from(vec![1u8; size]);
        while jetstream
            .publish(subject.clone(), little.clone())
            .await?
            .await
            .is_ok()
        {}
    }
    stack.redis.kill().await?;
    stack.redis.start().await?;
    eventually("the workers cannot be asked", async || {
        Ok(api
            .process
            .log()?
            .contains("which is empty; they will be")
            .then_some(()))
    })
    .await?;
    queue.purge().await?;
    let _worker = world.worker().await?;
    all_are_warm(&world, &keys).await
}

/// A queue that is nearly full takes some of the keys, says so, and loses none of those.
#[tokio::test]
async fn keys_that_do_not_fit_the_queue_are_refused_and_those_that_it_took_are_warmed() -> Result<()>
{
    // As long as keys can be: 119 of them fit a request.
    const LENGTH: usize = 512;
    let mut world = World::shared().await?;
    world.env.set("API_MAX_BATCH", "3000");
    let api = world.api().await?;
    let keys = insert(&world, "q", 3000, LENGTH, 10).await?;
    let (mut queue, n_filled) = fill_queue(&world).await?;
    let ask = async || rehydrate(&api, serde_json::json!({ "keys": keys })).await;
    ask().await?.refused("UNAVAILABLE")?;
    let n_taken = queue.info().await?.state.messages - n_filled;
    ensure!((1..26).contains(&n_taken), "{n_taken} requests");
    let _worker = world.worker().await?;
    eventually_within(4 * PATIENCE, "what it took is warm", async || {
        Ok((n_warm(&world, &keys).await? >= n_taken as usize * 119).then_some(()))
    })
    .await?;
    let n_warmed = n_warm(&world, &keys).await?;
    ensure!(n_warmed == n_taken as usize * 119, "{n_warmed} are warm");
    let asked = ask().await?.expect(StatusCode::ACCEPTED)?;
    ensure!(asked.body == r#"{"requested":3000}"#, "{asked:?}");
    eventually_within(4 * PATIENCE, "all are warm", async || {
        Ok((n_warm(&world, &keys).await? == keys.len()).then_some(()))
    })
    .await
}

/// An earlier release had the queue in memory, and gave up what was tried three times. Several `setup` may find it at once.
#[tokio::test]
async fn the_queue_of_an_earlier_release_is_taken_over() -> Result<()> {
    let world = World::shared().await?;
    let jetstream = world.jetstream().await?;
    let name = world.env.vars["NATS_REHYDRATE_STREAM_NAME"].clone();
    let stream = jetstream.get_stream(&name).await?;
    let now = stream.cached_info().config.clone();
    jetstream.delete_stream(&name).await?;
    let earlier = Config {
        storage: StorageType::Memory,
        max_age: Duration::from_secs(600),
        ..now.clone()
    };
    jetstream.create_stream(earlier).await?;
    let racers: Vec<_> = (0..3)
        .map(|_| world.env.spawn(Role::Setup))
        .collect::<Result<_>>()?;
    for racer in &racers {
        let status = racer.wait().await?;
        ensure!(status.success(), "{}", racer.log()?);
    }
    let stream = jetstream.get_stream(&name).await?;
    let config = &stream.cached_info().config;
    ensure!(
        config.storage == StorageType::File && config.max_age.is_zero(),
        "{config:?}"
    );
    let earlier = pull::Config {
        durable_name: Some("birb-rehydrate".to_owned()),
        max_deliver: 3,
        ack_wait: Duration::from_secs(30),
        ..pull::Config::default()
    };
    stream.create_consumer(earlier).await?;
    let api = world.api().await?;
    let keys = insert(&world, "k", 3, 10, 10).await?;
    let _worker = world.worker().await?;
    rehydrate(&api, serde_json::json!({ "keys": keys }))
        .await?
        .expect(StatusCode::ACCEPTED)?;
    eventually("they are warm", async || {
        Ok((n_warm(&world, &keys).await? == keys.len()).then_some(()))
    })
    .await?;
    let consumer = stream
        .get_consumer::<pull::Config>("birb-rehydrate")
        .await
        .map_err(|error| anyhow!(error))?;
    let n_tries = consumer.cached_info().config.max_deliver;
    ensure!(n_tries == -1, "{n_tries}");
    Ok(())
}
