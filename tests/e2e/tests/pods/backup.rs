//! The backup of docs/examples, taken and put back as docs/OPERATIONS.md says.

use anyhow::{Result, ensure};
use birb_nest_e2e::eventually;

use crate::world::{NEST, World};

const BACKUP: &str = include_str!("../../../../docs/examples/backup.yaml");
const RESTORE: &str = include_str!("../../../../docs/examples/restore.yaml");

/// Of a nest in mode Fixed whose key `greeting` has been stored as `value`.
pub async fn is_taken_and_put_back(world: &World, value: &str) -> Result<()> {
    apply(world, BACKUP).await?;
    let from = format!("--from=cronjob/{NEST}-backup");
    world.kubectl(&["create", "job", "backup", &from]).await?;
    until_complete(world, "job/backup").await?;

    let postgres = format!("{NEST}-postgres-0");
    let lose = "delete from cache_entries where key = 'greeting'";
    let psql = [
        "exec",
        &postgres,
        "--",
        "psql",
        "-U",
        "birb",
        "-d",
        "birb_nest",
        "-c",
        lose,
    ];
    let lost = world.kubectl(&psql).await?;
    ensure!(lost.contains("DELETE 1"), "{lost}");

    world.stop_workers().await?;
    apply(world, RESTORE).await?;
    until_complete(world, &format!("job/{NEST}-restore")).await?;
    let flush =
        r#"REDISCLI_AUTH=$(sed -n "s/^requirepass //p" /etc/redis/auth.conf) redis-cli flushdb"#;
    let redis = format!("{NEST}-redis-0");
    let flushed = world
        .kubectl(&["exec", &redis, "--", "sh", "-c", flush])
        .await?;
    ensure!(flushed.trim() == "OK", "{flushed}");
    let api = format!("deployment/{NEST}-api");
    world
        .kubectl(&["exec", &api, "--", "birb-nest", "setup"])
        .await?;
    world.scale_workers(1).await?;
    world.until_condition("Ready", "Available", &[]).await?;
    eventually("what was lost is there again", || async {
        let answer = world.read("greeting").await?;
        Ok(match answer.value() {
            Some(found) if found == value => Ok(()),
            _ => Err(format!("{answer:?}")),
        })
    })
    .await
}

async fn apply(world: &World, objects: &str) -> Result<()> {
    let objects = objects.replace("demo", NEST);
    let arguments = ["apply", "--filename=-"];
    world.kubectl_with(&arguments, &objects).await.map(drop)
}

async fn until_complete(world: &World, job: &str) -> Result<()> {
    let wait = ["wait", "--for=condition=Complete", job, "--timeout=180s"];
    world.kubectl(&wait).await.map(drop)
}
