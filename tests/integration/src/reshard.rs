//! `birb-nest setup --reshard N`: nothing is lost, versions go on growing, and it goes on wherever it was interrupted.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::{Environment, Process, Role, Stack, shared};
use futures::{TryStreamExt, future::try_join_all};
use reqwest::{Method, StatusCode};

use crate::{
    refusals::REFUSED,
    world::{Answer, Api, World, breakable, eventually, write_all},
};

/// A nest of its own on `stack`, set up. A write that is slow means that this machine is busy.
pub async fn patient(stack: &Stack) -> Result<World<'_>> {
    let mut world = World::on(stack).await?;
    world.env.set("NATS_PUBLISH_TIMEOUT", "20s");
    Ok(world)
}

/// `setup --reshard` of this nest, running. With one server there are no late acknowledgements to wait for.
pub fn resharding(env: &Environment, target: u16) -> Result<Process> {
    let mut env = env.clone();
    env.set("NATS_PUBLISH_TIMEOUT", "2s");
    env.spawn_with(Role::Setup, &["--reshard".to_owned(), target.to_string()])
}

/// Runs it to its end, which is this exit code, and returns what it said.
pub async fn reshard_ends(env: &Environment, target: u16, code: i32) -> Result<String> {
    let process = resharding(env, target)?;
    let status = tokio::time::timeout(Duration::from_secs(60), process.wait())
        .await
        .with_context(|| format!("it goes on:\n{}", process.last_lines(20)))??;
    let log = process.log()?;
    ensure!(status.code() == Some(code), "{status}, not {code}:\n{log}");
    Ok(log)
}

/// A process that had another number of shards ends by itself and says why.
pub async fn is_out_of_date(process: &Process, shards: u16) -> Result<()> {
    let status = tokio::time::timeout(Duration::from_secs(30), process.wait())
        .await
        .with_context(|| format!("it goes on:\n{}", process.last_lines(20)))??;
    let log = process.log()?;
    ensure!(status.code() == Some(REFUSED), "{status}:\n{log}");
    let sentence = format!("it has a nest of {shards} shards, but NATS_SHARDS is");
    ensure!(log.contains(&sentence), "{log}");
    Ok(())
}

/// Every key has the version that was acknowledged, with Redis and without.
pub async fn all_there(
    world: &World<'_>,
    api: &Api,
    versions: &HashMap<String, u64>,
) -> Result<()> {
    for flushed in [false, true] {
        if flushed {
            world.flush_redis().await?;
        }
        for (key, version) in versions {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(
                read.version()? == *version,
                "{key}: {version} was acknowledged, this is read: {read:?}"
            );
        }
    }
    Ok(())
}

