//! Single faults that have no home elsewhere: hanging servers, a PostgreSQL that went back.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Role;
use futures::{StreamExt, stream};
use reqwest::{Method, StatusCode};

use crate::{
    dead_letters::n_ever_dead,
    shown::{is_counted, is_told, metric},
    world::{Api, PATIENCE, World, breakable, eventually, eventually_within},
};

/// Who asks a server that is known to be away waits for nothing. The best of some counts, on a machine that does other things.
async fn fails_at_once(mut ask: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    let mut best = PATIENCE;
    for _ in 0..10 {
        let began = Instant::now();
        ask().await?;
        best = best.min(began.elapsed());
    }
    ensure!(best < Duration::from_millis(100), "{best:?}");
    Ok(())
}

#[tokio::test]
async fn a_nats_that_hangs_makes_outcomes_unknown_and_nothing_wrong() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on_with(&stack, &[("NATS_PUBLISH_TIMEOUT", "20s")]).await?;
    let mut env = world.env.replica()?;
    env.set("NATS_PUBLISH_TIMEOUT", "500ms");
    let api = Api::start(&env).await?;
    // By one with more patience, as the last one is: these are to be taken.
    let before = world.api().await?.write("k", "1").await?;
    stack.nats.pause().await?;
    api.post("k", "{\"value\":2}")
        .await?
        .refused("UNKNOWN_OUTCOME")?;
    is_counted(&api.url, "birbnest_errors_total", "log_unknown").await?;
    is_told(&api.process, "write was not acknowledged").await?;
    assert_eq!(api.read("k").await?.as_deref(), Some("1"));
    // After two to three seconds on a machine that has time.
    eventually_within(Duration::from_secs(8), "it is given up", async || {
        let answer = api.post("given-up", "{\"value\":1}").await?;
        Ok(answer.refused("UNAVAILABLE").ok())
    })
    .await?;
    let asked = async || {
        api.post("given-up", "{\"value\":1}")
            .await?
            .refused("UNAVAILABLE")
    };
    fails_at_once(asked).await?;
    stack.nats.resume().await?;
    // The write was on its way: it may be there, and then everybody agrees.
    eventually("writes are taken again", async || {
        let answer = api.post("other", "{\"value\":1}").await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await?;
    let _worker = world.worker().await?;
    let after = world.api().await?.write("k", "3").await?;
    assert!(after > before);
    world.stored("k", after).await?;
    assert_eq!(api.read("k").await?.as_deref(), Some("3"));
    Ok(())
}

#[tokio::test]
async fn a_postgresql_that_hangs_is_noticed_and_loses_nothing() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    api.write("hit", "1").await?;
    stack.postgres.pause().await?;
    let version = api.write("during", "1").await?;
    assert_eq!(api.read("hit").await?.as_deref(), Some("1"));
    api.get("never").await?.refused("UNAVAILABLE")?;
    eventually("it is known to be down", async || {
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["checks"]["database"] == "down").then_some(()))
    })
    .await?;
    let asked = async || api.get("never").await?.refused("UNAVAILABLE");
    fails_at_once(asked).await?;
    stack.postgres.resume().await?;
    world.stored("during", version).await?;
    eventually("misses are answered again", async || {
        Ok((api.get("never").await?.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgresql_put_back_inside_the_trim_lag_heals_without_loss() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let mut written = std::collections::HashMap::new();
    for n in 0..50 {
        let key = format!("k{n}");
        written.insert(key.clone(), api.write(&key, "1").await?);
    }
    world.all_stored(written.iter()).await?;
    stack.postgres.stop().await?;
    let copy = stack.postgres.snapshot().await?;
    stack.postgres.start().await?;
    for n in 25..75 {
        let key = format!("k{n}");
        written.insert(
            key.clone(),
            eventually("written", async || {
                let answer = api.post(&key, "{\"value\":2}").await?;
                Ok(if answer.status == StatusCode::CREATED {
                    Some(answer.version()?)
                } else {
                    None
                })
            })
            .await?,
        );
    }
    api.delete("k0").await?.expect(StatusCode::NO_CONTENT)?;
    written.remove("k0");
    world.all_stored(written.iter()).await?;
    stack.postgres.kill().await?;
    stack.postgres.restore(&copy).await?;
    stack.postgres.start().await?;
    world.all_stored(written.iter()).await?;
    eventually("the delete is stored again", async || {
        Ok(world.row("k0").await?.filter(|row| row.1).map(drop))
    })
    .await?;
    assert!(worker.log()?.contains("PostgresWentBack"), "nobody said so");
    is_counted(
        &world.env.worker_url(),
        "birbnest_postgres_went_back_total",
        "",
    )
    .await?;
    world.flush_redis().await?;
    for (key, version) in &written {
        assert_eq!(
            api.get(key).await?.expect(StatusCode::OK)?.version()?,
            *version
        );
    }
    api.get("k0").await?.expect(StatusCode::NOT_FOUND)?;
    Ok(())
}

#[tokio::test]
async fn a_missing_grant_and_a_cut_connection_dead_letter_nothing() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let database = &world.env.vars["POSTGRES_DB"];
    // A role of its own for the worker, without the right to write rows.
    let role = format!("limited_{database}");
    world
        .sql(&format!(
            "create role {role} login password 'limited';
             grant select on all tables in schema public to {role};
             grant update on shard_state to {role}; grant select, insert, update, delete on dead_keys to {role}"
        ))
        .await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link)
        .set("POSTGRES_USER", role.clone())
        .set("POSTGRES_PASSWORD", "limited");
    let _worker = env.start(Role::Worker).await?;
    let mut last = 0;
    for n in 0..20 {
        last = api.write(&format!("k{n}"), "1").await?;
    }
    eventually("it is refused the right", async || {
        let errors = metric(&env.worker_url(), "birbnest_errors_total").await?;
        Ok(errors
            .keys()
            .any(|labels| labels.contains("postgres_apply"))
            .then_some(()))
    })
    .await?;
    world
        .sql(&format!(
            "grant select, insert, update, delete on cache_entries to {role}"
        ))
        .await?;
    world.stored("k19", last).await?;
    // Connections cut again and again, wherever in a batch that falls.
    for round in 0..20 {
        for n in 0..10 {
            last = api.write(&format!("k{n}"), &round.to_string()).await?;
        }
        link.cut();
        link.heal();
    }
    world.stored("k9", last).await?;
    assert_eq!(n_ever_dead(&world).await?, 0);
    for n in 0..10 {
        assert_eq!(api.read(&format!("k{n}")).await?.as_deref(), Some("19"));
    }
    Ok(())
}

/// The answer to a commit is lost while the commit goes on: the owner does not know, and asks.
#[tokio::test]
async fn a_connection_cut_in_the_middle_of_a_commit_dead_letters_nothing() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    world
        .sql(
            "create function dawdle() returns trigger language plpgsql as
                 $$ begin perform pg_sleep(1); return null; end $$;
             create constraint trigger dawdle after insert or update on cache_entries
                 deferrable initially deferred for each row execute function dawdle()",
        )
        .await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link);
    let _worker = env.start(Role::Worker).await?;
    let mut last = 0;
    for round in 0..3 {
        last = api.write("k", &round.to_string()).await?;
        eventually("a commit is under way", async || {
            let committing = "select count(*) from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()";
            Ok((world.sql(committing).await?.trim() == "1").then_some(()))
        })
        .await?;
        link.cut();
        link.heal();
        world.stored("k", last).await?;
    }
    assert_eq!(world.row("k").await?.context("a row")?.0, last);
    assert_eq!(n_ever_dead(&world).await?, 0);
    assert_eq!(api.read("k").await?.as_deref(), Some("2"));
    Ok(())
}

