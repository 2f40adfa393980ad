//! A nest that is put to sleep has stored all that it had acknowledged.

use anyhow::{Result, ensure};
use birb_nest_e2e::eventually;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;

use crate::{servers::Servers, world::World};

const N_WRITES: usize = 200;

#[tokio::test]
async fn a_nest_that_sleeps_has_stored_all_and_wakes_with_it() -> Result<()> {
    World::run("sleep", async |world| {
        let Some(servers) = Servers::start(world).await? else {
            return Ok(());
        };
        world.apply(&servers.secret("birb")).await?;
        world.make_nest(&servers.spec()).await?;

        // Nothing can be stored, so all that is acknowledged waits in the log.
        servers.stack.postgres.pause().await?;
        stream::iter(0..N_WRITES)
            .map(|number| async move {
                let (key, value) = (format!("asleep-{number}"), format!("value {number}"));
                world.write_acknowledged(&key, &value).await
            })
            .buffer_unordered(8)
            .try_collect::<()>()
            .await?;
        world.patch_nest(json!({ "suspend": true })).await?;
        world.until_condition("Ready", "Draining", &[]).await?;
        until_gone(world, "api").await?;
        ensure!(!world.pods("worker").await?.is_empty(), "something is left to be stored");

        servers.stack.postgres.resume().await?;
        world.until_condition("Ready", "Suspended", &[]).await?;
        let ours = "key like 'asleep-%' and value = convert_to(to_json('value ' || substr(key, 8))::text, 'UTF8')";
        let found = servers.psql(&format!("select count(*) from cache_entries where {ours}")).await?;
        ensure!(found.trim() == N_WRITES.to_string(), "{found}");
        until_gone(world, "worker").await?;

        world.patch_nest(json!({ "suspend": false })).await?;
        world.until_served().await?;
        world.assert_reads("asleep-7", "value 7").await?;
        Ok(())
    })
    .await
}

async fn until_gone(world: &World, component: &str) -> Result<()> {
    eventually(&format!("no {component} is left"), || async {
        let n = world.pods(component).await?.len();
        Ok(if n == 0 {
            Ok(())
        } else {
            Err(format!("{n} pods"))
        })
    })
    .await
}
