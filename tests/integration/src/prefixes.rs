//! All keys that begin alike: listing and deleting them, page by page.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::{
    dead_letters::REFUSE,
    world::{self, Api, PATIENCE, World, breakable, eventually},
};

async fn ask(api: &Api, method: Method, query: &str) -> Result<Value> {
    api.send(method, &format!("/v1/cache?{query}"), None)
        .await?
        .expect(StatusCode::OK)?
        .json()
}

/// Writes keys and waits until they are stored.
async fn write_all(world: &World<'_>, api: &Api, keys: &[String]) -> Result<()> {
    let mut versions = Vec::new();
    for key in keys {
        versions.push(api.write(key, "1").await?);
    }
    world.all_stored(keys.iter().zip(&versions)).await
}

/// All pages; `between` is done after each.
async fn pages(
    api: &Api,
    method: Method,
    query: &str,
    mut between: impl AsyncFnMut() -> Result<()>,
) -> Result<Vec<Value>> {
    let (mut pages, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = ask(api, method.clone(), &format!("{query}{cursor}")).await?;
        let next = page["cursor"]
            .as_str()
            .map(|next| format!("&cursor={next}"));
        pages.push(page);
        let Some(next) = next else { return Ok(pages) };
        cursor = next;
        between().await?;
    }
}

