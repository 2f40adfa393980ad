//! Connections that are there and carry nothing: neither end is told, so each must notice by itself, and make new ones.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use birb_nest_stack::{Role, Server};
use reqwest::StatusCode;

use crate::world::{Api, World, breakable, eventually_within, metric};

/// For all of it, on a machine that is busy with other tests.
const LIMIT: Duration = Duration::from_secs(180);

/// All that an API and a worker have to one server is swallowed; returns how long it took until all was well again, by
/// new connections.
async fn heals(world: &World<'_>, server: &Server) -> Result<Duration> {
    let link = server.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link).set("WORKER_STALL_TIMEOUT", "5s");
    let api = Api::start(&env).await?;
    let _worker = env.start(Role::Worker).await?;
    let before = api.write("k", "1").await?;
    world.stored("k", before).await?;
    link.swallow();
    let started = Instant::now();
    // Each attempt writes another key: a write whose outcome is unknown may come late.
    let n = AtomicU32::new(0);
    let (key, version) = eventually_within(LIMIT, "a write is taken and kept", async || {
        let n = n.fetch_add(1, Ordering::Relaxed);
        let (key, body) = (format!("after{n}"), format!("{{\"value\":{n}}}"));
        let answer = api.post(&key, body).await?;
        if answer.status == StatusCode::SERVICE_UNAVAILABLE {
            return Ok(None);
        }
        let version = answer.expect(StatusCode::CREATED)?.version()?;
        let source = api.get(&key).await?.header("birb-source").to_owned();
        Ok((source == "redis").then_some((key, version)))
    })
    .await?;
    eventually_within(LIMIT, "it is stored", async || {
        let row = world.row(&key).await?;
        Ok(row.filter(|row| row.0 >= version))
    })
    .await?;
    for url in [env.api_url(), env.worker_url()] {
        eventually_within(LIMIT, "all servers are up", async || {
            let up = metric(&url, "birbnest_dependency_up").await?;
            Ok((up.len() == 3 && up.values().all(|up| *up == 1.0)).then_some(()))
        })
        .await?;
    }
    let took = started.elapsed();
    println!("{} was well again after {took:?}", server.name());
    // What was acknowledged before is there.
    let k = api.get("k").await?.expect(StatusCode::OK)?;
    ensure!(k.version()? == before, "{k:?}");
    Ok(took)
}

#[tokio::test]
async fn swallowed_connections_to_nats_are_noticed_and_replaced() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    heals(&world, &stack.nats).await.map(drop)
}

#[tokio::test]
async fn swallowed_connections_to_redis_are_noticed_and_replaced() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    heals(&world, &stack.redis).await.map(drop)
}

/// PostgreSQL keeps the swallowed sessions, and with them the locks of the shards.
#[tokio::test]
async fn swallowed_connections_to_postgresql_are_noticed_and_replaced() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    heals(&world, &stack.postgres).await.map(drop)
}
