//! `birb-nest setup --reshard N` over a nest that is not well: dead letters, a log that lost its tail, processes that hang.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use birb_nest_stack::{Environment, Role, shared};
use futures::future::try_join_all;
use reqwest::{Method, StatusCode};

use crate::{
    refusals::{REFUSED, TRY_AGAIN},
    reshard::{all_there, is_out_of_date, patient, reshard_ends, resharding, streams},
    world::{Api, World, breakable, eventually, write_all},
};

async fn n_dead_keys(world: &World<'_>, n: usize) -> Result<()> {
    eventually("so many keys are dead", async || {
        let dead = world.sql("select key from dead_keys").await?;
        Ok((dead.lines().count() == n).then_some(()))
    })
    .await
}

/// A dead letter is retried by the owner of the shard that its key belongs to now, and a later one takes its place.
#[tokio::test]
async fn dead_letters_belong_to_the_new_shards() -> Result<()> {
    let mut world = patient(shared().await?).await?;
    world
        .env
        .set("WORKER_DEAD_LETTER_RETRY", "100ms")
        .set("NATS_DLQ_MAX_RETRIES", "0");
    world.sql(crate::dead_letters::REFUSE).await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let (old, again) = (
        api.write("poison-1", "1").await?,
        api.write("poison-2", "1").await?,
    );
    n_dead_keys(&world, 2).await?;
    let beyond = world
        .sql("select count(*) from dead_keys where shard >= 2")
        .await?;
    ensure!(beyond.trim() != "0", "one of them must lose its shard");
    reshard_ends(&world.env, 2, 0).await?;
    is_out_of_date(&api.process, 2).await?;
    is_out_of_date(&worker, 2).await?;
    world.env.set("NATS_SHARDS", "2");
    let api = world.api().await?;
    let _worker = world.worker().await?;
    for (key, version) in [("poison-1", old), ("poison-2", again)] {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == version, "{read:?}");
    }
    // A newer refused write of one of them: the letter before it leaves the stream.
    let newer = api.write("poison-2", "2").await?;
    eventually("the newer one is a dead letter", async || {
        let sql = format!("select key from dead_keys where version = {newer}");
        Ok((world.sql(&sql).await?.trim() == "poison-2").then_some(()))
    })
    .await?;
    let name = &world.env.vars["NATS_DLQ_STREAM_NAME"];
    eventually("two letters are left", async || {
        let stream = world.jetstream().await?.get_stream(name).await?;
        Ok((stream.cached_info().state.messages == 2).then_some(()))
    })
    .await?;
    world.sql("drop trigger refuse on cache_entries").await?;
    api.send(Method::POST, "/v1/dead-letters/replay", None)
        .await?
        .expect(StatusCode::ACCEPTED)?;
    world.stored("poison-1", old).await?;
    world.stored("poison-2", newer).await?;
    n_dead_keys(&world, 0).await
}

/// A log that lost its tail begins another life first, also when the resharding found it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_lost_its_tail_is_mended_before_it_is_resharded() -> Result<()> {
    let stack = breakable().await?;
    let mut world = patient(&stack).await?;
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let before = write_all(&api, "before", 40).await?;
    let copy = stack.nats.snapshot().await?;
    let lost = write_all(&api, "lost", 40).await?;
    world.all_stored(lost.iter()).await?;
    api.process.kill().await?;
    worker.kill().await?;
    stack.nats.kill().await?;
    stack.nats.restore(&copy).await?;
    stack.nats.start().await?;
    let process = resharding(&world.env, 5)?;
    eventually("it is noticed", async || {
        Ok(process.log()?.contains("lost its tail").then_some(()))
    })
    .await?;
    let worker = world.worker().await?;
    let status = process.wait().await?;
    ensure!(status.success(), "{}", process.log()?);
    is_out_of_date(&worker, 5).await?;
    world.env.set("NATS_SHARDS", "5");
    let api = Arc::new(world.api().await?);
    all_there(&world, &api, &before).await?;
    all_there(&world, &api, &lost).await?;
    for (key, version) in write_all(&api, "lost", 40).await? {
        ensure!(version > lost[&key], "{key} went back to {version}");
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_resharded_is_refused_and_left_alone() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let said = reshard_ends(&world.env, 8, REFUSED).await?;
    ensure!(said.contains("has 8 shards already"), "{said}");
    // clap's own words, and its exit code.
    for wrong in [0, 65] {
        let said = reshard_ends(&world.env, wrong, 2).await?;
        ensure!(said.contains("whole number from 1 to 64"), "{said}");
    }
    let mut env = world.env.clone();
    env.set("NATS_STREAM_MAX_BYTES", "100000GiB");
    let said = reshard_ends(&env, 9, REFUSED).await?;
    ensure!(said.contains("do not fit its file store"), "{said}");
    for (variable, value) in [("NATS_URL", "nats://127.0.0.1:1"), ("POSTGRES_PORT", "1")] {
        let mut env = world.env.clone();
        env.set(variable, value);
        reshard_ends(&env, 9, TRY_AGAIN).await?;
    }
    let nothing = World::not_set_up(shared().await?).await?;
    let said = reshard_ends(&nothing.env, 9, REFUSED).await?;
    ensure!(said.contains("there is no nest to reshard"), "{said}");
    ensure!(streams(&world).await? == 8);
    let state = world
        .sql("select shards, resharding_to is null from nest_state")
        .await?;
    ensure!(state.trim() == "8|t", "{state}");
    api.write("k", "1").await?;
    world.env.setup().await
}

