//! A write that PostgreSQL refuses for good holds up nobody and is not lost; a PostgreSQL that is broken loses nothing.

use std::sync::Arc;

use anyhow::Result;
use async_nats::{HeaderValue, jetstream::stream::Stream};
use birb_nest_stack::{Process, Role};
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::StatusCode;

use crate::{
    shown::{is_counted, is_told, metric},
    world::{Api, World, eventually},
};

pub const REFUSE: &str = "create function refuse() returns trigger language plpgsql as
    $$ begin if new.key like 'poison%' then raise exception 'no % here', new.key; end if; return new; end $$;
    create trigger refuse before insert or update on cache_entries for each row execute function refuse()";

async fn worker(world: &World<'_>) -> Result<(Process, String)> {
    let mut env = world.env.replica()?;
    env.set("WORKER_DEAD_LETTER_RETRY", "100ms")
        .set("LOG_TRIM_LAG", "1ms")
        .set("LOG_TRIM_INTERVAL", "20ms");
    Ok((env.start(Role::Worker).await?, env.worker_url()))
}

async fn write_all(api: &Arc<Api>, keys: impl Iterator<Item = String>) -> Result<()> {
    stream::iter(keys)
        .map(|key| {
            let api = api.clone();
            async move { api.write(&key, "1").await }
        })
        .buffer_unordered(32)
        .try_for_each(async |_| Ok(()))
        .await
}

async fn n_rows(world: &World<'_>) -> Result<u64> {
    Ok(world
        .sql("select count(*) from cache_entries")
        .await?
        .trim()
        .parse()?)
}

async fn dead_keys(world: &World<'_>) -> Result<String> {
    world.sql("select key, attempts, sqlstate, reason, next_try_at is null from dead_keys order by key").await
}

async fn letters(world: &World<'_>) -> Result<Stream> {
    let jetstream = world.jetstream().await?;
    let name = &world.env.vars["NATS_DLQ_STREAM_NAME"];
    Ok(jetstream.get_stream(name).await?)
}

/// How many dead letters there ever were: one that was stored meanwhile counts, too.
pub async fn n_ever_dead(world: &World<'_>) -> Result<u64> {
    Ok(letters(world).await?.cached_info().state.last_sequence)
}

