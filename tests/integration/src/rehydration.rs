//! A Redis that came back empty is warm again soon, and PostgreSQL hardly notices.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use reqwest::{Method, StatusCode};

use crate::{
    dead_letters::REFUSE,
    shown::{counted, is_told},
    world::{PATIENCE, World, breakable, eventually, eventually_within},
};

/// What is logged when a queue is made that was there before.
const MADE_ANEW: &str = "made the queue of rehydration requests anew";

const N_KEYS: u64 = 100_000;
/// Writes whose time is compared with that of writes during the warming.
const N_COMPARED: u32 = 500;

async fn commits(world: &World<'_>) -> Result<u64> {
    let sql = "select xact_commit from pg_stat_database where datname = current_database()";
    Ok(world.sql(sql).await?.trim().parse()?)
}

async fn keys_in_redis(world: &World<'_>) -> Result<u64> {
    Ok(redis::cmd("DBSIZE")
        .query_async(&mut world.redis().await?)
        .await?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_keys_are_warm_again_after_flushall() -> Result<()> {
    let stack = breakable().await?;
    let mut world = World::on(&stack).await?;
    world.env.set("WORKER_REHYDRATE_MAX_KEYS", "1000000");
    let api = world.api().await?;
    let _worker = world.worker().await?;
    // As if they had been written long ago: in PostgreSQL, and in no log any more.
    world
        .sql(&format!(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select 'k' || n, n, false, now(), 'application/json', '', convert_to(n::text, 'UTF8')
             from generate_series(1, {N_KEYS}) n"
        ))
        .await?;
    world.sql("analyze cache_entries").await?;
    // How fast writes are when nothing is warmed.
    let undisturbed = Instant::now();
    for _ in 0..N_COMPARED {
        api.write("meanwhile", "1").await?;
    }
    let undisturbed = undisturbed.elapsed() / N_COMPARED;
    let before = commits(&world).await?;
    let started = Instant::now();
    redis::cmd("FLUSHALL")
        .exec_async(&mut world.redis().await?)
        .await?;
    // Writes go on at their speed meanwhile.
    let mut slowest = Duration::ZERO;
    let mut n_writes = 0u32;
    // Some of them are only being looked up.
    while keys_in_redis(&world).await? <= N_KEYS * 19 / 20 {
        let begun = Instant::now();
        api.write("meanwhile", "1").await?;
        slowest = slowest.max(begun.elapsed());
        n_writes += 1;
        ensure!(started.elapsed() < 20 * PATIENCE, "Redis stays cold");
    }
    let took = started.elapsed();
    let queries = commits(&world).await?.saturating_sub(before);
    let (mut n_hits, mut n_reads) = (0, 0);
    for n in (1..=N_KEYS).step_by(97) {
        let answer = api.get(&format!("k{n}")).await?.expect(StatusCode::OK)?;
        assert_eq!(answer.json()?["value"], n);
        n_hits += u64::from(answer.header("birb-source") == "redis");
        n_reads += 1;
    }
    println!(
        "{N_KEYS} keys: nineteen of twenty back after {took:?}, {queries} transactions in PostgreSQL; then {n_hits} of {n_reads} reads hit; \
         {n_writes} writes meanwhile took {:?} each, the slowest {slowest:?}; before that {undisturbed:?} each",
        took / n_writes
    );
    assert!(n_hits * 10 > n_reads * 9, "{n_hits} of {n_reads}");
    let worker = world.env.worker_url();
    let n_warmed = counted(&worker, "birbnest_worker_keys_warmed_total", "").await?;
    let n_filled = counted(&worker, "birbnest_cache_rehydrations_total", "postgres").await?;
    assert!(
        n_warmed.min(n_filled) > N_KEYS as f64 * 0.9,
        "{n_warmed} {n_filled}"
    );
    // Far from one per key; each second has some for other things, the workers' own checks among them.
    let others = 100 * took.as_secs();
    assert!(queries < N_KEYS / 5 + others, "{queries} transactions");
    Ok(())
}

#[tokio::test]
async fn keys_that_missed_while_postgresql_was_down_are_warmed_when_it_is_back() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.eager_worker().await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    redis::cmd("DEL")
        .arg("birb:e:k")
        .exec_async(&mut world.redis().await?)
        .await?;
    stack.postgres.kill().await?;
    api.get("k").await?.refused("UNAVAILABLE")?;
    assert_eq!(
        world.in_redis("k").await?,
        None,
        "the lookup that failed keeps the place"
    );
    stack.postgres.start().await?;
    eventually("Redis has it, and nobody read it", async || {
        Ok(world
            .in_redis("k")
            .await?
            .filter(|value| value.starts_with('E')))
    })
    .await?;
    assert_eq!(api.get("k").await?.header("birb-source"), "redis");
    Ok(())
}

/// Many misses of one request are answered at once, by one question to PostgreSQL; Redis gets them from the workers.
#[tokio::test]
async fn a_large_batch_read_is_complete_at_once_and_warmed_through_nats() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let worker = world.eager_worker().await?;
    let mut written = std::collections::HashMap::new();
    for n in 0..90 {
        let key = format!("k{n}");
        written.insert(key.clone(), api.write(&key, &n.to_string()).await?);
    }
    api.delete("k0").await?.expect(StatusCode::NO_CONTENT)?;
    written.remove("k0");
    world.all_stored(written.iter()).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    // A third is stored, a third is in the log alone, and the rest never was.
    worker.terminate(PATIENCE).await?;
    for n in 45..90 {
        let key = format!("k{n}");
        written.insert(key.clone(), api.write(&key, &n.to_string()).await?);
    }
    let places =
        |keys: std::ops::Range<u32>| keys.map(|n| format!("birb:e:k{n}")).collect::<Vec<_>>();
    let evict = async || {
        let mut redis = world.redis().await?;
        redis::cmd("DEL")
            .arg(places(0..100))
            .exec_async(&mut redis)
            .await?;
        anyhow::Ok(())
    };
    evict().await?;
    let names: Vec<String> = (0..100).map(|n| format!("\"k{n}\"")).collect();
    let body = format!("{{\"keys\":[{}]}}", names.join(","));
    let batch = async || {
        let answer = api
            .send(Method::POST, "/v1/cache/batch/get", Some(body.clone()))
            .await?;
        anyhow::Ok(answer.expect(StatusCode::OK)?.json()?)
    };
    let check = |batch: &serde_json::Value| {
        for n in 1..90 {
            let (entry, key) = (&batch["entries"][format!("k{n}")], format!("k{n}"));
            ensure!(
                entry["value"] == n && entry["version"] == written[&key],
                "{key}: {entry}"
            );
        }
        ensure!(
            batch["missing"].as_array().map(Vec::len) == Some(11),
            "{batch}"
        );
        ensure!(batch["errors"] == serde_json::json!({}), "{batch}");
        Ok(())
    };
    check(&batch().await?)?;
    assert_eq!(
        keys_in_redis(&world).await?,
        1,
        "the API itself filled Redis, or took leases"
    );
    let _worker = world.worker().await?;
    world.all_stored(written.iter()).await?;
    evict().await?;
    check(&batch().await?)?;
    eventually("Redis has all of it, and nobody read it", async || {
        let found: Vec<Option<String>> = redis::cmd("MGET")
            .arg(places(1..90))
            .query_async(&mut world.redis().await?)
            .await?;
        let is_warm =
            |value: &Option<String>| value.as_ref().is_some_and(|value| value.starts_with('E'));
        Ok(found.iter().all(is_warm).then_some(()))
    })
    .await?;
    let sources = async || api.metric("birbnest_cache_reads_total").await;
    let from_redis = |sources: std::collections::BTreeMap<String, f64>| {
        sources
            .iter()
            .filter(|(labels, _)| labels.contains("source=\"redis\""))
            .map(|(_, n)| *n)
            .sum::<f64>()
    };
    let before = from_redis(sources().await?);
    check(&batch().await?)?;
    assert_eq!(from_redis(sources().await?) - before, 89.0);
    Ok(())
}

