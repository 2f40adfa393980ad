//! Connections that are there and carry nothing: neither end is told, so each must notice by itself, and make new ones.

use std::{
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use birb_nest_stack::{Role, Server};
use futures::future::{try_join, try_join_all};
use reqwest::StatusCode;

use crate::{
    shown::metric,
    world::{Api, World, breakable, eventually, eventually_within},
};

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
    let world = World::on_with(&stack, &[("REDIS_TIMEOUT", "250ms")]).await?;
    heals(&world, &stack.redis).await.map(drop)
}

/// PostgreSQL keeps the swallowed sessions, and with them the locks of the shards.
#[tokio::test]
async fn swallowed_connections_to_postgresql_are_noticed_and_replaced() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    heals(&world, &stack.postgres).await.map(drop)
}

/// Nothing is written that would show that the shards have nobody any more: a dead letter is due, and that is all.
#[tokio::test]
async fn swallowed_owners_of_idle_shards_are_replaced() -> Result<()> {
    let world = World::shared().await?;
    world.sql(crate::dead_letters::REFUSE).await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link)
        .set("POSTGRES_TIMEOUT", "2s")
        .set("WORKER_STALL_TIMEOUT", "5s")
        .set("WORKER_DEAD_LETTER_RETRY", "1h");
    let api = world.api().await?;
    let worker = env.start(Role::Worker).await?;
    let version = api.write("poison", "1").await?;
    eventually(
        "it is a dead letter, and all shards are owned",
        async || {
            let owned = metric(&env.worker_url(), "birbnest_worker_shards").await?;
            let dead = world.sql("select count(*) from dead_keys").await?;
            Ok((dead.trim() == "1" && owned.values().sum::<f64>() == 8.0).then_some(()))
        },
    )
    .await?;
    link.swallow();
    world
        .sql(
            "drop trigger refuse on cache_entries;
             update dead_keys set next_try_at = clock_timestamp()",
        )
        .await?;
    eventually_within(LIMIT, "the dead letter is stored", async || {
        let row = world.row("poison").await?;
        Ok(row.filter(|row| row.0 == version))
    })
    .await?;
    eventually_within(LIMIT, "all shards are owned", async || {
        let owned = metric(&env.worker_url(), "birbnest_worker_shards").await?;
        Ok((owned.values().sum::<f64>() == 8.0).then_some(()))
    })
    .await?;
    let log = worker.log()?;
    let ended = [
        "a session that this worker lost still owns the shard: ending it",
        "a session that owns a shard asks for nothing any more: ending it",
    ];
    ensure!(ended.iter().any(|line| log.contains(line)), "{log}");
    Ok(())
}

/// PostgreSQL keeps the lock of a janitor whose session carries nothing any more.
#[tokio::test]
async fn a_swallowed_janitor_is_replaced() -> Result<()> {
    const HELD: &str =
        "select pid from pg_locks where locktype = 'advisory' and granted and classid = 1651077738
        and database = (select oid from pg_database where datname = current_database())";
    let world = World::shared().await?;
    // It takes a while to walk past them.
    world
        .sql(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select 'k' || n, n, false, now(), 'application/json', '', '1' from generate_series(1, 50000) n",
        )
        .await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link).set("WORKER_JANITOR_INTERVAL", "10ms");
    let _worker = env.start(Role::Worker).await?;
    let swallowed = eventually("there is a janitor", async || {
        let pid = world.sql(HELD).await?;
        Ok((!pid.trim().is_empty()).then(|| {
            link.swallow();
            pid
        }))
    })
    .await?;
    world
        .sql("delete from cache_entries where version > 1")
        .await?;
    world
        .sql(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             values ('gone', 1, true, now() - interval '1 day', '', '', '')",
        )
        .await?;
    ensure!(world.sql(HELD).await? == swallowed, "it ended by itself");
    let mut env = world.env.replica()?;
    env.set("WORKER_JANITOR_INTERVAL", "100ms")
        .set("WORKER_STALL_TIMEOUT", "5s");
    let _heir = env.start(Role::Worker).await?;
    eventually_within(LIMIT, "somebody else reaps", async || {
        Ok(world.row("gone").await?.is_none().then_some(()))
    })
    .await
}

