//! PostgreSQL is restored from a dump, by the very commands of docs/OPERATIONS.md.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::nest_binary;
use reqwest::{Method, StatusCode};
use tokio::process::Command;

use crate::{
    dead_letters::REFUSE,
    shown::is_shown,
    world::{Api, World, breakable, eventually},
};

const OPERATIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/OPERATIONS.md");

/// The commands of the section, in their order: the dump, the restore, and what follows before workers start.
fn runbook() -> Result<[String; 3]> {
    let text = std::fs::read_to_string(OPERATIONS)?;
    let (_, section) = text
        .split_once("\n## Restoring PostgreSQL\n")
        .context("no section about restoring")?;
    let section = section.split("\n## ").next().unwrap_or(section);
    let blocks: Vec<String> = section
        .split("```sh\n")
        .skip(1)
        .filter_map(|block| Some(block.split_once("```")?.0.to_owned()))
        .collect();
    blocks
        .try_into()
        .map_err(|blocks| anyhow::anyhow!("not three blocks of commands: {blocks:?}"))
}

/// Runs commands in `dir` as somebody would who operates this nest, and returns what they say.
async fn run(world: &World<'_>, dir: &Path, commands: &str) -> Result<String> {
    let binary = nest_binary()?;
    let of_binary = binary.parent().context("a file is in a directory")?;
    let path = std::env::var("PATH")?;
    let vars = &world.env.vars;
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", commands])
        .current_dir(dir)
        .env_clear()
        .envs(vars)
        .env("PATH", format!("{}:{path}", of_binary.display()))
        .env("PGHOST", &vars["POSTGRES_HOST"])
        .env("PGPORT", &vars["POSTGRES_PORT"])
        .env("PGUSER", &vars["POSTGRES_USER"])
        .env("PGPASSWORD", &vars["POSTGRES_PASSWORD"])
        .env("PGDATABASE", &vars["POSTGRES_DB"])
        .kill_on_drop(true)
        .output()
        .await?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{commands}\n{said}");
    Ok(said)
}

/// What was acknowledged: each key's newest version.
#[derive(Default)]
struct Written(BTreeMap<String, u64>);

impl Written {
    async fn write(&mut self, api: &Api, key: String, value: &str) -> Result<()> {
        let version = api.write(&key, &format!("\"{value}\"")).await?;
        let older = self.0.insert(key.clone(), version);
        ensure!(
            older < Some(version),
            "{key} went from {older:?} to {version}"
        );
        Ok(())
    }
}

/// Begins another life of every shard, as after a lost tail.
async fn begin_another_life(world: &World<'_>) -> Result<()> {
    let bases = async || {
        world
            .sql("select base from shard_state order by shard")
            .await
    };
    let before = bases().await?;
    world.fence_all().await?;
    eventually("every shard lives again", async || {
        let now = bases().await?;
        Ok(now
            .lines()
            .zip(before.lines())
            .all(|(now, before)| now != before)
            .then_some(()))
    })
    .await
}

/// Dead letters by key: id and reason.
async fn letters(api: &Api) -> Result<BTreeMap<String, (String, String)>> {
    let answer = api.send(Method::GET, "/v1/dead-letters", None).await?;
    let listing = answer.expect(StatusCode::OK)?.json()?;
    let text = |letter: &serde_json::Value, member: &str| {
        letter[member].as_str().unwrap_or_default().to_owned()
    };
    Ok(listing["dead_letters"]
        .as_array()
        .context("a list")?
        .iter()
        .map(|letter| {
            (
                text(letter, "key"),
                (text(letter, "id"), text(letter, "reason")),
            )
        })
        .collect())
}

async fn replay(api: &Api, id: &str) -> Result<()> {
    let path = format!("/v1/dead-letters/{id}/replay");
    api.send(Method::POST, &path, None)
        .await?
        .expect(StatusCode::ACCEPTED)
        .map(drop)
}

/// Waits until the API has all servers.
async fn healthy(api: &Api) -> Result<()> {
    eventually("all servers are there", async || {
        let health = api.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["status"] == "healthy").then_some(()))
    })
    .await
}

/// Waits until PostgreSQL has everything, and nothing is left in the log.
async fn drained(world: &World<'_>, written: &Written) -> Result<()> {
    let written = written.0.iter();
    world
        .all_stored(written.filter(|(key, _)| !key.starts_with("poison")))
        .await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await
}

