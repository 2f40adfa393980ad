//! What goes through the whole table: it may be large, and other people may have written to it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};

use crate::world::{World, eventually, eventually_within, metric};

/// Keys that Redis has entries of.
async fn warm(world: &World<'_>, keys: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let places: Vec<String> = keys.iter().map(|key| format!("birb:e:{key}")).collect();
    let found: Vec<Option<String>> = redis::cmd("MGET")
        .arg(places)
        .query_async(&mut world.redis().await?)
        .await?;
    let is_warm =
        |value: &Option<String>| value.as_ref().is_some_and(|value| value.starts_with('E'));
    let warm = keys.iter().zip(&found).filter(|(_, value)| is_warm(value));
    Ok(warm.map(|(key, _)| key.clone()).collect())
}

/// How often "everything" was through.
async fn n_ended(world: &World<'_>) -> Result<f64> {
    let counts = metric(
        &world.env.worker_url(),
        "birbnest_worker_rehydrations_total",
    )
    .await?;
    let ended = counts.iter().filter(|(labels, _)| {
        labels.contains("kind=\"everything\"") && labels.contains("how=\"ended\"")
    });
    Ok(ended.map(|(_, n)| n).sum())
}

/// No statement reads all of it, which could take longer than a statement may: it would be tried again and again.
#[tokio::test]
async fn what_was_written_last_is_found_in_a_large_table_piece_by_piece() -> Result<()> {
    let mut world = World::shared().await?;
    world.env.set("WORKER_REHYDRATE_MAX_KEYS", "1000");
    // More than 64 MiB, in which old and new are mixed.
    world
        .sql(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select 'k' || version, version, false, now(), 'application/json', '',
                    convert_to('\"' || repeat('x', 1900) || '\"', 'UTF8')
             from (select n * 7919 % 40009 + 1 as version from generate_series(1, 40000) n) mixed",
        )
        .await?;
    world.sql("analyze cache_entries").await?;
    let n_blocks = "select pg_relation_size('cache_entries') / 8192";
    let n_blocks: u64 = world.sql(n_blocks).await?.trim().parse()?;
    ensure!(n_blocks > 8192, "{n_blocks} blocks are one piece");
    let newest = "select key from cache_entries order by version desc limit 1000";
    let newest: BTreeSet<String> = world
        .sql(newest)
        .await?
        .lines()
        .map(str::to_owned)
        .collect();
    let _api = world.api().await?;
    let _worker = world.worker().await?;
    let n_scans = async || {
        let sql = "select seq_scan from pg_stat_user_tables where relname = 'cache_entries'";
        anyhow::Ok(world.sql(sql).await?.trim().parse::<u64>()?)
    };
    let before = (n_scans().await?, n_ended(&world).await?);
    world.flush_redis().await?;
    // One that began when Redis was found empty at the start may end now, too.
    eventually_within(
        4 * crate::world::PATIENCE,
        "it is through, and warm",
        async || {
            let is_through = n_ended(&world).await? > before.1;
            Ok((is_through && warm(&world, &newest).await? == newest).then_some(()))
        },
    )
    .await?;
    let in_redis: u64 = redis::cmd("DBSIZE")
        .query_async(&mut world.redis().await?)
        .await?;
    ensure!(in_redis < 1010, "{in_redis} keys");
    ensure!(n_scans().await? == before.0, "a statement read all of it");
    Ok(())
}

/// Rows that are of no key, as somebody else may have put them there, stop nobody.
#[tokio::test]
async fn rows_of_what_is_no_key_are_passed_over() -> Result<()> {
    let mut world = World::shared().await?;
    world
        .env
        .set("WORKER_REHYDRATE_MAX_KEYS", "1000")
        .set("WORKER_JANITOR_INTERVAL", "100ms");
    // Before and after the others, older and newer.
    world
        .sql(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select prefix || name, row_number() over (), name = 'gone', now() - interval '1 day', 'application/json', '', '1'
             from unnest(array['', 'a:', 'z']) prefix,
                  unnest(array[chr(1), chr(2), chr(3), 'gone', 'kept', 'later', chr(127), repeat('x', 600)]) name",
        )
        .await?;
    let api = world.api().await?;
    let mut listed = Vec::new();
    let mut path = "/v1/cache?prefix=a:&limit=2".to_owned();
    loop {
        let page = api.send(Method::GET, &path, None).await?;
        let page = page.expect(StatusCode::OK)?.json()?;
        let keys = page["keys"].as_array().context("a list")?;
        listed.extend(keys.iter().map(|key| key["key"].to_string()));
        let Some(cursor) = page["cursor"].as_str() else {
            break;
        };
        path = format!("/v1/cache?prefix=a:&limit=2&cursor={cursor}");
    }
    ensure!(listed == ["\"a:kept\"", "\"a:later\""], "{listed:?}");
    let _worker = world.worker().await?;
    let keys: BTreeSet<String> = ["", "a:", "z"]
        .iter()
        .flat_map(|prefix| ["kept", "later"].map(|name| format!("{prefix}{name}")))
        .collect();
    world.flush_redis().await?;
    eventually("all keys are warm", async || {
        Ok((warm(&world, &keys).await? == keys).then_some(()))
    })
    .await?;
    eventually("the janitor has gone round", async || {
        let left = "select count(*) from cache_entries where key like '%gone'";
        Ok((world.sql(left).await?.trim() == "0").then_some(()))
    })
    .await?;
    let left = world.sql("select count(*) from cache_entries").await?;
    ensure!(left.trim() == "21", "{left}");
    Ok(())
}