pub async fn streams(world: &World<'_>) -> Result<usize> {
    let prefix = format!("{}_", world.env.vars["NATS_STREAM_NAME"]);
    let names: Vec<String> = world
        .jetstream()
        .await?
        .stream_names()
        .try_collect()
        .await?;
    let is_shard = |name: &&String| {
        let rest = name.strip_prefix(&prefix);
        rest.is_some_and(|rest| rest.parse::<u16>().is_ok())
    };
    Ok(names.iter().filter(is_shard).count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nest_gets_another_number_of_shards_and_keeps_everything() -> Result<()> {
    let mut world = patient(shared().await?).await?;
    let mut api = Arc::new(world.api().await?);
    let mut worker = world.worker().await?;
    let mut versions = write_all(&api, "k", 200).await?;
    let gone = api.write("gone", "1").await?;
    api.delete("gone").await?.expect(StatusCode::NO_CONTENT)?;
    let mut bases = Vec::new();
    for target in [12u16, 3] {
        // Some of it is only in the log when it begins.
        versions.extend(write_all(&api, &format!("just-before-{target}-"), 100).await?);
        let said = reshard_ends(&world.env, target, 0).await?;
        ensure!(said.contains(&format!("NATS_SHARDS={target}")), "{said}");
        is_out_of_date(&api.process, target).await?;
        is_out_of_date(&worker, target).await?;
        ensure!(streams(&world).await? == usize::from(target));
        let refused = api_and_worker_refused(&world.env).await?;
        ensure!(refused.contains("NATS_SHARDS"), "{refused}");

        world.env.set("NATS_SHARDS", target.to_string());
        api = Arc::new(world.api().await?);
        worker = world.worker().await?;
        all_there(&world, &api, &versions).await?;
        ensure!(api.get("gone").await?.status == StatusCode::NOT_FOUND);
        // Conditions are judged by the versions from before, and what is written is newer than all of them.
        let mut newest = versions.values().copied().max().context("some")?.max(gone);
        for key in ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7"] {
            let (known, wrong) = (format!("\"{}\"", versions[key]), "\"1\"");
            let mismatch = api.post_if(key, &[("if-match", wrong)], "0").await?;
            ensure!(
                mismatch.status == StatusCode::PRECONDITION_FAILED,
                "{mismatch:?}"
            );
            ensure!(mismatch.version()? == versions[key]);
            let written = api.post_if(key, &[("if-match", &known)], "1").await?;
            let version = written.version()?;
            ensure!(version > newest, "{version} is not above {newest}");
            newest = newest.max(versions[key]);
            versions.insert(key.to_owned(), version);
        }
        for (key, version) in write_all(&api, "k", 100).await? {
            ensure!(version > versions[&key], "{key} went back to {version}");
            versions.insert(key, version);
        }
        world.all_stored(versions.iter()).await?;
        all_there(&world, &api, &versions).await?;
        let found = world
            .sql("select distinct base from shard_state order by base")
            .await?;
        bases.push(found.trim().parse::<u64>()?);
        world.env.setup().await?;
    }
    ensure!(bases[0] < bases[1], "{bases:?}");
    Ok(())
}

/// Processes that still have the old number are refused at start.
async fn api_and_worker_refused(env: &Environment) -> Result<String> {
    let mut said = String::new();
    for role in [Role::Api, Role::Worker, Role::Setup] {
        let process = env.spawn(role)?;
        let status = tokio::time::timeout(Duration::from_secs(30), process.wait()).await??;
        let log = process.log()?;
        ensure!(status.code() == Some(REFUSED), "{role}: {status}\n{log}");
        said.push_str(&log);
    }
    Ok(said)
}

/// One writer per key: what it was told, and what may be newer than that.
#[derive(Default)]
struct Told {
    acknowledged: u64,
    /// Redis could not be told of it: it may be missed for a while.
    is_pending: bool,
    n_writes: u64,
    n_refused: u64,
}

/// Writes a key and reads it back until told to stop: an answer is a value, or a clean 503.
async fn write_on(urls: [Arc<Api>; 2], key: String, stop: Arc<AtomicBool>) -> Result<Told> {
    let clean = |answer: &Answer| -> Result<bool> {
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            answer.refused("UNAVAILABLE")?;
            return Ok(false);
        }
        Ok(true)
    };
    let mut told = Told::default();
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (one, other) = (&urls[n % 2], &urls[(n + 1) % 2]);
        // They end in the middle of it, and then do not answer any more.
        let Ok(written) = one.post(&key, format!("{{\"value\":{n}}}")).await else {
            continue;
        };
        if clean(&written)? {
            told.is_pending = !written.header("birb-cache").is_empty();
            let version = written.expect(StatusCode::CREATED)?.version()?;
            ensure!(
                version > told.acknowledged,
                "{key} went from {} to {version}",
                told.acknowledged
            );
            told.acknowledged = version;
            told.n_writes += 1;
        } else {
            told.n_refused += 1;
        }
        let headers: &[(&str, &str)] = match n % 3 {
            0 => &[("cache-control", "no-cache")],
            _ => &[],
        };
        let Ok(read) = other.ask(Method::GET, &key, headers).await else {
            continue;
        };
        let may_miss_it = told.is_pending && headers.is_empty();
        if clean(&read)? && told.acknowledged > 0 && !may_miss_it {
            let version = read.expect(StatusCode::OK)?.version()?;
            ensure!(
                version == told.acknowledged,
                "{key}: {} was acknowledged, {version} read",
                told.acknowledged
            );
        }
    }
    Ok(told)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_during_a_resharding_are_refused_cleanly_and_none_is_lost() -> Result<()> {
    let stack = breakable().await?;
    let mut world = patient(&stack).await?;
    let replica = world.env.replica()?;
    let apis = [
        Arc::new(world.api().await?),
        Arc::new(Api::start(&replica).await?),
    ];
    let workers = [world.eager_worker().await?, world.eager_worker().await?];
    let stop = Arc::new(AtomicBool::new(false));
    let keys: Vec<String> = (0..16).map(|n| format!("k{n}")).collect();
    let writers: Vec<_> = keys
        .iter()
        .map(|key| tokio::spawn(write_on(apis.clone(), key.clone(), stop.clone())))
        .collect();
    eventually("all of them write", async || {
        let rows = world.sql("select count(*) from cache_entries").await?;
        Ok((rows.trim() == "16").then_some(()))
    })
    .await?;
    let old = resharding(&world.env, 5)?;
    let status = old.wait().await?;
    ensure!(status.success(), "{}", old.log()?);
    for process in [&apis[0].process, &apis[1].process, &workers[0], &workers[1]] {
        is_out_of_date(process, 5).await?;
    }
    stop.store(true, Ordering::Relaxed);
    let told: Vec<Told> = try_join_all(writers)
        .await?
        .into_iter()
        .collect::<Result<_>>()?;
    let (n_writes, n_refused) = told.iter().fold((0, 0), |(writes, refused), told| {
        (writes + told.n_writes, refused + told.n_refused)
    });
    println!("{n_writes} writes were acknowledged, {n_refused} refused");
    ensure!(n_refused > 0, "nothing was refused: it was not under load");

    world.env.set("NATS_SHARDS", "5");
    let api = world.api().await?;
    let _worker = world.worker().await?;
    for (key, told) in keys.iter().zip(&told) {
        let read = api.get(key).await?.expect(StatusCode::OK)?.version()?;
        ensure!(
            read == told.acknowledged,
            "{key}: {} was acknowledged, {read} is there",
            told.acknowledged
        );
        ensure!(api.write(key, "\"new\"").await? > told.acknowledged);
    }
    Ok(())
}