/// Reads say `expected` of every key, whether they may believe Redis or not.
async fn reads_agree(api: &Api, expected: &BTreeMap<String, Option<&str>>) -> Result<()> {
    for (key, value) in expected {
        for control in ["max-age=0", "no-cache"] {
            let answer = api
                .ask(Method::GET, key, &[("cache-control", control)])
                .await?;
            let status = if value.is_some() {
                StatusCode::OK
            } else {
                StatusCode::NOT_FOUND
            };
            let answer = answer
                .expect(status)
                .with_context(|| format!("{key}, {control}"))?;
            if let Some(value) = value {
                let read = answer.json()?["value"].clone();
                ensure!(
                    read == **value,
                    "{key}, {control}: {value} was expected, not {read}"
                );
            }
        }
    }
    Ok(())
}

/// PostgreSQL knows an earlier life than the log: what cannot be judged is 503, and nothing of the log is stored.
async fn nobody_goes_on_before_setup(world: &World<'_>, api: &Api) -> Result<()> {
    healthy(api).await?;
    let fresh = [("cache-control", "no-cache")];
    let lost = api.ask(Method::GET, "lost3", &fresh).await?;
    lost.refused("UNAVAILABLE")?;
    let rows = async || {
        world
            .sql("select max(version), count(*) from cache_entries")
            .await
    };
    let before = rows().await?;
    let worker = world.eager_worker().await?;
    eventually("the worker says what to do", async || {
        let log = worker.log()?;
        let told =
            (0..8).all(|shard| log.contains(&format!("PostgresWentBack: shard {shard} lives")));
        Ok(told.then_some(()))
    })
    .await?;
    worker.kill().await?;
    ensure!(rows().await? == before, "it stored something");
    Ok(())
}

