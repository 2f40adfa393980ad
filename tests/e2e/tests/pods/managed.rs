//! A nest of which the operator runs all, and what becomes of its data when pods die.

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::eventually;
use futures::{StreamExt, TryStreamExt, stream};
use serde_json::json;

use crate::{
    backup,
    world::{NEST, World},
};

/// Writes that nobody has stored when a server is killed: several batches of all shards.
const N_WRITES: usize = 200;

#[tokio::test]
async fn an_empty_spec_becomes_ready_and_keeps_what_is_written() -> Result<()> {
    World::run("managed", async |world| {
        world.make_nest(&json!({})).await?;
        let written = world.write("greeting", "hello").await?;
        ensure!(written.status == 200, "{written:?}");
        world.assert_reads("greeting", "hello").await?;
        until_rows(world, "key = 'greeting' and value = '\"hello\"'", 1).await?;
        a_pod_reads_it_by_the_name_of_the_service(world).await?;
        redis_may_die(world).await?;
        what_is_not_stored_yet_survives_nats_and_worker(world).await?;
        until_rows(world, "key = 'greeting' and value = '\"again\"'", 1).await?;
        backup::is_taken_and_put_back(world, "again").await?;
        everything_goes_with_the_nest(world).await
    })
    .await
}

/// What a node says of a pod that it cannot start is in the condition, and the mended spec replaces that pod.
#[tokio::test]
async fn a_server_without_an_image_is_told_of_and_mended() -> Result<()> {
    World::run("no-image", async |world| {
        let image = "registry.invalid/postgres:17";
        let redis = json!({ "managed": { "image": "registry.invalid/redis:8" } });
        let spec = json!({ "postgres": { "managed": { "image": image } }, "redis": redis });
        world.apply_nest(&spec).await?;
        let words = [
            format!("{NEST}-postgres-0"),
            "ImagePull".to_owned(),
            image.to_owned(),
        ];
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        world
            .until_condition("Ready", "ServerNotReady", &words)
            .await?;
        world
            .patch_nest(json!({ "postgres": null, "redis": null }))
            .await?;
        world.until_served().await?;
        world.write_acknowledged("greeting", "hello").await
    })
    .await
}

async fn a_pod_reads_it_by_the_name_of_the_service(world: &World) -> Result<()> {
    let script = format!(
        "exec 3<>/dev/tcp/{NEST}/8080; printf 'GET /v1/cache/greeting HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    );
    let pod = format!("{NEST}-postgres-0");
    // The rules of a node follow the addresses of a Service with a delay.
    eventually("it is answered", || async {
        let answer = world
            .kubectl(&["exec", &pod, "--", "bash", "-c", &script])
            .await;
        Ok(match answer {
            Ok(answer) if answer.contains(r#""value":"hello""#) => Ok(()),
            answer => Err(format!("{answer:?}")),
        })
    })
    .await
}

/// Reads go on while the pod of Redis is replaced, then they are Redis' again.
async fn redis_may_die(world: &World) -> Result<()> {
    let kill = world.kill_pod("redis");
    tokio::pin!(kill);
    let mut elsewhere = 0;
    loop {
        let answer = world.assert_reads("greeting", "hello").await?;
        elsewhere += usize::from(answer.source != "redis");
        tokio::select! {
            biased;
            killed = &mut kill => break killed?,
            () = std::future::ready(()) => {}
        }
    }
    ensure!(elsewhere > 0, "Redis was away, and all reads were its own");
    eventually("Redis answers again", || async {
        let answer = world.assert_reads("greeting", "hello").await?;
        Ok(match answer.source.as_str() {
            "redis" => Ok(()),
            _ => Err(format!("{answer:?}")),
        })
    })
    .await
}

async fn what_is_not_stored_yet_survives_nats_and_worker(world: &World) -> Result<()> {
    let nest = format!("birbnest/{NEST}");
    let fixed = r#"{"spec": {"worker": {"scaling": {"mode": "Fixed"}}}}"#;
    world
        .kubectl(&["patch", &nest, "--type=merge", "--patch", fixed])
        .await?;
    let deployment = format!("deployment/{NEST}-worker");
    world.stop_workers().await?;
    stream::iter(0..N_WRITES)
        .map(|number| async move {
            let (key, value) = (format!("backlog-{number}"), format!("value {number}"));
            world.write_acknowledged(&key, &value).await
        })
        .buffer_unordered(8)
        .try_collect::<()>()
        .await?;
    until_rows(world, "key like 'backlog-%'", 0).await?;

    world.kill_pod("nats").await?;
    // The one that kills it sees its successor begin: it dies amidst this work, or before.
    world.scale_workers(1).await?;
    eventually("a worker was started", || async {
        let pods = world.pods("worker").await?;
        Ok(if pods.is_empty() {
            Err("none".to_owned())
        } else {
            Ok(())
        })
    })
    .await?;
    world.kill_pod("worker").await?;
    let ours = "key like 'backlog-%' and value = convert_to(to_json('value ' || substr(key, 9))::text, 'UTF8')";
    until_rows(world, ours, N_WRITES).await?;
    world.assert_reads("backlog-7", "value 7").await?;
    world.write_acknowledged("greeting", "again").await?;
    world.until_condition("Ready", "Available", &[]).await?;
    world
        .kubectl(&["rollout", "status", &deployment, "--timeout=60s"])
        .await
        .map(drop)
}

/// `deletionPolicy: Delete`.
async fn everything_goes_with_the_nest(world: &World) -> Result<()> {
    world
        .kubectl(&["delete", "birbnest", NEST, "--timeout=60s"])
        .await?;
    let kinds =
        "pods,services,deployments,statefulsets,jobs,configmaps,secrets,persistentvolumeclaims";
    let selector = format!("--selector=app.kubernetes.io/instance={NEST}");
    eventually("nothing of the nest is left", || async {
        let left = world
            .kubectl(&["get", kinds, &selector, "--output=name"])
            .await?;
        Ok(if left.is_empty() { Ok(()) } else { Err(left) })
    })
    .await
}

/// Waits until `n` entries in the managed PostgreSQL fit.
async fn until_rows(world: &World, condition: &str, n: usize) -> Result<()> {
    let pod = format!("{NEST}-postgres-0");
    let sql = format!("select count(*) from cache_entries where {condition}");
    let psql = ["exec", &pod, "--", "psql", "-U", "birb", "-d", "birb_nest"];
    let psql = [&psql[..], &["-Atc", &sql]].concat();
    eventually(&format!("{n} rows with {condition}"), || async {
        let found = world.kubectl(&psql).await?;
        let found: usize = found.trim().parse().context("it is a number")?;
        Ok(if found == n {
            Ok(())
        } else {
            Err(format!("{found} rows"))
        })
    })
    .await
}