/// A worker that is stopped while it stores holds the change up, and loses nothing: another one takes its shards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_hangs_does_not_hold_it_up() -> Result<()> {
    let stack = breakable().await?;
    let mut world = patient(&stack).await?;
    world.env.set("WORKER_STALL_TIMEOUT", "2s");
    let api = Arc::new(world.api().await?);
    let hanging = world.worker().await?;
    // It owns every shard by then.
    let stored = write_all(&api, "k", 40).await?;
    world.all_stored(stored.iter()).await?;
    hanging.pause().await?;
    let versions = write_all(&api, "k", 40).await?;
    let process = resharding(&world.env, 3)?;
    let other = Environment::replica(&world.env)?
        .start(Role::Worker)
        .await?;
    let status = process.wait().await?;
    ensure!(status.success(), "{}", process.log()?);
    is_out_of_date(&other, 3).await?;
    hanging.resume().await?;
    is_out_of_date(&hanging, 3).await?;
    is_out_of_date(&api.process, 3).await?;
    world.env.set("NATS_SHARDS", "3");
    let api = Arc::new(world.api().await?);
    let _worker = world.worker().await?;
    all_there(&world, &api, &versions).await?;
    let newer = write_all(&api, "k", 40).await?;
    ensure!(newer.iter().all(|(key, version)| *version > versions[key]));
    world.all_stored(newer.iter()).await
}

/// Workers of the former number see owners of the new one until they notice that they are out of date.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_of_a_shard_that_a_worker_does_not_know_is_none_of_its_business() -> Result<()> {
    let world = World::shared().await?;
    let name = "birb-nest worker new: shard 12";
    world
        .sql("insert into shard_state (shard, base, applied_to) values (12, 1, 1)")
        .await?;
    // "birb" in ASCII is the class of these locks.
    let own = format!(
        "set application_name = '{name}'; select pg_advisory_lock(1651077730, 12); select pg_sleep(60)"
    );
    let end = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and application_name = '{name}'"
    );
    let attack = async || {
        eventually("the shard is owned", async || {
            let owned =
                "select 1 from pg_locks where locktype = 'advisory' and objid = 12 and granted
                and database = (select oid from pg_database where datname = current_database())";
            Ok((world.sql(owned).await?.trim() == "1").then_some(()))
        })
        .await?;
        let worker = world.worker().await?;
        let api = Arc::new(world.api().await?);
        let versions = write_all(&api, "k", 40).await?;
        let stored = world.all_stored(versions.iter()).await;
        ensure!(worker.exited()?.is_none(), "{}", worker.last_lines(20));
        stored
    };
    let attacked = async {
        let outcome = attack().await;
        world.sql(&end).await?;
        outcome
    };
    // It fails when it is ended.
    let (_, outcome) = tokio::join!(world.sql(&own), attacked);
    outcome
}

/// An API that was stopped all the while serves nothing old and takes nothing when it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_stopped_meanwhile_serves_nothing_old() -> Result<()> {
    let stack = breakable().await?;
    let mut world = patient(&stack).await?;
    let late = Arc::new(Api::start(&world.env.replica()?).await?);
    let api = Arc::new(world.api().await?);
    let _worker = world.worker().await?;
    let old = write_all(&api, "k", 60).await?;
    late.process.pause().await?;
    reshard_ends(&world.env, 11, 0).await?;
    is_out_of_date(&api.process, 11).await?;
    world.env.set("NATS_SHARDS", "11");
    let api = Arc::new(world.api().await?);
    // No worker of the new number: these are in the log alone, in other shards than before.
    let new = write_all(&api, "k", 60).await?;
    world.flush_redis().await?;
    late.process.resume().await?;
    let answers = try_join_all(new.keys().map(|key| {
        let late = late.clone();
        async move {
            let read = late.get(key).await;
            let write = late.post(key, "{\"value\":\"late\"}").await;
            anyhow::Ok((key.clone(), read, write))
        }
    }))
    .await?;
    for (key, read, write) in answers {
        // It may have ended by now.
        if let Ok(read) = read {
            match read.status {
                StatusCode::OK => ensure!(read.version()? == new[&key], "{key}: {read:?}"),
                StatusCode::SERVICE_UNAVAILABLE => {}
                _ => bail!("{key}: {read:?}, {} was acknowledged", new[&key]),
            }
        }
        if let Ok(write) = write {
            write.refused("UNAVAILABLE")?;
        }
    }
    is_out_of_date(&late.process, 11).await?;
    ensure!(new.iter().all(|(key, version)| *version > old[key]));
    all_there(&world, &api, &new).await
}