/// Nobody waits any more for answers to questions that were under way, the pool no less than who asked.
#[tokio::test]
async fn swallowed_questions_cost_no_connection_of_the_pool() -> Result<()> {
    const POOL: usize = 2;
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let link = stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link)
        .set("POSTGRES_MAX_CONNECTIONS", POOL.to_string())
        // Less than a lock is waited for.
        .set("POSTGRES_TIMEOUT", "8s");
    let api = Api::start(&env).await?;
    let lock = "begin; lock table cache_entries, nest_state in access exclusive mode; select pg_sleep(600)";
    let asking = async {
        eventually_within(LIMIT, "the tables are locked", async || {
            let held = "select count(*) from pg_locks where granted and mode = 'AccessExclusiveLock' and relation in ('cache_entries'::regclass, 'nest_state'::regclass)";
            Ok((world.sql(held).await?.trim() == "2").then_some(()))
        })
        .await?;
        let waiting = "select count(*) from pg_locks where not granted and locktype = 'relation'";
        let keys: Vec<String> = (0..POOL).map(|n| format!("never{n}")).collect();
        let lookups = try_join_all(keys.iter().map(|key| api.get(key)));
        // And the question whether all is well.
        let swallowing = eventually_within(LIMIT, "all of them wait", async || {
            let n: usize = world.sql(waiting).await?.trim().parse()?;
            Ok((n > POOL).then(|| link.swallow()))
        });
        let (answers, ()) = try_join(lookups, swallowing).await?;
        for answer in answers {
            answer.refused("UNAVAILABLE")?;
        }
        let end = "select pg_terminate_backend(pid) from pg_stat_activity where query like '%pg_sleep(600)' and pid <> pg_backend_pid()";
        world.sql(end).await
    };
    let (locked, asked) = tokio::join!(world.sql(lock), asking);
    asked?;
    ensure!(locked.is_err(), "{locked:?}");
    eventually_within(LIMIT, "it is up, and lookups are answered", async || {
        let up = api.metric("birbnest_dependency_up").await?;
        let is_up = up.values().all(|up| *up == 1.0);
        let answers = try_join_all((0..POOL).map(|_| api.get("never"))).await?;
        let answered = answers
            .iter()
            .all(|answer| answer.status == StatusCode::NOT_FOUND);
        Ok((is_up && answered).then_some(()))
    })
    .await
}

/// Each lookup that is given up leaves a question behind, which PostgreSQL goes on with.
#[tokio::test]
async fn a_slow_postgresql_gets_few_connections_more() -> Result<()> {
    // Of lookups; and of those that were given up; and that of the question whether all is well.
    const MOST: usize = 8 + 16 + 2;
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let mut env = world.env.replica()?;
    env.set("POSTGRES_MAX_CONNECTIONS", "8")
        .set("POSTGRES_TIMEOUT", "1s");
    let api = Api::start(&env).await?;
    let lock = "begin; lock table cache_entries in access exclusive mode; select pg_sleep(600)";
    let asking = async {
        let held = "select count(*) from pg_locks where granted and mode = 'AccessExclusiveLock' and relation = 'cache_entries'::regclass";
        eventually_within(LIMIT, "the table is locked", async || {
            Ok((world.sql(held).await?.trim() == "1").then_some(()))
        })
        .await?;
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query not like 'lock%'";
        let (rounds, most) = (AtomicU32::new(0), AtomicUsize::new(0));
        // While PostgreSQL counts as down nobody asks it.
        eventually_within(LIMIT, "many questions were asked", async || {
            let round = rounds.fetch_add(1, Ordering::Relaxed);
            let keys: Vec<String> = (0..16).map(|n| format!("never-{round}-{n}")).collect();
            for answer in try_join_all(keys.iter().map(|key| api.get(key))).await? {
                answer.refused("UNAVAILABLE")?;
            }
            let n = world.sql(waiting).await?.trim().parse::<usize>()?;
            let most = most.fetch_max(n, Ordering::Relaxed).max(n);
            ensure!(most <= MOST, "{most} questions at once");
            Ok((round >= 10 && most >= 8).then_some(()))
        })
        .await?;
        let end = "select pg_terminate_backend(pid) from pg_stat_activity where query like '%pg_sleep(600)' and pid <> pg_backend_pid()";
        world.sql(end).await?;
        anyhow::Ok(())
    };
    let (locked, asked) = tokio::join!(world.sql(lock), asking);
    asked?;
    ensure!(locked.is_err(), "{locked:?}");
    eventually_within(LIMIT, "lookups are answered", async || {
        Ok((api.get("never").await?.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await
}
