//! Workers follow a backlog that is real, and nothing of it is lost on the way up or down.

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::eventually;
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use serde_json::json;

use crate::{
    servers::Servers,
    world::{NEST, World},
};

/// Writes that wait: as many keys, so as many messages.
const N_WRITES: usize = 400;

#[tokio::test]
async fn a_backlog_scales_workers_up_and_back_down_and_none_of_it_is_lost() -> Result<()> {
    World::run("scaling", async |world| {
        let Some(servers) = Servers::start(world).await? else {
            return Ok(());
        };
        world.apply(&servers.secret("birb")).await?;
        let mut spec = servers.spec();
        spec["worker"] = json!({ "scaling": {
            "maxReplicas": 4, "targetLag": 100, "pollInterval": "1s", "scaleDownWindow": "40s", "cooldown": "5s",
        } });
        world.make_nest(&spec).await?;
        world
            .until_condition("ScalingActive", "AsExpected", &[])
            .await?;
        until_workers(world, 1, 1).await?;

        // Nothing can be stored, so all that is acknowledged waits in the log.
        servers.stack.postgres.pause().await?;
        stream::iter(0..N_WRITES)
            .map(|number| async move {
                let (key, value) = (format!("backlog-{number}"), format!("value {number}"));
                world.write_acknowledged(&key, &value).await
            })
            .buffer_unordered(8)
            .try_collect::<()>()
            .await?;
        // A worker without PostgreSQL is not ready.
        until_workers(world, 4, 0).await?;
        // They are wanted for a while only, once the first one can store: their start is not to be part of that.
        eventually("four workers run", || async {
            let all = world.pods("worker").await?;
            let phases: Vec<_> = all.into_iter().filter_map(|pod| pod.status?.phase).collect();
            Ok(if phases == ["Running"; 4] { Ok(()) } else { Err(format!("{phases:?}")) })
        })
        .await?;
        servers.stack.postgres.resume().await?;
        // Those that were added have a share of the shards each.
        let owners = "select count(distinct split_part(application_name, ': ', 1)) from pg_stat_activity
                      where datname = current_database() and application_name like 'birb-nest worker %: shard %'";
        eventually("four workers own shards", || async {
            let found = servers.psql(owners).await?;
            Ok(if found.trim() == "4" { Ok(()) } else { Err(found) })
        })
        .await?;

        let ours = "key like 'backlog-%' and value = convert_to(to_json('value ' || substr(key, 9))::text, 'UTF8')";
        let sql = format!("select count(*) from cache_entries where {ours}");
        eventually("all that was acknowledged is in PostgreSQL", || async {
            let found = servers.psql(&sql).await?;
            Ok(if found.trim() == N_WRITES.to_string() { Ok(()) } else { Err(found) })
        })
        .await?;
        until_workers(world, 1, 1).await?;
        eventually("the others have ended", || async {
            let n = world.pods("worker").await?.len();
            Ok(if n == 1 { Ok(()) } else { Err(format!("{n} pods")) })
        })
        .await?;
        let found = servers.psql(&sql).await?;
        ensure!(found.trim() == N_WRITES.to_string(), "{found}");
        // The one that is left owns all shards.
        world.write_acknowledged("afterwards", "stored").await?;
        let sql = "select count(*) from cache_entries where key = 'afterwards'";
        eventually("the last worker stores", || async {
            let found = servers.psql(sql).await?;
            Ok(if found.trim() == "1" { Ok(()) } else { Err(found) })
        })
        .await
    })
    .await
}

/// Waits until the Deployment asks for as many workers, of which so many are ready at least.
async fn until_workers(world: &World, desired: i32, ready: i32) -> Result<()> {
    let api: Api<Deployment> = Api::namespaced(world.client.clone(), &world.namespace);
    let name = format!("{NEST}-worker");
    eventually(&format!("there should be {desired} workers"), || async {
        let found = api.get(&name).await?;
        let asked = found.spec.context("it has one")?.replicas;
        let status = found.status.unwrap_or_default();
        let is_so = asked == Some(desired) && status.ready_replicas.unwrap_or(0) >= ready;
        Ok(if is_so {
            Ok(())
        } else {
            Err(format!("{asked:?}: {status:?}"))
        })
    })
    .await
}
