//! Single faults that have no home elsewhere: a full log, a message from the future, hanging servers, a PostgreSQL that
//! went back, clocks that are wrong.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Role;
use futures::{StreamExt, stream};
use reqwest::{Method, StatusCode};

use crate::world::{Answer, Api, World, breakable, eventually, metric};

fn refused(answer: &Answer, code: &str) -> Result<()> {
    ensure!(
        answer.status == StatusCode::SERVICE_UNAVAILABLE,
        "{answer:?}"
    );
    ensure!(answer.json()?["code"] == code, "{answer:?}");
    ensure!(!answer.header("retry-after").is_empty(), "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn a_full_log_refuses_and_drops_nothing() -> Result<()> {
    let mut world = World::not_set_up(birb_nest_stack::shared().await?).await?;
    world
        .env
        .set("NATS_STREAM_MAX_BYTES", "256KiB")
        .set("NATS_SHARDS", "1");
    world.env.setup().await?;
    let api = world.api().await?;
    let value = format!("\"{}\"", "x".repeat(20_000));
    let mut written = std::collections::HashMap::new();
    let full = loop {
        let key = format!("k{}", written.len());
        let answer = api.post(&key, format!("{{\"value\":{value}}}")).await?;
        if answer.status != StatusCode::CREATED {
            break answer;
        }
        written.insert(key, answer.version()?);
        ensure!(written.len() < 100, "the log is never full");
    };
    refused(&full, "UNAVAILABLE")?;
    assert_eq!(full.header("retry-after"), "5");
    // A key that is in the log makes room for its own next version.
    written.insert("k0".to_owned(), api.write("k0", "\"smaller\"").await?);
    let _worker = world.eager_worker().await?;
    world.all_stored(written.iter()).await?;
    eventually("writes are taken again", async || {
        let answer = api.post("later", format!("{{\"value\":{value}}}")).await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await?;
    for (key, version) in &written {
        assert_eq!(
            api.get(key).await?.expect(StatusCode::OK)?.version()?,
            *version
        );
    }
    Ok(())
}

#[tokio::test]
async fn a_message_of_a_newer_format_is_held_and_not_lost() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    api.write("before", "1").await?;
    let jetstream = world.jetstream().await?;
    let name = format!("{}_0", world.env.vars["NATS_STREAM_NAME"]);
    let subject = jetstream
        .get_stream(&name)
        .await?
        .cached_info()
        .config
        .subjects[0]
        .replace('*', "ZnV0dXJl");
    jetstream
        .publish(subject, vec![2, 9, 9].into())
        .await?
        .await?;
    let worker = world.worker().await?;
    eventually("the worker says why it waits", async || {
        Ok(worker
            .log()?
            .contains("message format 2 is newer than this release reads")
            .then_some(()))
    })
    .await?;
    assert_eq!(
        world.sql("select count(*) from dead_keys").await?.trim(),
        "0"
    );
    let held = jetstream
        .get_stream(&name)
        .await?
        .cached_info()
        .state
        .messages;
    assert!(held >= 1, "it was dropped");
    // Other shards go on.
    for n in 0..16 {
        api.write(&format!("k{n}"), "1").await?;
    }
    eventually("the other shards are stored", async || {
        Ok((world
            .sql("select count(*) from cache_entries")
            .await?
            .trim()
            .parse::<u32>()?
            >= 10)
            .then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_nats_that_hangs_makes_outcomes_unknown_and_nothing_wrong() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let mut env = world.env.replica()?;
    env.set("NATS_PUBLISH_TIMEOUT", "500ms");
    let api = Api::start(&env).await?;
    let before = api.write("k", "1").await?;
    stack.nats.pause().await?;
    refused(&api.post("k", "{\"value\":2}").await?, "UNKNOWN_OUTCOME")?;
    assert_eq!(api.read("k").await?.as_deref(), Some("1"));
    stack.nats.resume().await?;
    // The write was on its way: it may be there, and then everybody agrees.
    eventually("writes are taken again", async || {
        let answer = api.post("other", "{\"value\":1}").await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await?;
    let _worker = world.worker().await?;
    let after = api.write("k", "3").await?;
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
    refused(&api.get("never").await?, "UNAVAILABLE")?;
    eventually("it is known to be down", async || {
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["checks"]["database"] == "down").then_some(()))
    })
    .await?;
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
    assert_eq!(
        world.sql("select count(*) from dead_keys").await?.trim(),
        "0"
    );
    for n in 0..10 {
        assert_eq!(api.read(&format!("k{n}")).await?.as_deref(), Some("19"));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_allowed_are_refused_at_once() -> Result<()> {
    let world = World::shared().await?;
    let nats = world.stack.nats.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&nats)
        .set("API_MAX_CONCURRENCY", "2")
        .set("NATS_PUBLISH_TIMEOUT", "10s");
    let api = Arc::new(Api::start(&env).await?);
    api.write("k", "1").await?;
    nats.stall();
    let held: Vec<_> = (0..2)
        .map(|n| {
            let api = api.clone();
            tokio::spawn(async move { api.post(&format!("held{n}"), "{\"value\":1}").await })
        })
        .collect();
    for key in ["held0", "held1"] {
        eventually("the write is under way", async || {
            Ok(world
                .in_redis(key)
                .await?
                .filter(|value| value.starts_with('T')))
        })
        .await?;
    }
    refused(&api.get("k").await?, "UNAVAILABLE")?;
    // Probes are no requests.
    api.send(Method::GET, "/livez", None)
        .await?
        .expect(StatusCode::OK)?;
    nats.resume();
    for write in held {
        write.await??.expect(StatusCode::CREATED)?;
    }
    api.write("k", "2").await?;
    Ok(())
}

#[tokio::test]
async fn a_process_whose_clock_is_an_hour_off_neither_hides_nor_revives() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    for offset in ["+1h", "-1h"] {
        let mut env = world.env.replica()?;
        env.set("LD_PRELOAD", libfaketime()?)
            .set("FAKETIME", offset)
            .set("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        let wrong = Api::start(&env).await?;
        let skew = wrong.metric("birbnest_clock_skew_seconds").await?;
        let skew = skew.values().copied().next().context("a skew")?;
        ensure!(
            (3500.0..3700.0).contains(&skew.abs()),
            "the clock is not off: {skew}"
        );
        // Written by the one, read by the other, both ways.
        let key = format!("k{offset}");
        api.post(&key, "{\"value\":1,\"ttl\":600}")
            .await?
            .expect(StatusCode::CREATED)?;
        let read = wrong.get(&key).await?.expect(StatusCode::OK)?.json()?;
        ensure!(
            (590..=600).contains(&read["ttl"].as_u64().context("a ttl")?),
            "{read}"
        );
        wrong
            .post(&key, "{\"value\":2,\"ttl\":600}")
            .await?
            .expect(StatusCode::CREATED)?;
        let read = api.get(&key).await?.expect(StatusCode::OK)?.json()?;
        ensure!(
            (590..=600).contains(&read["ttl"].as_u64().context("a ttl")?),
            "{read}"
        );
        let short = format!("short{offset}");
        wrong
            .post(&short, "{\"value\":1,\"ttl\":1}")
            .await?
            .expect(StatusCode::CREATED)?;
        eventually("it expires for both", async || {
            let (one, two) = (
                api.get(&short).await?.status,
                wrong.get(&short).await?.status,
            );
            Ok((one == StatusCode::NOT_FOUND && two == StatusCode::NOT_FOUND).then_some(()))
        })
        .await?;
    }
    Ok(())
}

fn libfaketime() -> Result<String> {
    ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"]
        .iter()
        .map(|dir| format!("{dir}/faketime/libfaketime.so.1"))
        .find(|path| std::path::Path::new(path).exists())
        .context(
            "libfaketime is missing: `scripts/init.sh --tests` installs it on Debian and Ubuntu",
        )
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

/// A worker that cannot reach Redis owes it, and pays by emptying it: an API that died meanwhile leaves nothing old.
#[tokio::test]
async fn what_redis_was_not_told_of_is_owed_and_paid() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let link = world.stack.redis.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link);
    let _worker = env.start(Role::Worker).await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    link.cut();
    let version = api.write("k", "2").await?;
    world.stored("k", version).await?;
    let owed = async || {
        Ok::<_, anyhow::Error>(
            world
                .sql("select count(*) from shard_state where redis_debt")
                .await?
                .trim()
                == "1",
        )
    };
    eventually("it is owed", async || Ok(owed().await?.then_some(()))).await?;
    // Something old, as a dead API might leave it.
    let old = "E00000000000000010000000000000000{\"key\":\"stale\",\"value\":0,\"version\":1,\"metadata\":{}}";
    redis::cmd("SET")
        .arg("birb:e:stale")
        .arg(old)
        .exec_async(&mut world.redis().await?)
        .await?;
    assert_eq!(
        api.read("stale").await?.as_deref(),
        Some("0"),
        "the test's own value is read"
    );
    link.heal();
    eventually("it is paid", async || Ok((!owed().await?).then_some(()))).await?;
    assert_eq!(api.read("stale").await?, None);
    assert_eq!(api.read("k").await?.as_deref(), Some("2"));
    Ok(())
}

#[tokio::test]
async fn a_standby_is_not_taken_for_the_primary() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    stack.postgres.stop().await?;
    let signal = stack.root().join("postgres/data/standby.signal");
    std::fs::write(&signal, "").with_context(|| format!("failed to write {}", signal.display()))?;
    stack.postgres.start().await?;
    let during = api.write("during", "1").await?;
    refused(&api.get("never").await?, "UNAVAILABLE")?;
    eventually("it counts as down", async || {
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["checks"]["database"] == "down").then_some(()))
    })
    .await?;
    stack.postgres.stop().await?;
    std::fs::remove_file(&signal)?;
    stack.postgres.start().await?;
    world.stored("during", during).await?;
    assert_eq!(
        world.sql("select count(*) from dead_keys").await?.trim(),
        "0"
    );
    Ok(())
}

/// Somebody else locks two rows in the other order: PostgreSQL picks the worker as the victim, and it tries again.
#[tokio::test]
async fn a_deadlock_dead_letters_nothing() -> Result<()> {
    let mut world = World::not_set_up(birb_nest_stack::shared().await?).await?;
    world
        .env
        .set("NATS_SHARDS", "1")
        .set("WORKER_BATCH_TIMEOUT", "200ms");
    world.env.setup().await?;
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
    assert_eq!(
        world.sql("select count(*) from dead_keys").await?.trim(),
        "0"
    );
    Ok(())
}
