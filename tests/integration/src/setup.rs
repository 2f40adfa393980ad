//! `birb-nest setup`: idempotent, and safe when several run.

use std::sync::Arc;

use anyhow::{Result, ensure};
use birb_nest_stack::{Role, shared};
use reqwest::StatusCode;

use crate::{
    lost_tail::takes_writes,
    world::{PATIENCE, World, breakable, eventually, write_all},
};

#[tokio::test]
async fn two_setups_at_once_make_one_nest() -> Result<()> {
    let world = World::not_set_up(shared().await?).await?;
    let racers: Vec<_> = (0..4)
        .map(|_| world.env.spawn(Role::Setup))
        .collect::<Result<_>>()?;
    for racer in &racers {
        let status = racer.wait().await?;
        assert!(status.success(), "{}", racer.log()?);
    }
    let made = racers
        .iter()
        .map(|racer| Ok(racer.log()?.matches("made the log of shard").count()))
        .sum::<Result<usize>>()?;
    assert_eq!(made, 8);
    let state = world
        .sql("select shard, base, applied_to from shard_state order by shard")
        .await?;
    assert_eq!(state.lines().count(), 8);

    let api = world.api().await?;
    api.write("k", "1").await?;
    world.env.setup().await?;
    assert_eq!(
        world
            .sql("select shard, base, applied_to from shard_state order by shard")
            .await?,
        state
    );
    assert_eq!(api.read("k").await?.as_deref(), Some("1"));
    api.write("k", "2").await?;
    Ok(())
}

/// The streams are gone, and with them a write that was nowhere else but in Redis; Redis cannot be reached when `setup`
/// makes them anew, and can be when it runs again.
#[tokio::test]
async fn redis_is_emptied_after_streams_were_gone_even_if_setup_was_interrupted() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let lost = api.write("k", "\"lost\"").await?;
    api.process.kill().await?;
    let jetstream = world.jetstream().await?;
    for shard in 0..8 {
        let name = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
        jetstream.delete_stream(name).await?;
    }
    let proxy = stack.redis.proxy()?;
    proxy.cut();
    let mut env = world.env.clone();
    env.through(&proxy);
    let setup = env.spawn(Role::Setup)?;
    let status = setup.wait().await?;
    ensure!(status.code() == Some(75), "{}", setup.log()?);
    world.env.setup().await?;
    let api = world.api().await?;
    eventually("the lost value is gone", async || {
        Ok((api.get("k").await?.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    ensure!(api.write("k", "1").await? > lost, "a version went back");
    Ok(())
}

/// Logs that lost their tail are the workers' business: `setup` says so, succeeds, and takes nothing from them. One that is
/// open to writers of a life that is over it closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn setup_leaves_fenced_logs_to_workers_and_fences_those_of_earlier_lives() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let setup_says = async |what: &str| {
        let setup = world.env.spawn(Role::Setup)?;
        let status = setup.wait().await?;
        let log = setup.log()?;
        ensure!(status.success(), "{status}: {log}");
        ensure!(log.matches(what).count() == 8, "{log}");
        Ok(())
    };
    let mut versions = write_all(&api, "k", 40).await?;
    let former = world.subjects().await?;
    world.fence_all().await?;
    let fenced = world.subjects().await?;
    setup_says("is fenced in its life").await?;
    ensure!(world.subjects().await? == fenced);
    let worker = world.worker().await?;
    takes_writes(&api).await?;
    worker.terminate(PATIENCE).await?;

    // Nobody has stored what is written in the next life when somebody opens the former one again.
    versions.extend(write_all(&api, "k", 40).await?);
    world.set_subjects(&former).await?;
    setup_says("is of an earlier life").await?;
    ensure!(world.subjects().await? == fenced);
    let _worker = world.worker().await?;
    takes_writes(&api).await?;
    world.all_stored(versions.iter()).await?;
    for (key, version) in &versions {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == *version, "{version} is newest: {read:?}");
    }
    Ok(())
}
