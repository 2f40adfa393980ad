//! Deleted and expired entries never come back.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use reqwest::StatusCode;

use crate::{
    shown::is_counted,
    world::{Api, PATIENCE, World, eventually},
};

async fn gone(world: &World<'_>, api: &Api, key: &str) -> Result<()> {
    for _ in 0..2 {
        for _ in 0..3 {
            api.get(key).await?.expect(StatusCode::NOT_FOUND)?;
        }
        world.flush_redis().await?;
    }
    Ok(())
}

#[tokio::test]
async fn deleted_and_expired_entries_stay_gone_through_rehydration() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    api.write("deleted", "1").await?;
    let timed = api
        .post("expired", r#"{"value":1,"ttl":1}"#)
        .await?
        .expect(StatusCode::CREATED)?;
    assert_eq!(timed.json()?["ttl"], 1);
    // It stays in Redis beyond its end, to end lookups.
    let kept: i64 = redis::cmd("PTTL")
        .arg("birb:e:expired")
        .query_async(&mut world.redis().await?)
        .await?;
    assert!(kept > 10_000, "{kept} ms");
    let kept = api
        .post("kept", r#"{"value":1,"ttl":3600}"#)
        .await?
        .expect(StatusCode::CREATED)?;
    assert_eq!(kept.json()?["ttl"], 3600);
    api.delete("deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    eventually("it expires", async || {
        let answer = api.get("expired").await?;
        Ok((answer.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    // While everything is in the log alone.
    gone(&world, &api, "deleted").await?;
    gone(&world, &api, "expired").await?;
    // When everything is in PostgreSQL alone.
    let _worker = world.eager_worker().await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    world.flush_redis().await?;
    gone(&world, &api, "deleted").await?;
    gone(&world, &api, "expired").await?;
    let kept = api.get("kept").await?.expect(StatusCode::OK)?.json()?;
    assert!(
        (3500..=3600).contains(&kept["ttl"].as_u64().unwrap()),
        "{kept}"
    );
    assert_eq!(
        kept["expires_at"].as_str().unwrap().len(),
        "2026-01-01T00:00:00.000000Z".len()
    );
    // What was gone can be written again.
    api.write("deleted", "2").await?;
    assert_eq!(api.read("deleted").await?.as_deref(), Some("2"));
    Ok(())
}

#[tokio::test]
async fn the_janitor_removes_rows_of_what_is_gone_and_nothing_else() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_JANITOR_INTERVAL", "100ms")
        .set("WORKER_JANITOR_GRACE", "1ms")
        .set("LOG_TRIM_LAG", "1ms")
        .set("LOG_TRIM_INTERVAL", "20ms");
    api.write("deleted", "1").await?;
    api.write("kept", "1").await?;
    api.post("timed", r#"{"value":1,"ttl":3600}"#)
        .await?
        .expect(StatusCode::CREATED)?;
    api.post("expired", r#"{"value":1,"ttl":1}"#)
        .await?
        .expect(StatusCode::CREATED)?;
    api.delete("deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    let _worker = env.start(birb_nest_stack::Role::Worker).await?;
    eventually("it expires", async || {
        Ok((api.get("expired").await?.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    eventually("two rows are left, and no message", async || {
        if world.log_depth().await?.0 > 0 {
            return Ok(None);
        }
        let rows = world
            .sql("select key from cache_entries order by key")
            .await?;
        Ok((rows.trim() == "kept\ntimed").then_some(()))
    })
    .await?;
    for key in ["deleted", "expired"] {
        gone(&world, &api, key).await?;
    }
    for key in ["kept", "timed"] {
        assert_eq!(api.read(key).await?.as_deref(), Some("1"));
    }
    api.write("deleted", "2").await?;
    assert_eq!(api.read("deleted").await?.as_deref(), Some("2"));
    Ok(())
}

/// What is gone stays as long as something older of its key may still come: the shard has not come past it, or the key has a
/// dead letter.
#[tokio::test]
async fn the_janitor_leaves_what_something_older_may_still_replace() -> Result<()> {
    let world = World::shared().await?;
    let gone = |key: &str, version: &str| {
        format!(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             values ('{key}', {version}, true, now() - interval '1 day', '', '', '');"
        )
    };
    let far = "(select max(applied_to) + 1000000 from shard_state)";
    world
        .sql(&[gone("ahead", far), gone("dead", "1"), gone("gone", "1")].concat())
        .await?;
    world
        .sql(
            "insert into dead_keys (key, shard, version, dlq_seq, sqlstate, reason)
             values ('dead', 0, 2, 1, 'P0001', 'a test says so')",
        )
        .await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_JANITOR_INTERVAL", "50ms")
        .set("WORKER_JANITOR_GRACE", "1ms");
    let _worker = env.start(birb_nest_stack::Role::Worker).await?;
    let rows = || world.sql("select key from cache_entries order by key");
    eventually("the janitor comes by", async || {
        Ok((!rows().await?.contains("gone")).then_some(()))
    })
    .await?;
    // It walks along the keys, many in a step: one before the two shows that it looked at them again.
    world.sql(&gone("again", "1")).await?;
    eventually("the janitor comes by again", async || {
        Ok((!rows().await?.contains("again")).then_some(()))
    })
    .await?;
    assert_eq!(rows().await?.trim(), "ahead\ndead");
    is_counted(&env.worker_url(), "birbnest_worker_rows_reaped_total", "").await
}

/// Workers that are restarted more often than the janitor goes round reap nevertheless.
#[tokio::test]
async fn the_janitor_comes_soon_after_a_worker_started() -> Result<()> {
    let world = World::shared().await?;
    let gone = "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
        values ('gone', 1, true, now() - interval '1 day', '', '', '')";
    let mut env = world.env.replica()?;
    env.set("WORKER_JANITOR_INTERVAL", "1h");
    for _ in 0..2 {
        world.sql(gone).await?;
        let worker = env.start(birb_nest_stack::Role::Worker).await?;
        eventually("the row is reaped", async || {
            Ok(world.row("gone").await?.is_none().then_some(()))
        })
        .await?;
        worker.terminate(PATIENCE).await?;
    }
    Ok(())
}

/// A round that is broken off leaves out other keys each time: it begins anywhere, and ends where it began.
#[tokio::test]
async fn the_janitor_sets_out_from_anywhere_and_comes_to_all() -> Result<()> {
    const ROUNDS: usize = 6;
    let world = World::shared().await?;
    // The order in which they go.
    world
        .sql(
            "create table reaped (n serial, key text);
             create function note() returns trigger language plpgsql as
                 $$ begin insert into reaped (key) values (old.key); return null; end $$;
             create trigger note after delete on cache_entries for each row execute function note()",
        )
        .await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_JANITOR_INTERVAL", "100ms");
    let mut firsts = BTreeSet::new();
    for _ in 0..ROUNDS {
        // One of them in each of its steps.
        world
            .sql(
                "truncate cache_entries, reaped;
                 insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
                 select 'k' || lpad(n::text, 5, '0'), 1, n % 500 = 0, now() - interval '1 day', '', '', ''
                 from generate_series(1, 10000) n",
            )
            .await?;
        let worker = env.start(birb_nest_stack::Role::Worker).await?;
        let mut order = eventually("all of them are reaped", async || {
            let order = world.sql("select key from reaped order by n").await?;
            let order: Vec<String> = order.lines().map(str::to_owned).collect();
            Ok((order.len() == 20).then_some(order))
        })
        .await?;
        worker.terminate(PATIENCE).await?;
        firsts.insert(order[0].clone());
        // Along the keys, and once around.
        let least = order.iter().min().context("twenty keys")?.clone();
        let place = order.iter().position(|key| *key == least);
        order.rotate_left(place.context("it is one of them")?);
        ensure!(order.is_sorted(), "{order:?}");
        if firsts.len() > 1 {
            return Ok(());
        }
    }
    bail!("each of {ROUNDS} rounds began with {firsts:?}")
}

#[tokio::test]
async fn a_missing_key_is_remembered_and_a_write_seen_at_once() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let other = Api::start(&world.env.replica()?).await?;
    for round in 0..20 {
        let key = format!("k{round}");
        api.get(&key).await?.expect(StatusCode::NOT_FOUND)?;
        assert_eq!(world.in_redis(&key).await?.as_deref(), Some("N"));
        api.write(&key, "1").await?;
        assert_eq!(other.read(&key).await?.as_deref(), Some("1"));
    }
    Ok(())
}
