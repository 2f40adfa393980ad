//! Writes that ask for PostgreSQL wait for it, for a while.

use anyhow::{Context, Result, ensure};
use birb_nest_core::Key;
use futures::StreamExt;
use reqwest::{Method, StatusCode};
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    dead_letters::REFUSE,
    world::{Answer, Api, PATIENCE, World, breakable, eventually},
};

const DATABASE: &[(&str, &str)] = &[("birb-durability", "database")];

async fn api_that_waits(world: &World<'_>, limit: &str) -> Result<Api> {
    let mut env = world.env.replica()?;
    env.set("API_DURABILITY_TIMEOUT", limit)
        .set("API_REQUEST_TIMEOUT", "60s");
    Api::start(&env).await
}

/// A write that waits for PostgreSQL, of which nobody tells.
async fn waiting_write(world: &World<'_>) -> Result<JoinHandle<Result<Answer>>> {
    let api = api_that_waits(world, "30s").await?;
    let write = tokio::spawn(async move { api.post_if("k", DATABASE, "1").await });
    eventually("the write is in the log", async || {
        Ok((world.log_depth().await?.1 > 0).then_some(()))
    })
    .await?;
    Ok(write)
}

fn reached(answer: &Answer) -> (StatusCode, &str) {
    (answer.status, answer.header("birb-durability"))
}

#[tokio::test]
async fn a_write_that_asks_for_postgresql_is_answered_once_it_is_there() -> Result<()> {
    let world = World::shared().await?;
    let _worker = world.worker().await?;
    let api = api_that_waits(&world, "30s").await?;
    for round in 0..20 {
        let key = format!("k{round}");
        let answer = api.post_if(&key, DATABASE, "1").await?;
        assert_eq!(reached(&answer), (StatusCode::CREATED, "database"));
        let row = world.row(&key).await?.context("a row")?;
        assert_eq!(row, (answer.version()?, false, "1".to_owned()));
        let answer = api.ask(Method::DELETE, &key, DATABASE).await?;
        assert_eq!(reached(&answer), (StatusCode::NO_CONTENT, "database"));
        assert!(world.row(&key).await?.context("a row")?.1, "no tombstone");
    }
    let conditional = [DATABASE[0], ("if-none-match", "*")];
    let answer = api.post_if("new", &conditional, "1").await?;
    assert_eq!(reached(&answer), (StatusCode::CREATED, "database"));
    let again = api.post_if("new", &conditional, "1").await?;
    again.mismatch(Some(answer.version()?))?;
    let answer = api.post_if("k", &[("birb-durability", "log")], "1").await?;
    assert_eq!(reached(&answer), (StatusCode::CREATED, "log"));
    let answer = api.post_if("k", &[], "1").await?;
    assert_eq!(reached(&answer), (StatusCode::CREATED, ""));
    Ok(())
}

/// It is kept by the log, and PostgreSQL knows that it is.
#[tokio::test]
async fn a_write_that_becomes_a_dead_letter_is_where_it_asked_to_be() -> Result<()> {
    let world = World::shared().await?;
    world.sql(REFUSE).await?;
    let _worker = world.worker().await?;
    let api = api_that_waits(&world, "30s").await?;
    let answer = api.post_if("poison", DATABASE, "1").await?;
    assert_eq!(reached(&answer), (StatusCode::CREATED, "database"));
    let dead = world.sql("select version from dead_keys").await?;
    assert_eq!(dead.trim(), answer.header("etag").trim_matches('"'));
    Ok(())
}

#[tokio::test]
async fn a_write_that_waited_in_vain_says_that_it_is_in_the_log() -> Result<()> {
    let world = World::shared().await?;
    let api = api_that_waits(&world, "100ms").await?;
    let answer = api.post_if("k", DATABASE, "1").await?;
    assert_eq!(reached(&answer), (StatusCode::ACCEPTED, "log"));
    assert_eq!(answer.json()?["value"], 1);
    let read = api.get("k").await?.expect(StatusCode::OK)?;
    assert_eq!(read.version()?, answer.version()?);
    let answer = api.ask(Method::DELETE, "k", DATABASE).await?;
    assert_eq!(reached(&answer), (StatusCode::ACCEPTED, "log"));
    api.get("k").await?.expect(StatusCode::NOT_FOUND)?;
    Ok(())
}