/// Wherever it dies, the nest is closed or whole, plain `setup` keeps off, and running it again ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_any_step_it_goes_on_where_it_ended() -> Result<()> {
    let stack = breakable().await?;
    let mut world = patient(&stack).await?;
    let steps = [
        (6, "recorded"),
        (4, "closed-one"),
        (6, "made"),
        (4, "closed"),
        (6, "stored"),
        (4, "numbered"),
        (6, "purged-one"),
        (4, "opened-one"),
        (6, "opened"),
        (4, "deleted-one"),
        (6, "numbered"),
        (4, "deleted"),
    ];
    let mut versions = HashMap::new();
    reshard_ends(&world.env, 4, 0).await?;
    world.env.set("NATS_SHARDS", "4");
    for (target, step) in steps {
        let api = Arc::new(world.api().await?);
        let worker = world.worker().await?;
        all_there(&world, &api, &versions).await?;
        for (key, version) in write_all(&api, "k", 40).await? {
            let before = versions.insert(key.clone(), version).unwrap_or(0);
            ensure!(
                version > before,
                "{step}: {key} went from {before} to {version}"
            );
        }
        let mut dying = world.env.clone();
        dying.set("BIRBNEST_DIES_AFTER", step);
        let killed = resharding(&dying, target)?;
        let status = killed.wait().await?;
        let log = killed.log()?;
        ensure!(
            status.code().is_none() && log.contains(&format!("BIRBNEST_DIES_AFTER={step}")),
            "{step}: {status}\n{log}"
        );
        let setup = world.env.spawn(Role::Setup)?;
        let status = setup.wait().await?;
        ensure!(status.code() == Some(REFUSED), "{step}: {}", setup.log()?);
        ensure!(setup.log()?.contains("is being resharded"), "{step}");
        let wrong = reshard_ends(&world.env, 7, REFUSED).await?;
        ensure!(wrong.contains("finish that first"), "{step}: {wrong}");

        let said = reshard_ends(&world.env, target, 0).await?;
        ensure!(said.contains("going on"), "{step}: {said}");
        is_out_of_date(&api.process, target).await?;
        is_out_of_date(&worker, target).await?;
        ensure!(streams(&world).await? == usize::from(target), "{step}");
        world.env.set("NATS_SHARDS", target.to_string());
    }
    let api = world.api().await?;
    all_there(&world, &api, &versions).await
}

/// Without a worker nothing is stored: it waits, writes are refused, reads are not, and it can be given up.
#[tokio::test]
async fn until_it_is_decided_it_can_be_given_up() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let versions = write_all(&api, "k", 40).await?;
    let waiting = resharding(&world.env, 12)?;
    eventually("writes are refused", async || {
        let answer = api.post("new", "{\"value\":1}").await?;
        if answer.status == StatusCode::CREATED {
            return Ok(None);
        }
        answer.refused("UNAVAILABLE").map(Some)
    })
    .await?;
    eventually("it tells how far it is", async || {
        Ok(waiting.log()?.contains("messages to go").then_some(()))
    })
    .await?;
    all_there(&world, &api, &versions).await?;
    let conditional = api.post_if("k0", &[("if-match", "*")], "1").await?;
    conditional.refused("UNAVAILABLE")?;
    waiting.kill().await?;
    let said = reshard_ends(&world.env, 8, 0).await?;
    ensure!(said.contains("is given up"), "{said}");
    ensure!(streams(&world).await? == 8);
    world.env.setup().await?;
    for (key, version) in &versions {
        eventually("writes are taken again", async || {
            let answer = api.post(key, "{\"value\":2}").await?;
            if answer.status == StatusCode::SERVICE_UNAVAILABLE {
                return Ok(None);
            }
            ensure!(answer.expect(StatusCode::CREATED)?.version()? > *version);
            Ok(Some(()))
        })
        .await?;
    }
    let _worker = world.worker().await?;
    world.all_stored(versions.iter()).await
}