fn names(pages: &[Value]) -> Vec<String> {
    pages
        .iter()
        .flat_map(|page| page["keys"].as_array().unwrap())
        .map(|listed| listed["key"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn a_listing_has_every_living_key_once_in_the_order_of_bytes() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let mut keys: Vec<String> = (0..57).map(|n| format!("list:{n}")).collect();
    keys.extend(["list:ä", "list:🐦", "list:Z", "list:a b%"].map(str::to_owned));
    let others = ["lisu", "list", "LIST:1"].map(str::to_owned);
    write_all(&world, &api, &[&keys[..], &others].concat()).await?;
    let gone = api.delete("list:3").await?.expect(StatusCode::NO_CONTENT)?;
    assert_eq!(gone.body, "");
    api.post("list:4", r#"{"value":1,"ttl":1}"#).await?;
    let lives = api
        .post("list:5", r#"{"value":"12345678","ttl":600}"#)
        .await?
        .version()?;
    world.stored("list:5", lives).await?;
    eventually(
        "the deleted and the expired key are gone from the listing",
        async || {
            let names = names(
                &pages(
                    &api,
                    Method::GET,
                    "prefix=list:&limit=1000",
                    async || Ok(()),
                )
                .await?,
            );
            let gone = |key: &str| !names.iter().any(|name| name == key);
            Ok((gone("list:3") && gone("list:4")).then_some(()))
        },
    )
    .await?;
    let mut round = 0;
    let pages = pages(&api, Method::GET, "prefix=list:&limit=7", async || {
        // What is written meanwhile moves nothing that is listed.
        round += 1;
        api.write(&format!("list:0new{round}"), "1").await?;
        api.write("list:9", "2").await?;
        Ok(())
    })
    .await?;
    assert!(pages.len() > 8);
    assert!(pages.iter().all(|page| page["persisted_only"] == true));
    let listed = names(&pages);
    assert!(listed.is_sorted(), "{listed:?}");
    let expected: BTreeSet<&String> = keys
        .iter()
        .filter(|key| !["list:3", "list:4"].contains(&key.as_str()))
        .collect();
    let seen: BTreeSet<&String> = listed.iter().filter(|key| !key.contains("new")).collect();
    assert_eq!(seen, expected);
    assert_eq!(
        listed.iter().collect::<BTreeSet<_>>().len(),
        listed.len(),
        "no key comes twice"
    );
    let five = pages
        .iter()
        .flat_map(|page| page["keys"].as_array().unwrap())
        .find(|listed| listed["key"] == "list:5")
        .unwrap();
    assert_eq!(five["version"], lives);
    assert_eq!(five["size"], 10);
    assert!(five["expires_at"].as_str().unwrap().ends_with('Z'));
    let all = ask(&api, Method::GET, "").await?;
    assert_eq!(all["keys"][0]["key"], "LIST:1");
    Ok(())
}

#[tokio::test]
async fn queries_that_break_a_rule_are_refused() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    write_all(&world, &api, &["x1".to_owned(), "x2".to_owned()]).await?;
    let page = ask(&api, Method::GET, "prefix=x&limit=1").await?;
    let cursor = page["cursor"].as_str().unwrap();
    let foreign = format!("prefix=y&cursor={cursor}");
    for (method, query, field) in [
        (Method::GET, "limit=0", "limit"),
        (Method::GET, "limit=1001", "limit"),
        (Method::GET, "limit=x", "limit"),
        (Method::GET, "cursor=!", "cursor"),
        (Method::GET, "prefix=%00", "prefix"),
        (Method::GET, "prefix=%FF", "prefix"),
        (Method::GET, "prefix=a%2", "prefix"),
        (Method::GET, "prefix=%zz", "prefix"),
        (Method::GET, "prefi%zz=x", "prefi%zz"),
        (Method::GET, "prefix=a&prefix=b", "prefix"),
        (Method::GET, "sort=1", "sort"),
        (Method::GET, foreign.as_str(), "cursor"),
        (Method::DELETE, "", "prefix"),
        (Method::DELETE, "prefix=", "prefix"),
        (Method::DELETE, "prefix=%FF", "prefix"),
        (Method::DELETE, "prefix=caf%E9:", "prefix"),
        (Method::DELETE, "prefix=a%2", "prefix"),
        (Method::DELETE, "prefix=%zz", "prefix"),
        (Method::DELETE, "prefix=x&all=true", "all"),
        (Method::DELETE, "all=yes", "all"),
    ] {
        let answer = api
            .send(method, &format!("/v1/cache?{query}"), None)
            .await?
            .expect(StatusCode::BAD_REQUEST)?;
        assert_eq!(answer.json()?["field"], field, "{query}");
    }
    // What one key can be asked for is not silently left out for many.
    for (name, value) in [("if-match", "*"), ("birb-durability", "database")] {
        let answer = reqwest::Client::new()
            .delete(format!("{}/v1/cache?prefix=x", api.url))
            .header(name, value)
            .send()
            .await?;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{name}");
        assert_eq!(answer.json::<Value>().await?["field"], name);
    }
    assert_eq!(api.read("x1").await?.as_deref(), Some("1"));
    Ok(())
}

#[tokio::test]
async fn a_dead_letter_is_listed_and_deleted_like_any_value() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let stored = ["poison a", "poison b", "poison c"].map(str::to_owned);
    write_all(&world, &api, &stored).await?;
    world.sql(REFUSE).await?;
    // One over a row, one that is a delete, one without a row; the last one has nothing newer than its row.
    let over = api.write("poison a", "\"longer\"").await?;
    api.delete("poison b")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    let alone = api
        .post("poison bb", r#"{"value":"new","ttl":600}"#)
        .await?
        .expect(StatusCode::CREATED)?
        .version()?;
    eventually("all three are dead letters", async || {
        let n = world.sql("select count(*) from dead_keys").await?;
        Ok((n.trim() == "3").then_some(()))
    })
    .await?;
    let pages = pages(&api, Method::GET, "prefix=poison&limit=1", async || Ok(())).await?;
    let listed: Vec<Value> = pages
        .iter()
        .flat_map(|page| page["keys"].as_array().unwrap().clone())
        .collect();
    assert_eq!(
        names(&pages),
        ["poison a", "poison bb", "poison c"],
        "{listed:?}"
    );
    assert_eq!(
        (&listed[0]["version"], &listed[0]["size"]),
        (&over.into(), &8.into())
    );
    assert_eq!(
        (&listed[1]["version"], &listed[1]["size"]),
        (&alone.into(), &5.into())
    );
    assert!(listed[1]["expires_at"].is_string(), "{listed:?}");
    let swept = ask(&api, Method::DELETE, "prefix=poison").await?;
    assert_eq!(
        (&swept["deleted"], &swept["complete"]),
        (&3.into(), &true.into())
    );
    for key in ["poison a", "poison b", "poison bb", "poison c"] {
        assert_eq!(api.read(key).await?, None, "{key}");
    }
    Ok(())
}

/// Many shards of which none has anything to store: nobody announces anything.
#[tokio::test]
async fn a_delete_by_prefix_of_an_idle_nest_is_not_kept_waiting() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on_with(&stack, &[("NATS_SHARDS", "32")]).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let version = api.write("x", "1").await?;
    world.stored("x", version).await?;
    let swept = ask(&api, Method::DELETE, "prefix=x").await?;
    assert_eq!(
        (&swept["deleted"], &swept["complete"]),
        (&1.into(), &true.into())
    );
    Ok(())
}

/// The most memory that the API has had, in MiB.
fn peak(api: &Api) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", api.process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("a size")?.parse::<u64>()? / 1024)
}

/// Whether a key has a value is asked, not the value; where only log and PostgreSQL can say, a few keys at a time.
#[tokio::test]
async fn a_delete_by_prefix_holds_few_values_at_once() -> Result<()> {
    const N: usize = 100;
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let rows = format!(
        "insert into cache_entries (key, version, deleted, written_at, content_type, metadata, value)
         select prefix || n, n, false, now(), 'application/json', '', convert_to('\"' || repeat('x', 1000000) || '\"', 'UTF8')
         from generate_series(1, {N}) n, unnest(array['warm:', 'cold:']) prefix"
    );
    world.sql(&rows).await?;
    for n in 1..=N {
        api.get(&format!("warm:{n}"))
            .await?
            .expect(StatusCode::OK)?;
    }
    // With all values at once it grew by 71 and 193 MiB.
    for (prefix, most) in [("warm:", 30), ("cold:", 120)] {
        let before = peak(&api)?;
        let swept = ask(&api, Method::DELETE, &format!("prefix={prefix}&limit=1000")).await?;
        assert_eq!(
            (&swept["deleted"], &swept["complete"]),
            (&N.into(), &true.into())
        );
        let grown = peak(&api)? - before;
        ensure!(grown <= most, "{prefix} took {grown} MiB");
    }
    Ok(())
}

#[tokio::test]
async fn without_postgresql_nothing_is_listed_and_nothing_deleted_by_prefix() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    write_all(&world, &api, &["x".to_owned()]).await?;
    stack.postgres.kill().await?;
    for method in [Method::GET, Method::DELETE] {
        api.send(method, "/v1/cache?prefix=x", None)
            .await?
            .refused("UNAVAILABLE")?;
    }
    assert_eq!(api.read("x").await?.as_deref(), Some("1"));
    Ok(())
}