#[tokio::test]
async fn keys_and_prefixes_are_warmed_on_request() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    world
        .sql(
            "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
             select prefix || n, n, n % 100 = 0, now(), 'application/json', '', convert_to(n::text, 'UTF8')
             from generate_series(1, 5000) n, unnest(array['a:', 'b:']) prefix",
        )
        .await?;
    let ask = async |body: &str| {
        api.send(Method::POST, "/v1/rehydrate", Some(body.to_owned()))
            .await
    };
    let warm = async |what: &str, n: u64| {
        eventually(what, async || {
            Ok((keys_in_redis(&world).await? >= n).then_some(()))
        })
        .await
    };
    // Nobody works on it yet: it waits in the queue.
    let keys = ask(r#"{"keys":["b:1","b:2","b:100","never"]}"#)
        .await?
        .expect(StatusCode::ACCEPTED)?;
    assert_eq!(keys.body, r#"{"requested":4}"#);
    let worker = world.worker().await?;
    // Leases count as keys, too.
    eventually(
        "the keys are warm, those without a value included",
        async || {
            let found = [world.in_redis("b:1").await?, world.in_redis("never").await?];
            let is = |place: usize, kind| {
                let value: &Option<String> = &found[place];
                value.as_ref().is_some_and(|value| value.starts_with(kind))
            };
            Ok((is(0, 'E') && is(1, 'N')).then_some(()))
        },
    )
    .await?;
    let prefix = ask(r#"{"prefix":"a:"}"#)
        .await?
        .expect(StatusCode::ACCEPTED)?
        .json()?;
    assert_eq!(
        (&prefix["requested"], &prefix["more"]),
        (&4950.into(), &false.into())
    );
    // Somebody else goes on where this one was killed.
    warm("a few pages", 500).await?;
    worker.kill().await?;
    let _worker = world.worker().await?;
    // The page that was in hand comes again half a minute later.
    eventually_within(3 * PATIENCE, "the whole prefix is warm", async || {
        Ok((keys_in_redis(&world).await? >= 4950).then_some(()))
    })
    .await?;
    eventually("the last page is warm", async || {
        let value = world.in_redis("a:999").await?;
        Ok(value.filter(|value| value.starts_with('E')).map(drop))
    })
    .await?;
    assert_eq!(world.in_redis("b:3").await?, None, "nobody asked for it");
    for (body, field) in [
        ("{}", None),
        (r#"{"keys":["a"],"prefix":"a"}"#, Some("prefix")),
        (r#"{"keys":[""]}"#, Some("keys[0]")),
        (r#"{"prefix":1}"#, Some("prefix")),
        (r#"{"prefix":"\u0001"}"#, Some("prefix")),
    ] {
        let refused = ask(body).await?.expect(StatusCode::BAD_REQUEST)?;
        assert_eq!(refused.json()?["field"].as_str(), field, "{body}");
    }
    Ok(())
}

/// What its key has cannot be known until it is written again.
#[tokio::test]
async fn a_letter_that_is_gone_keeps_no_other_key_of_its_prefix_from_redis() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let worker = world.eager_worker().await?;
    let neighbours = ["poison a", "poison c"];
    for key in neighbours {
        let version = api.write(key, "1").await?;
        world.stored(key, version).await?;
    }
    world.sql(REFUSE).await?;
    api.write("poison b", "1").await?;
    let sequence = eventually("it is dead", async || {
        let rows = world.sql("select dlq_seq from dead_keys").await?;
        Ok(rows.trim().parse::<u64>().ok())
    })
    .await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    let jetstream = world.jetstream().await?;
    let name = &world.env.vars["NATS_DLQ_STREAM_NAME"];
    let letters = jetstream.get_stream(name).await?;
    assert!(letters.delete_message(sequence).await?);
    world.flush_redis().await?;
    let body = r#"{"prefix":"poison"}"#.to_owned();
    api.send(Method::POST, "/v1/rehydrate", Some(body))
        .await?
        .expect(StatusCode::ACCEPTED)?;
    is_told(&worker, "warmed Redis with a prefix").await?;
    for key in neighbours {
        let value = world.in_redis(key).await?;
        assert!(value.is_some_and(|value| value.starts_with('E')), "{key}");
    }
    is_told(&worker, &format!("dead letter {sequence} is gone")).await?;
    // Nothing is called known of the key itself.
    assert_eq!(world.in_redis("poison b").await?, None);
    api.get("poison b").await?.refused("UNAVAILABLE")
}

/// A NATS that lost its disk has no queue: it is made anew by whoever needs it, a worker or an API.
#[tokio::test]
async fn a_queue_that_is_gone_is_made_anew() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut worker = None;
    let jetstream = world.jetstream().await?;
    for key in ["by-the-api", "by-the-worker"] {
        let version = api.write(key, "1").await?;
        jetstream
            .delete_stream(&world.env.vars["NATS_REHYDRATE_STREAM_NAME"])
            .await?;
        let ask = async || {
            let body = serde_json::json!({ "keys": [key] }).to_string();
            api.send(Method::POST, "/v1/rehydrate", Some(body)).await
        };
        let log = match &worker {
            // Nobody else is there.
            None => {
                ask().await?.refused("UNAVAILABLE")?;
                worker = Some(world.worker().await?);
                api.process.log()?
            }
            Some(worker) => {
                eventually("the worker makes it", async || {
                    let log = worker.log()?;
                    Ok(log.contains(MADE_ANEW).then_some(log))
                })
                .await?
            }
        };
        ensure!(log.contains(MADE_ANEW), "{log}");
        world.stored(key, version).await?;
        // Who tells Redis late breaks the lookup that warms it.
        world.redis_is_told().await?;
        redis::cmd("DEL")
            .arg(format!("birb:e:{key}"))
            .exec_async(&mut world.redis().await?)
            .await?;
        ask().await?.expect(StatusCode::ACCEPTED)?;
        eventually("it is warm", async || {
            let value = world.in_redis(key).await?;
            Ok(value.filter(|value| value.starts_with('E')).map(drop))
        })
        .await?;
    }
    Ok(())
}