/// Somebody holds a lock for longer than a statement may wait: it ends, and is tried again.
#[tokio::test]
async fn a_statement_that_waits_too_long_ends_and_dead_letters_nothing() -> Result<()> {
    let world = World::shared().await?;
    let (api, worker) = (world.api().await?, world.worker().await?);
    let first = api.write("first", "1").await?;
    world.stored("first", first).await?;
    let lock = "begin; lock table cache_entries in share mode; select pg_sleep(60)";
    let (locking, waiting) = (world.sql(lock), async {
        eventually("the lock is held", async || {
            let held = "select count(*) from pg_locks l join pg_database d on d.oid = l.database
            where mode = 'ShareLock' and locktype = 'relation' and granted and datname = current_database()";
            Ok((world.sql(held).await?.trim() == "1").then_some(()))
        })
        .await?;
        let version = api.write("k", "1").await?;
        // lock_timeout: 10 s.
        eventually_within(2 * PATIENCE, "the statement ends", async || {
            Ok(worker.log()?.contains("55P03").then_some(()))
        })
        .await?;
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
            where query like '%pg_sleep(60)' and pid <> pg_backend_pid() and datname = current_database()";
        world.sql(end).await?;
        world.stored("k", version).await
    });
    // It is ended from outside.
    let (locked, waited) = tokio::join!(locking, waiting);
    waited?;
    ensure!(locked.is_err(), "{locked:?}");
    assert_eq!(n_ever_dead(&world).await?, 0);
    Ok(())
}

