//! Processes whose clocks are wrong follow the time of the servers.

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Role;
use reqwest::{Method, StatusCode};

use crate::{
    shown::{is_told, metric},
    world::{Api, World, breakable, eventually},
};

#[tokio::test]
async fn a_process_whose_clock_is_an_hour_off_neither_hides_nor_revives() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    for offset in ["+1h", "-1h"] {
        let mut env = world.env.replica()?;
        env.set_clock(offset)?;
        let wrong = Api::start(&env).await?;
        let skew = wrong.metric("birbnest_clock_skew_seconds").await?;
        let skew = skew.values().copied().next().context("a skew")?;
        ensure!(
            (3500.0..3700.0).contains(&skew.abs()),
            "the clock is not off: {skew}"
        );
        is_told(&wrong.process, "following the clock of another server").await?;
        // Written by the one, read by the other, both ways.
        let key = format!("k{offset}");
        api.post(&key, "{\"value\":1,\"ttl\":600}")
            .await?
            .expect(StatusCode::CREATED)?;
        let read = wrong.get(&key).await?.expect(StatusCode::OK)?.json()?;
        ensure!(
            (590..=610).contains(&read["ttl"].as_u64().context("a ttl")?),
            "{read}"
        );
        wrong
            .post(&key, "{\"value\":2,\"ttl\":600}")
            .await?
            .expect(StatusCode::CREATED)?;
        let read = api.get(&key).await?.expect(StatusCode::OK)?.json()?;
        ensure!(
            (590..=610).contains(&read["ttl"].as_u64().context("a ttl")?),
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

/// NATS is all that is there when it starts: the time of its first writes is that of NATS.
#[tokio::test]
async fn a_wrong_clock_is_corrected_before_the_first_write() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let right = world.api().await?;
    stack.postgres.stop().await?;
    stack.redis.stop().await?;
    let mut env = world.env.replica()?;
    env.set_clock("-1h")?;
    let wrong = Api::start_alone(&env).await?;
    wrong
        .post("k", "{\"value\":1,\"ttl\":600}")
        .await?
        .expect(StatusCode::CREATED)?;
    stack.postgres.start().await?;
    stack.redis.start().await?;
    let read = eventually("it is read by another one", async || {
        let answer = right.get("k").await?;
        Ok((answer.status == StatusCode::OK).then_some(answer))
    })
    .await?;
    let ttl = read.json()?["ttl"].as_u64().context("a ttl")?;
    ensure!((500..=610).contains(&ttl), "{read:?}");
    Ok(())
}

/// It stores, reaps and warms by the time of PostgreSQL.
#[tokio::test]
async fn a_worker_whose_clock_is_an_hour_off_neither_hides_nor_revives() -> Result<()> {
    for offset in ["+1h", "-1h"] {
        let mut world = World::shared().await?;
        world
            .env
            .set("WORKER_JANITOR_INTERVAL", "100ms")
            .set("WORKER_JANITOR_GRACE", "30m");
        // On both sides of the half hour that janitors leave: by a clock that is an hour ahead all of them are to be reaped, by
        // one that is behind none is.
        world
            .sql(
                "insert into cache_entries (key, version, deleted, written_at, expires_at, content_type, metadata, value)
                 select state || age, 1, state = 'deleted', now() - age * interval '1 minute',
                        case state when 'expired' then now() - age * interval '1 minute' end, 'application/json', '', '1'
                 from unnest(array['deleted', 'expired']) state, unnest(array[15, 45]) age",
            )
            .await?;
        let api = world.api().await?;
        let kept = api.post("kept", r#"{"value":1,"ttl":1800}"#).await?;
        kept.expect(StatusCode::CREATED)?;
        world.env.set_clock(offset)?;
        let worker = world.worker().await?;
        let skew = metric(&world.env.worker_url(), "birbnest_clock_skew_seconds").await?;
        let skew = skew.values().copied().next().context("a skew")?;
        ensure!(
            (3500.0..3700.0).contains(&skew.abs()),
            "the clock is not off: {skew}"
        );
        let rows = || world.sql("select key from cache_entries order by key");
        eventually("what is to go is reaped", async || {
            Ok((!rows().await?.contains("45")).then_some(()))
        })
        .await?;
        // It walks along the keys: another one behind them shows that it came past them again.
        let later = "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
            values ('later', 1, true, now() - interval '45 minutes', '', '', '')";
        world.sql(later).await?;
        eventually("it comes by again, and has stored", async || {
            let rows = rows().await?;
            Ok((rows.trim() == "deleted15\nexpired15\nkept").then_some(()))
        })
        .await?;
        let expires = "select extract(epoch from expires_at - now())::int from cache_entries where key = 'kept'";
        let expires: i64 = world.sql(expires).await?.trim().parse()?;
        ensure!(
            (1700..=1800).contains(&expires),
            "{offset}: {expires} s are left"
        );

        redis::cmd("DEL")
            .arg(
                ["kept", "deleted15", "expired15"]
                    .map(|key| format!("birb:e:{key}"))
                    .as_slice(),
            )
            .exec_async(&mut world.redis().await?)
            .await?;
        let body = r#"{"keys":["kept","deleted15","expired15"]}"#.to_owned();
        let asked = api.send(Method::POST, "/v1/rehydrate", Some(body)).await?;
        asked.expect(StatusCode::ACCEPTED)?;
        eventually("it is warm", async || {
            for key in ["kept", "deleted15", "expired15"] {
                let value = world.in_redis(key).await?;
                if value.is_none_or(|value| value.starts_with('T')) {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .await?;
        let left: i64 = redis::cmd("TTL")
            .arg("birb:e:kept")
            .query_async(&mut world.redis().await?)
            .await?;
        ensure!((1700..=1870).contains(&left), "{offset}: {left} s in Redis");
        let read = api.get("kept").await?.expect(StatusCode::OK)?;
        ensure!(read.header("birb-source") == "redis", "{read:?}");
        for key in ["deleted15", "expired15"] {
            api.get(key).await?.expect(StatusCode::NOT_FOUND)?;
        }
        drop(worker);
    }
    Ok(())
}

/// How long something waits to be stored is told by the same time: an alert goes by it.
#[tokio::test]
async fn a_worker_whose_clock_is_an_hour_off_tells_how_long_something_waits() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut env = world.env.replica()?;
    env.set_clock("+1h")?;
    let _worker = env.start(Role::Worker).await?;
    let lock = "begin; lock table cache_entries in share mode; select pg_sleep(60)";
    let waiting = async {
        eventually("the lock is held", async || {
            let held = "select count(*) from pg_locks where mode = 'ShareLock' and locktype = 'relation' and granted
                and database = (select oid from pg_database where datname = current_database())";
            Ok((world.sql(held).await?.trim() == "1").then_some(()))
        })
        .await?;
        let version = api.write("k", "1").await?;
        let age = eventually("it waits", async || {
            let ages = metric(&env.worker_url(), "birbnest_log_oldest_age_seconds").await?;
            Ok(ages.values().copied().find(|age| *age > 0.0))
        })
        .await?;
        ensure!(age < 600.0, "{age} s");
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
            where query like '%pg_sleep(60)' and pid <> pg_backend_pid() and datname = current_database()";
        world.sql(end).await?;
        world.stored("k", version).await
    };
    let (locked, waited) = tokio::join!(world.sql(lock), waiting);
    waited?;
    ensure!(locked.is_err(), "{locked:?}");
    Ok(())
}
