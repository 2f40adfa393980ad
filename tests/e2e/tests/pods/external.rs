//! Nests on servers of somebody else.

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::eventually;
use birb_nest_stack::{Authority, Port, Process, tethered};
use serde_json::json;

use crate::{
    servers::Servers,
    world::{World, old_nats},
};

#[tokio::test]
async fn external_servers_serve_a_nest() -> Result<()> {
    World::run("external", async |world| {
        let Some(servers) = Servers::start(world).await? else {
            return Ok(());
        };
        world.apply(&servers.secret("birb")).await?;
        // A host that there is not, mended in the spec.
        let mut mistaken = servers.spec();
        mistaken["nats"]["external"]["url"] = json!("nats://nats.nowhere.invalid:4222");
        world.apply_nest(&mistaken).await?;
        for type_ in ["Ready", "DependenciesReady"] {
            let words = ["NATS", "nats.nowhere.invalid:4222"];
            world
                .until_condition(type_, "ServerUnreachable", &words)
                .await?;
        }
        world.until_told("ServerUnreachable", 1).await?;
        world.make_nest(&servers.spec()).await?;
        world.write_acknowledged("greeting", "hello").await?;
        world.assert_reads("greeting", "hello").await?;
        let sql = "select convert_from(value, 'UTF8') from cache_entries where key = 'greeting'";
        eventually("the value is in PostgreSQL", || async {
            let found = servers.psql(sql).await?;
            Ok(if found.trim() == r#""hello""# {
                Ok(())
            } else {
                Err(found)
            })
        })
        .await?;

        // Somebody changes the Secret, and later mends it: the nest itself is not touched.
        world.apply(&servers.secret("wrong")).await?;
        let words = ["PostgreSQL", "password authentication failed"];
        world
            .until_condition("Ready", "ServerUnreachable", &words)
            .await?;
        world.assert_reads("greeting", "hello").await?;
        world.write_acknowledged("greeting", "meanwhile").await?;
        world.apply(&servers.secret("birb")).await?;
        world.until_condition("Ready", "Available", &[]).await?;
        world.assert_reads("greeting", "meanwhile").await?;
        world.until_told("ServerUnreachable", 2).await?;
        Ok(())
    })
    .await
}

#[tokio::test]
async fn servers_that_speak_tls_alone_serve_a_nest() -> Result<()> {
    World::run("by-tls", async |world| {
        let Some(servers) = Servers::start(world).await? else {
            return Ok(());
        };
        let dir = servers.stack.root().join("tls");
        std::fs::create_dir_all(&dir)?;
        let authority = Authority::new(dir)?;
        authority.issue(&servers.host.to_string())?;
        authority.postgres(&servers.stack).await?;
        let [redis, nats] = [Port::reserve()?, Port::reserve()?];
        let (redis, nats) = (redis.number(), nats.number());
        let _redis = authority.redis(redis)?;
        let _nats = authority.nats(nats).await?;
        let (host, postgres) = (servers.host, servers.stack.postgres.port());
        let authorities = |certificate: String| {
            json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "servers" }, "stringData": {
                "redis": format!("rediss://{host}:{redis}/0"),
                "postgres": format!("postgres://birb:birb@{host}:{postgres}/birb_nest"),
                "ca.crt": certificate,
            } })
        };
        let reference = |key: &str| json!({ "name": "servers", "key": key });
        let tls = json!({ "caSecretRef": reference("ca.crt") });
        let spec = json!({
            "redis": { "external": { "urlSecretRef": reference("redis"), "tls": tls } },
            "nats": { "external": { "url": servers.nats_url(nats), "tls": tls } },
            "postgres": { "external": { "urlSecretRef": reference("postgres"), "tls": tls } },
        });
        // By an authority that signed none of their certificates, then by the right one: only the Secret is mended.
        let other = servers.stack.root().join("other");
        std::fs::create_dir_all(&other)?;
        let other = Authority::new(other)?;
        let certificate = |of: &Authority| std::fs::read_to_string(of.path("ca.pem"));
        world.apply(&authorities(certificate(&other)?)).await?;
        world.apply_nest(&spec).await?;
        let words = ["invalid peer certificate"];
        world
            .until_condition("Ready", "ServerUnreachable", &words)
            .await?;
        world.apply(&authorities(certificate(&authority)?)).await?;
        world.until_condition("Ready", "Available", &[]).await?;
        world.write_acknowledged("greeting", "hello").await?;
        world.assert_reads("greeting", "hello").await?;
        // The operator reads the lag with the same authority.
        world
            .until_condition("ScalingActive", "AsExpected", &[])
            .await?;
        let by_tls = "select count(*) > 0 and bool_and(ssl) from pg_stat_ssl join pg_stat_activity using (pid)
                      where application_name like 'birb-nest%'";
        let by_tls = servers.psql(by_tls).await?;
        ensure!(by_tls.trim() == "t", "sessions without TLS: {by_tls}");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn a_failed_setup_keeps_old_pods_serving() -> Result<()> {
    World::run("refused", async |world| {
        let Some(servers) = Servers::start(world).await? else {
            return Ok(());
        };
        world.apply(&servers.secret("birb")).await?;
        world.make_nest(&servers.spec()).await?;
        world.write_acknowledged("greeting", "hello").await?;
        let pods = pods(world).await?;

        let port = Port::reserve()?;
        let _old = start_old_nats(&servers, &port)?;
        let url = servers.nats_url(port.number());
        world
            .patch_nest(json!({ "nats": { "external": { "url": url } } }))
            .await?;
        let words = "it runs nats-server 2.10.27; 2.12.5 or newer is needed";
        world
            .until_condition("Ready", "MigrationFailed", &[words])
            .await?;
        world
            .until_condition("Degraded", "MigrationFailed", &[words])
            .await?;
        ensure!(pods == self::pods(world).await?, "pods were replaced");
        world.assert_reads("greeting", "hello").await?;
        world.write_acknowledged("greeting", "meanwhile").await?;

        world.patch_nest(servers.spec()).await?;
        world.until_condition("Ready", "Available", &[]).await?;
        world.assert_reads("greeting", "meanwhile").await?;
        world.until_told("MigrationFailed", 1).await?;
        Ok(())
    })
    .await
}

/// Names of the pods that serve and store.
async fn pods(world: &World) -> Result<Vec<String>> {
    let [api, worker] = [world.pods("api").await?, world.pods("worker").await?];
    Ok(birb_nest_e2e::names_of(&[api, worker].concat()))
}

/// A release that loses messages. It lets everyone in: a login is never asked of it.
fn start_old_nats(servers: &Servers, port: &Port) -> Result<Process> {
    let program = old_nats();
    ensure!(
        program.is_file(),
        "{} is missing: make test-e2e builds it",
        program.display()
    );
    let dir = servers.stack.root().join("old-nats");
    std::fs::create_dir_all(&dir)?;
    let mut command = tethered(program, &[])?;
    command
        .args([
            "-js",
            "-a",
            "127.0.0.1",
            "-p",
            &port.number().to_string(),
            "-sd",
        ])
        .arg(dir.join("data"));
    Process::spawn("old nats-server", command, &dir, &dir.join("log"))
        .context("the old nats-server does not start")
}
