//! Each step towards a shard's next life may be the last one of its owner: the next owner repeats or ends it.

use std::{collections::HashMap, sync::Arc};

use anyhow::{Result, ensure};
use birb_nest_stack::{Role, shared};
use reqwest::StatusCode;

use crate::{
    lost_tail::{bases, takes_writes},
    world::{PATIENCE, World, eventually, write_all},
};

const STEPS: [&str; 4] = [
    "stored-fenced",
    "recorded-life",
    "emptied-redis",
    "purged-life",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_any_step_towards_its_next_life_a_shard_gets_there() -> Result<()> {
    let mut world = World::not_set_up(shared().await?).await?;
    world.env.set("NATS_SHARDS", "1");
    world.env.setup().await?;
    let api = Arc::new(world.api().await?);
    let mut versions = HashMap::new();
    for step in STEPS {
        // Nobody has stored them when the log is fenced.
        for (key, version) in write_all(&api, "k", 40).await? {
            let before = versions.insert(key.clone(), version).unwrap_or(0);
            ensure!(version > before, "{step}: {key} from {before} to {version}");
        }
        // What the log lost.
        let lost = r#"E90000000000000000000000000000000{"key":"lost","value":0,"version":9000000000000000,"metadata":{}}"#;
        redis::cmd("SET")
            .arg("birb:e:lost")
            .arg(lost)
            .exec_async(&mut world.redis().await?)
            .await?;
        api.get("lost").await?.expect(StatusCode::OK)?;
        let before = bases(&world).await?;
        world.fence_all().await?;
        let mut dying = world.env.replica()?;
        dying.set("BIRBNEST_DIES_AFTER", step);
        let killed = dying.spawn(Role::Worker)?;
        let status = tokio::time::timeout(PATIENCE, killed.wait()).await??;
        let said = killed.log()?;
        ensure!(
            status.code().is_none() && said.contains(&format!("BIRBNEST_DIES_AFTER={step}")),
            "{step}: {status}\n{said}"
        );
        let heir = world.worker().await?;
        takes_writes(&api).await?;
        ensure!(bases(&world).await? > before, "{step}");
        world.all_stored(versions.iter()).await?;
        eventually("what the log lost is gone from Redis", async || {
            Ok((api.get("lost").await?.status == StatusCode::NOT_FOUND).then_some(()))
        })
        .await?;
        heir.kill().await?;
        // Emptied once more, it would lose what the next round puts there.
        world.empty_redis().await?;
        for (key, version) in &versions {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(
                read.version()? == *version,
                "{step}: {version} is newest: {read:?}"
            );
        }
    }
    Ok(())
}