/// Clients that go away in the middle of their writes leave nothing old behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_give_up_leave_nothing_old_in_redis() -> Result<()> {
    let world = World::shared().await?;
    let (api, other) = (
        Arc::new(world.api().await?),
        Api::start(&world.env.replica()?).await?,
    );
    for n in 0..20 {
        api.write(&format!("k{n}"), "\"old\"").await?;
    }
    stream::iter(0..200u64)
        .for_each_concurrent(16, |n| {
            let api = api.clone();
            async move {
                let key = format!("k{}", n % 20);
                let write = api.post(&key, format!("{{\"value\":{n}}}"));
                // Whatever came of it, nobody hears.
                let _ = tokio::time::timeout(Duration::from_micros(200 * (n % 40)), write).await;
            }
        })
        .await;
    for n in 0..20 {
        let key = format!("k{n}");
        eventually("Redis agrees with the log", async || {
            let cached = other.get(&key).await?.expect(StatusCode::OK)?.version()?;
            redis::cmd("DEL")
                .arg(format!("birb:e:{key}"))
                .exec_async(&mut world.redis().await?)
                .await?;
            let logged = other.get(&key).await?.expect(StatusCode::OK)?.version()?;
            ensure!(
                logged >= cached,
                "{key}: Redis had {cached}, the log {logged}"
            );
            Ok((logged == cached).then_some(()))
        })
        .await?;
    }
    Ok(())
}

/// Somebody else locks two rows in the other order: PostgreSQL picks the worker as the victim, and it tries again.
#[tokio::test]
async fn a_deadlock_dead_letters_nothing() -> Result<()> {
    let world = World::shared_with(&[("NATS_SHARDS", "1"), ("WORKER_BATCH_TIMEOUT", "2s")]).await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let version = api.write("b", "1").await?;
    api.write("a", "1").await?;
    world.stored("a", version).await?;
    // It takes its second row as soon as the worker waits for its first; its own patience is the longer one.
    let rival = "set deadlock_timeout = '20s'; begin; update cache_entries set value = value where key = 'b';
        do $$ begin loop
            exit when exists (select from pg_locks where not granted and locktype = 'transactionid'
                              and transactionid = pg_current_xact_id()::xid);
            perform pg_sleep(0.01);
        end loop; end $$;
        update cache_entries set value = value where key = 'a'; commit";
    let (rival, versions) = tokio::join!(world.sql(rival), async {
        eventually("the rival holds its first row", async || {
            let sql = "select count(*) from pg_stat_activity where query like 'set deadlock_timeout%' and datname = current_database()";
            Ok((world.sql(sql).await?.trim() != "0").then_some(()))
        })
        .await?;
        let one = api.write("a", "2").await?;
        Ok::<_, anyhow::Error>((one, api.write("b", "2").await?))
    });
    rival?;
    let (a, b) = versions?;
    world.stored("a", a).await?;
    world.stored("b", b).await?;
    assert!(
        worker.log()?.contains("40P01"),
        "there was no deadlock:\n{}",
        worker.last_lines(20)
    );
    assert_eq!(n_ever_dead(&world).await?, 0);
    Ok(())
}