async fn trimmed(world: &World<'_>) -> Result<()> {
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_poison_entry_becomes_a_dead_key_and_its_499_neighbours_are_stored() -> Result<()> {
    // All of it in one batch.
    let world =
        World::shared_with(&[("NATS_SHARDS", "1"), ("WORKER_BATCH_TIMEOUT", "10s")]).await?;
    world.sql(REFUSE).await?;
    // A sequence counts what is rolled back, too.
    world
        .sql(
            "create sequence n_tries;
             create function count_tries() returns trigger language plpgsql as
                 $$ begin perform nextval('n_tries'); return null; end $$;
             create trigger count_tries before insert on cache_entries for each statement execute function count_tries()",
        )
        .await?;
    let api = Arc::new(world.api().await?);
    write_all(&api, (0..250).map(|n| format!("k{n}"))).await?;
    let version = api.write("poison", "\"bad\"").await?;
    write_all(&api, (250..499).map(|n| format!("k{n}"))).await?;
    let (worker, url) = worker(&world).await?;
    eventually("the neighbours are stored", async || {
        Ok((n_rows(&world).await? == 499).then_some(()))
    })
    .await?;
    eventually("the poison is parked after its retries", async || {
        Ok(
            (dead_keys(&world).await?.trim() == "poison|4|P0001|no poison here (SQLSTATE P0001)|t")
                .then_some(()),
        )
    })
    .await?;
    trimmed(&world).await?;
    let batches = metric(&url, "birbnest_worker_batch_messages_count").await?;
    assert_eq!(batches.values().sum::<f64>(), 1.0, "{batches:?}");
    // The batch, twice; halved nine times at most, both halves each time; what is refused once more; and the retries.
    let n_tries: u64 = world
        .sql("select last_value from n_tries")
        .await?
        .trim()
        .parse()?;
    assert!((10..=2 + 2 * 9 + 1 + 3).contains(&n_tries), "{n_tries}");
    // Its message says why, to whoever reads the stream.
    let sequence = world.sql("select dlq_seq from dead_keys").await?;
    let message = letters(&world)
        .await?
        .get_raw_message(sequence.trim().parse()?)
        .await?;
    for (name, said) in [
        ("Birb-Key", "poison"),
        ("Birb-Version", version.to_string().as_str()),
        ("Birb-Sqlstate", "P0001"),
        ("Birb-Reason", "no poison here (SQLSTATE P0001)"),
    ] {
        let found = message.headers.get(name).map(HeaderValue::as_str);
        assert_eq!(found, Some(said), "{name}");
    }
    // It is the state of its key, for every reader.
    for _ in 0..2 {
        let read = api.get("poison").await?.expect(StatusCode::OK)?;
        assert_eq!(read.version()?, version);
        assert_eq!(read.json()?["value"], "bad");
        world.flush_redis().await?;
    }
    // It counts a moment after its row says so.
    eventually("one is parked", async || {
        let parked = metric(&url, "birbnest_dead_letters_parked").await?;
        Ok((parked.values().sum::<f64>() == 1.0).then_some(()))
    })
    .await?;
    let log = worker.log()?;
    for (line, n) in [
        ("PostgreSQL refuses a batch: halving it", 1),
        (
            "PostgreSQL refuses a write for good: it is a dead letter now",
            1,
        ),
        ("a dead letter is refused again", 3),
        ("parked=true", 1),
    ] {
        assert_eq!(log.matches(line).count(), n, "`{line}` in {log}");
    }
    is_counted(&url, "birbnest_worker_batches_halved_total", "").await?;
    is_counted(&url, "birbnest_dead_letters_total", "").await?;

    // The cause goes, and somebody has it tried again.
    world.sql("drop trigger refuse on cache_entries").await?;
    world
        .sql("update dead_keys set next_try_at = clock_timestamp()")
        .await?;
    world.stored("poison", version).await?;
    eventually("no key is dead", async || {
        Ok(dead_keys(&world).await?.trim().is_empty().then_some(()))
    })
    .await?;
    assert_eq!(
        api.get("poison").await?.expect(StatusCode::OK)?.version()?,
        version
    );
    Ok(())
}

/// Everything is refused, and PostgreSQL is mended when one write of the batch was found to be refused for good.
#[tokio::test]
async fn what_is_refused_until_postgresql_is_mended_is_no_dead_letter() -> Result<()> {
    let world = World::shared_with(&[
        ("NATS_SHARDS", "1"),
        ("WORKER_BATCH_SIZE", "64"),
        ("WORKER_BATCH_TIMEOUT", "10s"),
    ])
    .await?;
    // The batch twice, and its halves down to one write.
    world
        .sql(
            "create sequence n_tries;
             create function refuse() returns trigger language plpgsql as
                 $$ begin if nextval('n_tries') <= 8 then raise exception 'not yet'; end if; return null; end $$;
             create trigger refuse before insert on cache_entries for each statement execute function refuse()",
        )
        .await?;
    let api = Arc::new(world.api().await?);
    write_all(&api, (0..64).map(|n| format!("k{n}"))).await?;
    let _worker = worker(&world).await?;
    eventually("all is stored", async || {
        Ok((n_rows(&world).await? == 64).then_some(()))
    })
    .await?;
    trimmed(&world).await?;
    assert_eq!(n_ever_dead(&world).await?, 0);
    Ok(())
}

/// However many there are, as long as what is between them is stored: they are to blame, not PostgreSQL.
#[tokio::test]
async fn many_poison_entries_among_others_stop_nobody() -> Result<()> {
    let world =
        World::shared_with(&[("NATS_SHARDS", "1"), ("WORKER_BATCH_TIMEOUT", "10s")]).await?;
    // Batches are in the order of their keys.
    world.sql(&REFUSE.replace("'poison%'", "'%poison'")).await?;
    let api = Arc::new(world.api().await?);
    for n in 0..20 {
        api.write(&format!("k{n}-poison"), "\"bad\"").await?;
        write_all(&api, (0..24).map(|k| format!("k{n}-{k}"))).await?;
    }
    let (_worker, _) = worker(&world).await?;
    eventually("the others are stored, and these are dead", async || {
        let n_dead = dead_keys(&world).await?.trim().lines().count();
        Ok((n_rows(&world).await? == 480 && n_dead == 20).then_some(()))
    })
    .await?;
    trimmed(&world).await
}

#[tokio::test]
async fn a_dead_letter_is_retried_by_itself_and_a_newer_write_ends_it() -> Result<()> {
    let world = World::shared().await?;
    world.sql(REFUSE).await?;
    let api = Arc::new(world.api().await?);
    let mut env = world.env.replica()?;
    env.set("WORKER_DEAD_LETTER_RETRY", "1s")
        // However long it takes until the cause is gone.
        .set("NATS_DLQ_MAX_RETRIES", "1000");
    let worker = env.start(Role::Worker).await?;
    let first = api.write("poison-1", "1").await?;
    api.write("poison-2", "\"old\"").await?;
    eventually("both are dead", async || {
        Ok((dead_keys(&world).await?.lines().count() == 2).then_some(()))
    })
    .await?;
    let waiting = "birbnest_dead_letters_waiting";
    is_counted(&env.worker_url(), waiting, "").await?;
    // Dead letters are deleted like any entry.
    api.delete("poison-2")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    world.flush_redis().await?;
    api.get("poison-2").await?.expect(StatusCode::NOT_FOUND)?;
    world.sql("drop trigger refuse on cache_entries").await?;
    let second = api.write("poison-2", "\"new\"").await?;
    world.stored("poison-1", first).await?;
    world.stored("poison-2", second).await?;
    is_told(&worker, "a dead letter is stored").await?;
    eventually("no key is dead", async || {
        Ok(dead_keys(&world).await?.trim().is_empty().then_some(()))
    })
    .await?;
    assert_eq!(api.read("poison-2").await?.as_deref(), Some("\"new\""));
    assert_eq!(
        world.row("poison-2").await?,
        Some((second, false, "\"new\"".to_owned()))
    );
    Ok(())
}

/// Headers of NATS lose white space at their ends.
#[tokio::test]
async fn a_letter_whose_key_begins_and_ends_with_white_space_leaves_its_stream_when_it_is_stored()
-> Result<()> {
    let world = World::shared().await?;
    world
        .sql(&REFUSE.replace("'poison%'", "'%poison%'"))
        .await?;
    let api = world.api().await?;
    let _worker = worker(&world).await?;
    let keys = [" poison", "poison ", "\u{a0}poison\u{3000}"];
    let mut versions = Vec::new();
    for key in keys {
        versions.push((key, api.write(key, "1").await?));
    }
    let n_letters = async || {
        let stream = letters(&world).await?;
        Ok::<_, anyhow::Error>(stream.cached_info().state.messages)
    };
    eventually("all are dead", async || {
        let n_dead = dead_keys(&world).await?.trim().lines().count();
        Ok((n_dead == keys.len()).then_some(()))
    })
    .await?;
    assert_eq!(n_letters().await?, keys.len() as u64);
    world.sql("drop trigger refuse on cache_entries").await?;
    world
        .sql("update dead_keys set next_try_at = clock_timestamp()")
        .await?;
    for (key, version) in versions {
        world.stored(key, version).await?;
    }
    eventually("no letter is left", async || {
        Ok((n_letters().await? == 0).then_some(()))
    })
    .await
}

/// A shard that needs room there waits, and loses nothing; what docs/OPERATIONS.md says makes room.
#[tokio::test]
async fn a_full_dead_letter_stream_holds_its_shard_up_and_drops_nothing() -> Result<()> {
    let mut world = World::not_set_up(birb_nest_stack::shared().await?).await?;
    world
        .env
        .set("NATS_SHARDS", "1")
        .set("NATS_DLQ_MAX_BYTES", "64KiB");
    world.env.setup().await?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    let (worker, _) = worker(&world).await?;
    let n_dead = async || Ok::<_, anyhow::Error>(dead_keys(&world).await?.trim().lines().count());
    let value = format!("\"{}\"", "x".repeat(25_000));
    let mut poisons = Vec::new();
    for n in 0..3 {
        poisons.push(api.write(&format!("poison-{n}"), &value).await?);
        if n < 2 {
            eventually("it is dead", async || {
                Ok((n_dead().await? == n + 1).then_some(()))
            })
            .await?;
        }
    }
    let good = api.write("good", "1").await?;
    eventually(
        "the worker says why it waits, again and again",
        async || {
            let n = worker.log()?.matches("a dead letter was not taken").count();
            Ok((n >= 2).then_some(()))
        },
    )
    .await?;
    assert_eq!(n_dead().await?, 2);
    let applied_to = world.sql("select applied_to from shard_state").await?;
    assert!(
        applied_to.trim().parse::<u64>()? < poisons[2],
        "{applied_to}"
    );
    let all_are_read = async || {
        world.flush_redis().await?;
        for (n, version) in poisons.iter().enumerate() {
            let read = api.get(&format!("poison-{n}")).await?;
            assert_eq!(read.expect(StatusCode::OK)?.version()?, *version);
        }
        assert_eq!(api.read("good").await?.as_deref(), Some("1"));
        Ok::<_, anyhow::Error>(())
    };
    all_are_read().await?;

    let mut roomier = world.env.clone();
    roomier.set("NATS_DLQ_MAX_BYTES", "1MiB").setup().await?;
    world.stored("good", good).await?;
    eventually("the third one is dead", async || {
        Ok((n_dead().await? == 3).then_some(()))
    })
    .await?;
    trimmed(&world).await?;
    all_are_read().await?;
    world.sql("drop trigger refuse on cache_entries").await?;
    world
        .sql("update dead_keys set next_try_at = clock_timestamp()")
        .await?;
    for (n, version) in poisons.iter().enumerate() {
        world.stored(&format!("poison-{n}"), *version).await?;
    }
    Ok(())
}

/// What breaks PostgreSQL as a whole, and what mends it.
const SYSTEMIC: &[(&str, &str, &str)] = &[
    (
        "every write is refused by a trigger",
        "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'all'; end $$;
         create trigger refuse before insert or update on cache_entries for each row execute function refuse()",
        "drop trigger refuse on cache_entries",
    ),
    (
        "the table is missing",
        "alter table cache_entries rename to elsewhere",
        "alter table elsewhere rename to cache_entries",
    ),
    (
        "a column is missing",
        "alter table cache_entries rename column metadata to elsewhere",
        "alter table cache_entries rename column elsewhere to metadata",
    ),
    (
        "the disk is full, says a trigger",
        "create or replace function full_disk() returns trigger language plpgsql as
         $$ begin raise exception 'disk full' using errcode = '53100'; end $$;
         create trigger full_disk before insert or update on cache_entries for each row execute function full_disk()",
        "drop trigger full_disk on cache_entries",
    ),
    (
        "transactions are read only",
        "do $$ begin execute format('alter database %I set default_transaction_read_only = on', current_database()); end $$;
         select pg_terminate_backend(pid) from pg_stat_activity
         where datname = current_database() and pid <> pg_backend_pid()",
        "set transaction read write;
         do $$ begin execute format('alter database %I reset default_transaction_read_only', current_database()); end $$",
    ),
];

#[tokio::test]
async fn a_broken_postgresql_dead_letters_nothing_and_loses_nothing() -> Result<()> {
    for (what, broken, mended) in SYSTEMIC {
        let mut world = World::shared().await?;
        // As few batches as can be: a few writes that are refused alike are taken for what is wrong.
        world.env.set("WORKER_BATCH_TIMEOUT", "1s");
        let api = Arc::new(world.api().await?);
        world.sql(broken).await?;
        // All of it is there before anybody stores: each shard has more than a few.
        write_all(&api, (0..400).map(|n| format!("k{n}"))).await?;
        let (worker, url) = worker(&world).await.map_err(|error| error.context(*what))?;
        eventually(what, async || {
            let errors = metric(&url, "birbnest_errors_total").await?;
            let refused = errors
                .iter()
                .filter(|(labels, _)| labels.contains("postgres_apply"))
                .map(|(_, n)| n)
                .sum::<f64>();
            Ok((refused >= 3.0).then_some(()))
        })
        .await?;
        for n in [0, 200, 399] {
            assert_eq!(
                api.read(&format!("k{n}")).await?.as_deref(),
                Some("1"),
                "{what}"
            );
        }
        if what.ends_with("is missing") {
            // Nobody can say that it has no value.
            api.get("never").await?.refused("UNAVAILABLE")?;
        }
        world.sql(mended).await?;
        if what.contains("read only") {
            // The sessions have the setting they began with.
            world
                .sql("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
                .await?;
        }
        eventually(what, async || {
            Ok((n_rows(&world).await? == 400).then_some(()))
        })
        .await?;
        assert_eq!(dead_keys(&world).await?.trim(), "", "{what}");
        assert_eq!(n_ever_dead(&world).await?, 0, "{what}");
        drop(worker);
    }
    Ok(())
}