async fn restore(in_another_life: bool) -> Result<()> {
    let mut world = World::shared().await?;
    world.env.set("NATS_DLQ_MAX_RETRIES", "0");
    let [dump, restore, compare] = runbook()?;
    let dir = world.env.make_dir()?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    let worker = world.eager_worker().await?;
    let mut written = Written::default();
    for n in 0..30 {
        written.write(&api, format!("k{n}"), "dumped").await?;
    }
    for key in ["poison kept", "poison stored"] {
        written.write(&api, key.to_owned(), "refused").await?;
    }
    eventually("two letters are parked", async || {
        Ok((letters(&api).await?.len() == 2).then_some(()))
    })
    .await?;
    drained(&world, &written).await?;
    run(&world, &dir, &dump).await?;

    // After the dump, and beyond what the log keeps.
    for key in (0..10)
        .map(|n| format!("k{n}"))
        .chain((0..10).map(|n| format!("lost{n}")))
    {
        written.write(&api, key, "lost").await?;
    }
    api.delete("k10").await?.expect(StatusCode::NO_CONTENT)?;
    world
        .sql("alter table cache_entries disable trigger refuse")
        .await?;
    replay(&api, &letters(&api).await?["poison stored"].0).await?;
    world
        .stored("poison stored", written.0["poison stored"])
        .await?;
    if in_another_life {
        begin_another_life(&world).await?;
        // This takes a while to come round to an API; the others are clean refusals.
        eventually("writes are taken again", async || {
            let answer = api.post("k0", "{\"value\":\"lost\"}").await?;
            Ok((answer.status == StatusCode::CREATED).then_some(()))
        })
        .await?;
    }
    drained(&world, &written).await?;
    worker.terminate(crate::world::PATIENCE).await?;
    let late = |n| {
        if n < 10 {
            format!("k{}", n + 20)
        } else {
            format!("late{n}")
        }
    };
    for n in 0..20 {
        let key = late(n);
        eventually("it is written", async || {
            let answer = api.post(&key, "{\"value\":\"late\"}").await?;
            if answer.status != StatusCode::CREATED {
                return Ok(None);
            }
            answer.version().map(Some)
        })
        .await
        .map(|version| written.0.insert(key.clone(), version))?;
    }

    run(&world, &dir, &restore).await?;
    written.write(&api, "during".to_owned(), "late").await?;
    if in_another_life {
        nobody_goes_on_before_setup(&world, &api).await?;
    }
    let said = run(&world, &dir, &compare).await?;
    ensure!(
        said.contains("PostgresWentBack") == in_another_life,
        "{said}"
    );
    let _worker = world.eager_worker().await?;
    let kept = |key: &String| key.starts_with("late") || key == "during";
    let in_the_log = written.0.iter().filter(|(key, _)| kept(key));
    world.all_stored(in_the_log).await?;

    healthy(&api).await?;
    let mut expected: BTreeMap<String, Option<&str>> = BTreeMap::new();
    for n in 0..30 {
        expected.insert(
            format!("k{n}"),
            Some(if n < 20 { "dumped" } else { "late" }),
        );
    }
    expected.extend((0..10).map(|n| (format!("lost{n}"), None)));
    expected.extend((10..20).map(|n| (late(n), Some("late"))));
    expected.insert("during".to_owned(), Some("late"));
    expected.insert("poison kept".to_owned(), Some("refused"));
    reads_agree(&api, &expected).await?;

    // The letter that the dump has, and that was stored since: its value is lost, and nothing older shows instead.
    let dead = letters(&api).await?;
    ensure!(dead.len() == 2, "{dead:?}");
    api.get("poison stored").await?.refused("UNAVAILABLE")?;
    replay(&api, &dead["poison stored"].0).await?;
    eventually("it is known to be gone", async || {
        let dead = letters(&api).await?;
        let (_, reason) = dead.get("poison stored").context("it is still there")?;
        Ok(reason.contains("its message is gone").then_some(()))
    })
    .await?;
    world.sql("drop trigger refuse on cache_entries").await?;
    api.delete("poison stored")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    replay(&api, &dead["poison kept"].0).await?;
    eventually("no letter is left", async || {
        Ok(letters(&api).await?.is_empty().then_some(()))
    })
    .await?;
    expected.insert("poison stored".to_owned(), None);
    reads_agree(&api, &expected).await?;

    // Whoever knew a lost version is refused, and every version is greater than all that there were.
    let lost = written.0["k0"].to_string();
    api.post_if("k0", &[("if-match", &format!("\"{lost}\""))], "1")
        .await?
        .expect(StatusCode::PRECONDITION_FAILED)?;
    for key in written.0.keys().cloned().collect::<Vec<_>>() {
        written.write(&api, key, "again").await?;
    }
    world.all_stored(written.0.iter()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_is_restored_as_the_runbook_says() -> Result<()> {
    restore(false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dump_of_an_earlier_life_is_restored_as_the_runbook_says() -> Result<()> {
    restore(true).await
}

/// One shard, whose log is empty, and ends behind what PostgreSQL says to have stored since it was put back.
async fn put_back_over_an_empty_log() -> Result<World<'static>> {
    let eager = [
        ("NATS_SHARDS", "1"),
        ("LOG_TRIM_LAG", "1ms"),
        ("LOG_TRIM_INTERVAL", "20ms"),
        ("API_DURABILITY_TIMEOUT", "2s"),
    ];
    let world = World::shared_with(&eager).await?;
    let api = world.api().await?;
    let worker = world.worker().await?;
    let mut written = Written::default();
    for n in 0..5 {
        written.write(&api, format!("k{n}"), "kept").await?;
    }
    drained(&world, &written).await?;
    worker.terminate(crate::world::PATIENCE).await?;
    api.process.terminate(crate::world::PATIENCE).await?;
    world
        .sql("update shard_state set applied_to = base, told_to = base")
        .await?;
    Ok(world)
}

/// What is not in the log any more is stored or lost: nobody waits for it.
#[tokio::test]
async fn keys_are_deleted_by_prefix_though_postgresql_went_back_over_an_empty_log() -> Result<()> {
    let world = put_back_over_an_empty_log().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let delete = async || {
        let swept = api.send(Method::DELETE, "/v1/cache?prefix=k", None).await?;
        swept.expect(StatusCode::OK)?.json()
    };
    ensure!(delete().await?["deleted"] == 5);
    // The log goes on behind what is lost: these are waited for.
    api.write("k again", "1").await?;
    ensure!(delete().await?["deleted"] == 1);
    Ok(())
}

#[tokio::test]
async fn an_empty_log_has_no_lag_though_postgresql_went_back() -> Result<()> {
    let world = put_back_over_an_empty_log().await?;
    let _worker = world.worker().await?;
    is_shown(&world.env.worker_url(), "birbnest_log_lag", "", 0.0).await
}

/// Nobody follows a runbook: the server comes back with less than it had, and a worker that knows it is there.
#[tokio::test]
async fn a_worker_that_knew_more_empties_redis_when_postgresql_went_back() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let worker = world.eager_worker().await?;
    let mut written = Written::default();
    written.write(&api, "k".to_owned(), "old").await?;
    drained(&world, &written).await?;
    stack.postgres.stop().await?;
    let copy = stack.postgres.snapshot().await?;
    stack.postgres.start().await?;
    healthy(&api).await?;
    written.write(&api, "k".to_owned(), "lost").await?;
    drained(&world, &written).await?;
    assert_eq!(api.read("k").await?.as_deref(), Some("\"lost\""));
    stack.postgres.kill().await?;
    stack.postgres.restore(&copy).await?;
    stack.postgres.start().await?;
    eventually("Redis holds nothing that PostgreSQL lost", async || {
        // Once Redis is empty, and until this API has found PostgreSQL again, it is 503.
        let read = api.get("k").await?;
        Ok((read.status == StatusCode::OK && read.json()?["value"] == "old").then_some(()))
    })
    .await?;
    assert!(worker.log()?.contains("PostgresWentBack"), "nobody said so");
    Ok(())
}
