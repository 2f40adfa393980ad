//! The lag of a log that three NATS servers replicate: it is that of the consumers' leaders, also when these are others.

use anyhow::{Result, ensure};
use birb_nest_e2e::eventually;
use birb_nest_stack::{Options, Server, Stack};

use crate::{
    log::Log,
    scaling::{create, until_workers},
    world::World,
};

/// The server that leads the consumer of a shard, which is not the first one: that is asked to let others lead.
async fn other_leader(stack: &Stack, log: &Log, shard: u64) -> Result<Server> {
    eventually("another server leads the consumer", || async {
        let Some(leader) = log.leader(shard).await? else {
            return Ok(Err("nobody leads it".to_owned()));
        };
        let leads = |server: &&Server| leader.ends_with(&format!("-{}", server.port()));
        if let Some(peer) = stack.nats_peers.iter().find(leads) {
            return Ok(Ok(peer.clone()));
        }
        log.step_down(shard).await?;
        Ok(Err(leader))
    })
    .await
}

#[tokio::test]
async fn workers_follow_the_lag_of_whichever_server_leads() -> Result<()> {
    let options = Options {
        n_nats_peers: 2,
        ..Options::default()
    };
    let (world, stack) = (
        World::where_all_works().await?,
        Stack::fresh_with(options).await?,
    );
    let log = Log::replicated(&stack, "led", 3).await?;
    let scaling =
        "{maxReplicas: 8, targetLag: 100, pollInterval: 1s, scaleDownWindow: 3s, cooldown: 0s}";
    create(&world, &stack, "led", scaling).await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    // The operator knows the first server alone.
    let leader = other_leader(&stack, &log, 3).await?;
    let seen = world.watch_replicas("cache-worker").await?;
    log.write(350).await?;
    until_workers(&world, 4).await?;

    leader.kill().await?;
    // Nothing but a reading from all leaders, the new ones among them, comes to this number.
    eventually("the log takes writes again", || async {
        let written = log.write_from(350, 200).await;
        Ok(written.map_err(|error| format!("{error:#}")))
    })
    .await?;
    until_workers(&world, 6).await?;
    leader.start().await?;
    log.drain().await?;
    until_workers(&world, 1).await?;
    let seen = seen.finish().await;
    let peak = seen.iter().position(|number| *number == 6).unwrap_or(0);
    ensure!(
        seen[..=peak].is_sorted() && seen[peak..].is_sorted_by(|a, b| a > b),
        "{seen:?}"
    );
    ensure!((seen[0], seen[seen.len() - 1]) == (1, 1), "{seen:?}");
    world.finish().await
}