/// Besides POST.
const WAYS: [(Method, &str, &str); 3] = [
    (Method::PUT, "/v1/cache/k", r#"{"value":1}"#),
    (Method::PUT, "/v1/raw/k", "2"),
    (Method::PATCH, "/v1/cache/k", r#"{"ttl":600}"#),
];

#[tokio::test]
async fn each_way_to_write_a_key_waits() -> Result<()> {
    let world = World::shared().await?;
    let hasty = api_that_waits(&world, "100ms").await?;
    let write = async |api: &Api, (method, path, body): (Method, &str, &str)| {
        api.send_with(method, path, DATABASE, Some(body.to_owned()))
            .await
    };
    for way in WAYS {
        let answer = write(&hasty, way).await?;
        assert_eq!(
            reached(&answer),
            (StatusCode::ACCEPTED, "log"),
            "{answer:?}"
        );
        let read = hasty.get("k").await?.expect(StatusCode::OK)?;
        assert_eq!(read.version()?, answer.version()?);
    }
    let patient = api_that_waits(&world, "30s").await?;
    let _worker = world.worker().await?;
    for way in WAYS {
        let answer = write(&patient, way).await?;
        assert_eq!(reached(&answer), (StatusCode::OK, "database"), "{answer:?}");
        let (version, ..) = world.row("k").await?.context("a row")?;
        assert_eq!(version, answer.version()?);
    }
    Ok(())
}

#[tokio::test]
async fn what_postgresql_says_is_enough_without_an_announcement() -> Result<()> {
    let world = World::shared().await?;
    let write = waiting_write(&world).await?;
    world
        .sql("update shard_state set applied_to = applied_to + 1000")
        .await?;
    let answer = write.await??;
    assert_eq!(reached(&answer), (StatusCode::CREATED, "database"));
    Ok(())
}

/// A log that lost its tail begins another life, behind all that was lost with it.
#[tokio::test]
async fn of_a_life_that_is_over_nothing_more_is_confirmed() -> Result<()> {
    let world = World::shared().await?;
    let write = waiting_write(&world).await?;
    world
        .sql("update shard_state set base = base + 1000000, applied_to = base + 1000001")
        .await?;
    let answer = timeout(PATIENCE, write)
        .await
        .context("it waits for nothing")???;
    assert_eq!(reached(&answer), (StatusCode::ACCEPTED, "log"));
    Ok(())
}

/// Where workers say how far `k` is stored.
fn subject(world: &World<'_>) -> Result<String> {
    let config = world.config::<birb_nest_store::LogConfig>()?;
    let shard = config.nats_shards.shard_of(&Key::parse("k")?);
    Ok(format!("{}.applied.{shard}", config.nats_subject_prefix))
}

#[tokio::test]
async fn an_owners_announcement_is_enough() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = api_that_waits(&world, "30s").await?;
    let subject = subject(&world)?;
    let client = async_nats::connect(format!("nats://127.0.0.1:{}", stack.nats.port())).await?;
    // A worker says so.
    let mut announced = client.subscribe(subject.clone()).await?;
    client.flush().await?;
    let worker = world.worker().await?;
    let version = api.write("k", "1").await?;
    timeout(PATIENCE, async {
        loop {
            let message = announced.next().await.context("connected")?;
            let words = std::str::from_utf8(&message.payload)?;
            let (_, applied_to) = words.split_once(' ').context("two numbers")?;
            let applied_to: u64 = applied_to.parse()?;
            if applied_to >= version {
                return anyhow::Ok(());
            }
        }
    })
    .await
    .context("the worker announces nothing")??;
    drop(worker);
    // And whoever waits believes it: nobody else can say anything here.
    stack.postgres.kill().await?;
    let write = tokio::spawn(async move { api.post_if("k", DATABASE, "2").await });
    eventually("the announcement is heard", async || {
        let later = format!("{} {}", version - 1, version + 1000);
        client.publish(subject.clone(), later.into()).await?;
        Ok(write.is_finished().then_some(()))
    })
    .await?;
    assert_eq!(reached(&write.await??), (StatusCode::CREATED, "database"));
    Ok(())
}

/// PostgreSQL may take long to say how far it is: workers are heard meanwhile.
#[tokio::test]
async fn an_announcement_is_heard_while_postgresql_is_asked() -> Result<()> {
    let world = World::shared().await?;
    // Less than PostgreSQL is waited for.
    let api = api_that_waits(&world, "15s").await?;
    let version = api.write("k", "1").await?;
    let lock = "begin; lock table shard_state in access exclusive mode; select pg_sleep(60)";
    let asking = async {
        let n_with = async |granted: bool| {
            let n = format!(
                "select count(*) from pg_locks where relation = 'shard_state'::regclass and granted = {granted}
                 and database = (select oid from pg_database where datname = current_database())"
            );
            anyhow::Ok(world.sql(&n).await?.trim().parse::<u32>()?)
        };
        eventually("the table is locked", async || {
            Ok((n_with(true).await? > 0).then_some(()))
        })
        .await?;
        let write = tokio::spawn(async move { api.post_if("k", DATABASE, "2").await });
        eventually("PostgreSQL is asked", async || {
            Ok((n_with(false).await? > 0).then_some(()))
        })
        .await?;
        let nats = format!("nats://127.0.0.1:{}", world.stack.nats.port());
        let client = async_nats::connect(nats).await?;
        let later = format!("{} {}", version - 1, version + 1000);
        client.publish(subject(&world)?, later.into()).await?;
        client.flush().await?;
        let answer = write.await??;
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
            where query like '%pg_sleep(60)' and pid <> pg_backend_pid() and datname = current_database()";
        world.sql(end).await?;
        assert_eq!(reached(&answer), (StatusCode::CREATED, "database"));
        anyhow::Ok(())
    };
    let (locked, asked) = tokio::join!(world.sql(lock), asking);
    asked?;
    ensure!(locked.is_err(), "{locked:?}");
    Ok(())
}
