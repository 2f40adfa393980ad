//! What goes through the whole table: it may be large, and other people may have written to it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};

use crate::{
    shown::metric,
    world::{World, eventually, eventually_within},
};

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

/// A piece of the table that cannot be read for a while is read when it can be, and those before it are not read again.
#[tokio::test]
async fn what_was_written_last_is_looked_for_on_from_where_it_failed() -> Result<()> {
    const LOCK: &str =
        "begin; lock table cache_entries in access exclusive mode; select pg_sleep(60)";
    const PIECE: &str = "looked through a piece of the table";
    let mut world = World::shared().await?;
    // As many blocks as a large table has, one row in each.
    world
        .sql(
            "alter table cache_entries set (fillfactor = 10, autovacuum_enabled = off);
             insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select 'k' || n, n, false, now(), 'application/json', '', convert_to('\"' || repeat('x', 1900) || '\"', 'UTF8')
             from generate_series(1, 9000) n",
        )
        .await?;
    let link = world.stack.postgres.proxy()?;
    world
        .env
        .through(&link)
        .set("POSTGRES_TIMEOUT", "5s")
        .set("WORKER_REHYDRATE_MAX_KEYS", "100")
        .set("WORKER_JANITOR_INTERVAL", "1h");
    let (stack, database) = (world.stack, world.env.vars["POSTGRES_DB"].clone());
    let lock = || {
        let database = database.clone();
        tokio::spawn(async move { stack.psql(&database, LOCK).await });
    };
    let n_with = async |what: &str| {
        let n = format!(
            "select count(*) from pg_locks l join pg_stat_activity a using (pid)
             where l.relation = 'cache_entries'::regclass and a.pid <> pg_backend_pid() and {what}"
        );
        anyhow::Ok(world.sql(&n).await?.trim().parse::<u32>()?)
    };
    let wait_for = async |what: &str| {
        eventually(what, async || Ok((n_with(what).await? > 0).then_some(()))).await
    };
    let (holds, is_next, waits) = (
        "a.query like 'begin; lock%' and l.granted",
        "a.query like 'begin; lock%' and not l.granted",
        "(a.query like '%octet_length(value) *%' or a.query like '%pg_relation_size%') and a.application_name not like '%janitor' and not l.granted",
    );
    let end = "select pg_terminate_backend(a.pid, 5000) from pg_locks l join pg_stat_activity a using (pid)
        where l.relation = 'cache_entries'::regclass and l.granted and a.query like 'begin; lock%'";
    lock();
    wait_for(holds).await?;
    let worker = world.worker().await?;
    world.flush_redis().await?;
    wait_for(waits).await?;
    // Whoever waits gets on by one statement, until the search has come to its second piece.
    while !worker.log()?.contains(PIECE) {
        lock();
        wait_for(is_next).await?;
        world.sql(end).await?;
        wait_for(holds).await?;
        wait_for(waits).await?;
    }
    link.cut();
    eventually("the second piece fails", async || {
        let fails = "a piece of the table is looked through again";
        Ok(worker.log()?.contains(fails).then_some(()))
    })
    .await?;
    link.heal();
    world.sql(end).await?;
    eventually("it is through", async || {
        let ended = "warmed Redis with what was written last";
        Ok(worker.log()?.contains(ended).then_some(()))
    })
    .await?;
    let n_pieces = worker.log()?.matches(PIECE).count();
    ensure!(n_pieces == 2, "{n_pieces} pieces were looked through");
    let newest = (8901..=9000).map(|n| format!("k{n}")).collect();
    eventually("what was written last is warm", async || {
        Ok((warm(&world, &newest).await? == newest).then_some(()))
    })
    .await
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
    // More of it than a page of a job has rows.
    world
        .sql(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select 'job:' || name, 1, false, now(), 'application/json', '', '1'
             from (select chr(10) || n as name from generate_series(1, 600) n union all select 'kept') names",
        )
        .await?;
    let api = world.api().await?;
    // A page is short, or empty, and goes on: however much there is of it, nobody waits for all of that.
    for (limit, n) in [(1, 9), (2, 5)] {
        let (mut listed, mut n_pages) = (Vec::new(), 0);
        let first = format!("/v1/cache?prefix=a:&limit={limit}");
        let mut path = first.clone();
        loop {
            let page = api.send(Method::GET, &path, None).await?;
            let page = page.expect(StatusCode::OK)?.json()?;
            let keys = page["keys"].as_array().context("a list")?;
            listed.extend(keys.iter().map(|key| key["key"].to_string()));
            n_pages += 1;
            let Some(cursor) = page["cursor"].as_str() else {
                break;
            };
            path = format!("{first}&cursor={cursor}");
        }
        ensure!(listed == ["\"a:kept\"", "\"a:later\""], "{listed:?}");
        ensure!(n_pages == n, "{n_pages} pages of eight rows");
    }
    let _worker = world.worker().await?;
    let job = Some(r#"{"prefix":"job:"}"#.to_owned());
    let asked = api.send(Method::POST, "/v1/rehydrate", job).await?;
    asked.expect(StatusCode::ACCEPTED)?;
    let kept = BTreeSet::from(["job:kept".to_owned()]);
    eventually("the job is through", async || {
        Ok((warm(&world, &kept).await? == kept).then_some(()))
    })
    .await?;
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
    ensure!(left.trim() == "622", "{left}");
    Ok(())
}