/// Some were deleted, one could not be: nobody is told that nothing happened.
#[tokio::test]
async fn a_delete_by_prefix_that_fails_in_part_says_so() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let written = world::write_all(&api, "part:", 60).await?;
    world.all_stored(written.iter()).await?;
    worker.terminate(PATIENCE).await?;
    world.fence(&world.subjects().await?[..1]).await?;
    let delete = async || {
        api.send(Method::DELETE, "/v1/cache?prefix=part:", None)
            .await
    };
    delete().await?.refused("UNKNOWN_OUTCOME")?;
    let mut n_gone = 0;
    for key in written.keys() {
        n_gone += usize::from(api.read(key).await?.is_none());
    }
    assert!((1..60).contains(&n_gone), "{n_gone}");
    let _worker = world.worker().await?;
    eventually("it goes on", async || {
        let answer = delete().await?;
        Ok((answer.status == StatusCode::OK && answer.json()?["complete"] == true).then_some(()))
    })
    .await?;
    for key in written.keys() {
        assert_eq!(api.read(key).await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn a_delete_by_prefix_goes_on_where_it_was_interrupted() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let keys: Vec<String> = (0..60).map(|n| format!("del:{n:02}")).collect();
    let mut versions = HashMap::new();
    for key in keys.iter().chain(&["del".to_owned(), "dem".to_owned()]) {
        versions.insert(key.clone(), api.write(key, "1").await?);
    }
    // Nothing of it is in PostgreSQL, so nothing can be said of all keys.
    let early = api
        .send(Method::DELETE, "/v1/cache?prefix=del:", None)
        .await?;
    early.refused("UNAVAILABLE")?;
    assert_eq!(api.read("del:00").await?.as_deref(), Some("1"));
    let _worker = world.worker().await?;
    world.all_stored(versions.iter()).await?;
    let first = ask(&api, Method::DELETE, "prefix=del:&limit=25").await?;
    assert_eq!(
        (&first["deleted"], &first["complete"]),
        (&25.into(), &false.into())
    );
    // What is written again meanwhile was written after the request that deleted it.
    api.write("del:03", "2").await?;
    let query = format!(
        "prefix=del:&limit=25&cursor={}",
        first["cursor"].as_str().unwrap()
    );
    ask(&api, Method::DELETE, &query).await?;
    // Its answer was lost: the same request again.
    let again = ask(&api, Method::DELETE, &query).await?;
    assert_eq!(again["deleted"], 0);
    let query = format!(
        "prefix=del:&limit=25&cursor={}",
        again["cursor"].as_str().unwrap()
    );
    let last = ask(&api, Method::DELETE, &query).await?;
    assert_eq!(
        (&last["deleted"], &last["complete"]),
        (&10.into(), &true.into())
    );
    for key in &keys {
        let left = api.read(key).await?;
        assert_eq!(left.as_deref(), (key == "del:03").then_some("2"), "{key}");
    }
    assert_eq!(api.read("del").await?.as_deref(), Some("1"));
    let rest = ask(&api, Method::DELETE, "all=true").await?;
    assert_eq!(
        (&rest["deleted"], &rest["complete"]),
        (&3.into(), &true.into())
    );
    assert_eq!(api.read("dem").await?, None);
    Ok(())
}

/// Whoever repeats the request elsewhere finds what is left of the page.
#[tokio::test]
async fn a_delete_by_prefix_goes_on_after_its_api_was_killed_in_the_middle() -> Result<()> {
    const N: usize = 600;
    let world = World::shared().await?;
    let other = Arc::new(world.api().await?);
    let _worker = world.worker().await?;
    let written = world::write_all(&other, "gone:", N).await?;
    let kept = other.write("gonf", "1").await?;
    world.all_stored(written.iter()).await?;
    world.stored("gonf", kept).await?;
    let mut env = world.env.replica()?;
    let link = world.stack.nats.proxy()?;
    let api = Arc::new(Api::start(env.through(&link)).await?);
    // Each of its deletes takes a while, so that it is seen in the middle.
    link.delay(Duration::from_millis(150));
    let deleting = tokio::spawn({
        let api = api.clone();
        let query = "/v1/cache?prefix=gone:&limit=1000";
        async move { api.send(Method::DELETE, query, None).await }
    });
    let n_deleted = async || {
        let sql = "select count(*) from cache_entries where deleted and key like 'gone:%'";
        anyhow::Ok(world.sql(sql).await?.parse::<usize>()?)
    };
    eventually("some are deleted", async || {
        Ok((n_deleted().await? > 0).then_some(()))
    })
    .await?;
    api.process.kill().await?;
    assert!(deleting.await?.is_err(), "it was answered");
    let mut n_left = 0;
    for key in written.keys() {
        n_left += usize::from(other.read(key).await?.is_some());
    }
    println!("{n_left} of {N} were left");
    assert!(
        (1..N).contains(&n_left),
        "it was not in the middle: {n_left}"
    );
    let rest = ask(&other, Method::DELETE, "prefix=gone:&limit=1000").await?;
    assert_eq!(rest["complete"], true);
    // What was deleted and is in Redis for another moment was counted among what is left.
    let n_deleted = rest["deleted"].as_u64().unwrap_or_default() as usize;
    assert!((1..=n_left).contains(&n_deleted), "{rest}");
    for key in written.keys() {
        assert_eq!(other.read(key).await?, None, "{key}");
    }
    assert_eq!(other.read("gonf").await?.as_deref(), Some("1"));
    Ok(())
}
