//! `birb-nest setup`: idempotent, and safe when several run.

use anyhow::{Result, ensure};
use birb_nest_stack::{Role, shared};
use reqwest::StatusCode;

use crate::world::{World, breakable, eventually};

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
