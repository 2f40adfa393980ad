//! `birb-nest setup`: idempotent, and safe when several run.

use anyhow::Result;
use birb_nest_stack::{Role, shared};

use crate::world::World;

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
