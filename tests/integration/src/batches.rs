//! Many writes in one request: each ends for itself, and is what it would have been alone.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Result;
use futures::future::{join_all, try_join_all};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::world::{Answer, Api, World, breakable, eventually, write_all};

const SET: &str = "/v1/cache/batch/set";
const DELETE: &str = "/v1/cache/batch/delete";

async fn send(api: &Api, route: &str, body: &Value) -> Result<Answer> {
    api.send(Method::POST, route, Some(body.to_string()))
        .await?
        .expect(StatusCode::OK)
}

fn results(answer: &Answer) -> Result<Vec<Value>> {
    Ok(answer.json()?["results"].as_array().unwrap().clone())
}

fn set_of(keys: impl Iterator<Item = String>) -> Value {
    let entries: Vec<Value> = keys.map(|key| json!({"key": key, "value": 1})).collect();
    json!({ "entries": entries })
}

#[tokio::test]
async fn each_write_of_a_batch_ends_for_itself_in_its_place() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let old = api.write("matches", "0").await?;
    let other = api.write("differs", "0").await?;
    // As text: what is sent must come back byte for byte.
    let body = format!(
        r#"{{"entries": [
            {{"key": "a/ä", "value": [ 1.0 ,"\u00e9"], "ttl": 60, "metadata": {{"x" : 1e2}}}},
            {{"key": "", "value": 1}},
            {{"key": "matches", "value": 2, "if_match": {old}}},
            {{"key": "differs", "value": 2, "if_match": "\"{old}\""}},
            {{"key": "nobody", "value": 2, "if_match": "*"}},
            {{"key": "no value"}},
            {{"key": "twice", "value": 1}},
            {{"key": "twice", "value": 2}}
        ]}}"#
    );
    let answer = api
        .send(Method::POST, SET, Some(body))
        .await?
        .expect(StatusCode::OK)?;
    let results = results(&answer)?;
    let seen: Vec<_> = results
        .iter()
        .map(|result| (result["status"].as_u64().unwrap(), result["field"].as_str()))
        .collect();
    assert_eq!(
        seen,
        [
            (201, None),
            (400, Some("entries[1].key")),
            (201, None),
            (412, None),
            (412, None),
            (400, Some("entries[5].value")),
            (201, None),
            (201, None),
        ]
    );
    assert_eq!(results[3]["version"], other);
    assert_eq!(results[3]["code"], "VERSION_MISMATCH");
    assert_eq!(results[4].get("version"), None);
    assert_eq!(results[5]["key"], "no value");
    assert!(results[6]["version"].as_u64() < results[7]["version"].as_u64());
    let entry = api.get("a/ä").await?.expect(StatusCode::OK)?;
    assert!(
        entry.body.contains(r#""value":[ 1.0 ,"\u00e9"],"#),
        "{}",
        entry.body
    );
    assert!(
        entry.body.contains(r#""metadata":{"x" : 1e2}"#),
        "{}",
        entry.body
    );
    assert_eq!(entry.version()?, results[0]["version"].as_u64().unwrap());
    for (key, value) in [("matches", "2"), ("differs", "0"), ("twice", "2")] {
        assert_eq!(api.read(key).await?.as_deref(), Some(value), "{key}");
    }
    assert_eq!(api.read("nobody").await?, None);
    for result in results.iter().filter(|result| result["status"] == 201) {
        let key = result["key"].as_str().unwrap();
        world
            .stored(key, result["version"].as_u64().unwrap())
            .await?;
    }
    Ok(())
}

#[tokio::test]
async fn each_delete_of_a_batch_ends_for_itself_in_its_place() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let written = api.write("there", "1").await?;
    api.write("stays", "1").await?;
    let answer = send(
        &api,
        DELETE,
        &json!({"keys": ["there", "never", "\u{1}", "there"]}),
    )
    .await?;
    let results = results(&answer)?;
    let statuses: Vec<_> = results
        .iter()
        .map(|result| result["status"].as_u64())
        .collect();
    assert_eq!(statuses, [Some(204), Some(404), Some(400), Some(404)]);
    assert_eq!(results[2]["field"], "keys[2]");
    assert!(results[0]["version"].as_u64().unwrap() > written);
    assert_eq!(api.read("there").await?, None);
    assert_eq!(api.read("stays").await?.as_deref(), Some("1"));
    eventually("the tombstone is stored", async || {
        Ok(world.row("there").await?.filter(|row| row.1).map(drop))
    })
    .await
}

#[tokio::test]
async fn a_malformed_batch_of_writes_is_refused_whole() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let many = set_of((0..101).map(|n| n.to_string())).to_string();
    for (route, body, field) in [
        (SET, "[]", None),
        (SET, "{}", Some("entries")),
        (SET, r#"{"entries":{}}"#, Some("entries")),
        (SET, r#"{"entries":[],"x":1}"#, Some("x")),
        (SET, many.as_str(), Some("entries")),
        (DELETE, "{}", Some("keys")),
        (DELETE, r#"{"keys":[1]}"#, Some("keys")),
    ] {
        let answer = api
            .send(Method::POST, route, Some(body.to_owned()))
            .await?
            .expect(StatusCode::BAD_REQUEST)?;
        assert_eq!(answer.json()?["field"].as_str(), field, "{body:.60}");
    }
    assert_eq!(api.read("1").await?, None);
    let conditional = reqwest::Client::new()
        .post(format!("{}{SET}", api.url))
        .header("if-match", "*")
        .header("content-type", "application/json")
        .body(r#"{"entries":[]}"#)
        .send()
        .await?;
    assert_eq!(conditional.status(), StatusCode::BAD_REQUEST);
    let empty = send(&api, SET, &json!({"entries": []})).await?;
    assert_eq!(empty.body, r#"{"results":[]}"#);
    Ok(())
}

#[tokio::test]
async fn of_many_batches_one_wins_each_key() -> Result<()> {
    let world = World::shared().await?;
    let apis = [world.api().await?, Api::start(&world.env.replica()?).await?].map(Arc::new);
    let keys: Vec<String> = (0..20).map(|n| format!("raced {n}")).collect();
    let first = send(&apis[0], SET, &set_of(keys.iter().cloned())).await?;
    let versions: Vec<Value> = results(&first)?
        .into_iter()
        .map(|result| result["version"].clone())
        .collect();
    let racers = (0..8).map(|racer| {
        let entries: Vec<Value> = keys
            .iter()
            .zip(&versions)
            .map(|(key, version)| json!({"key": key, "value": racer, "if_match": version}))
            .collect();
        let api = apis[racer % 2].clone();
        async move { results(&send(&api, SET, &json!({ "entries": entries })).await?) }
    });
    let ends = try_join_all(racers).await?;
    for (place, key) in keys.iter().enumerate() {
        let winners: Vec<usize> = (0..ends.len())
            .filter(|racer| ends[*racer][place]["status"] == 201)
            .collect();
        assert_eq!(winners.len(), 1, "{key}: {winners:?}");
        let losers = ends
            .iter()
            .filter(|end| end[place]["status"] == 412)
            .count();
        assert_eq!(losers, ends.len() - 1, "{key}");
        for api in &apis {
            let found = api.read(key).await?;
            assert_eq!(found, Some(winners[0].to_string()), "{key}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_batch_waits_for_postgresql_if_it_is_asked_to() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let ask = async |limit: &str| {
        let body = set_of((0..50).map(|n| format!("{limit} {n}"))).to_string();
        anyhow::Ok(
            reqwest::Client::new()
                .post(format!("{}{SET}", api.url))
                .header("birb-durability", "database")
                .header("content-type", "application/json")
                .body(body)
                .send()
                .await?,
        )
    };
    let statuses = |body: &Value| -> Vec<u64> {
        let results = body["results"].as_array().unwrap();
        results
            .iter()
            .map(|result| result["status"].as_u64().unwrap())
            .collect()
    };
    let without_worker = ask("early").await?;
    assert_eq!(without_worker.headers()["birb-durability"], "log");
    assert_eq!(statuses(&without_worker.json().await?), [202; 50]);
    let _worker = world.worker().await?;
    // It is ready before it owns shards.
    eventually("what was written before is stored", async || {
        let sql = "select count(*) from cache_entries where key like 'early %'";
        Ok((world.sql(sql).await?.trim() == "50").then_some(()))
    })
    .await?;
    let with_worker = ask("late").await?;
    assert_eq!(with_worker.headers()["birb-durability"], "database");
    assert_eq!(statuses(&with_worker.json().await?), [201; 50]);
    let stored = world
        .sql("select count(*) from cache_entries where key like 'late %'")
        .await?;
    assert_eq!(stored.trim(), "50");
    Ok(())
}

#[tokio::test]
async fn batches_when_servers_are_down() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = Arc::new(world.api().await?);
    let _worker = world.worker().await?;
    // It is ready before it owns shards.
    let owned = write_all(&api, "owned", 40).await?;
    world.all_stored(owned.iter()).await?;
    let keys = || (0..30).map(|n| format!("key {n}"));
    let body = set_of(keys());

    stack.redis.kill().await?;
    let pending = send(&api, SET, &body).await?;
    assert_eq!(pending.header("birb-cache"), "pending");
    for result in results(&pending)? {
        assert_eq!(
            (&result["status"], &result["cache"]),
            (&json!(201), &json!("pending"))
        );
    }
    // A prefix is a batch, too.
    let swept = api
        .send(Method::DELETE, "/v1/cache?prefix=key&limit=5", None)
        .await?
        .expect(StatusCode::OK)?;
    assert_eq!(swept.json()?["deleted"], 5);
    assert_eq!(swept.header("birb-cache"), "pending");
    stack.redis.start().await?;

    stack.postgres.kill().await?;
    for result in results(&send(&api, SET, &body).await?)? {
        assert_eq!(result["status"], 201, "{result}");
    }
    // Whether they have a value is known from log or Redis, or not at all: they are deleted either way.
    for result in results(&send(&api, DELETE, &json!({"keys": ["key 1", "unknown"]})).await?)? {
        assert_eq!(result["status"], 204, "{result}");
    }
    stack.postgres.start().await?;

    stack.nats.kill().await?;
    let ends = results(&send(&api, SET, &body).await?)?;
    for result in &ends {
        assert_eq!(result["status"], 503, "{result}");
        let code = result["code"].as_str().unwrap();
        assert!(
            ["UNAVAILABLE", "UNKNOWN_OUTCOME"].contains(&code),
            "{result}"
        );
    }
    eventually("nothing is handed to NATS any more", async || {
        let ends = results(&send(&api, SET, &body).await?)?;
        Ok(ends
            .iter()
            .all(|result| result["code"] == "UNAVAILABLE")
            .then_some(()))
    })
    .await?;
    stack.nats.start().await?;
    eventually("writes go on", async || {
        let ends = results(&send(&api, SET, &body).await?)?;
        Ok(ends
            .iter()
            .all(|result| result["status"] == 201)
            .then_some(()))
    })
    .await
}

/// Batches in flight when the API is killed may have happened or not; those that were answered have.
#[tokio::test]
async fn what_a_batch_acknowledged_outlives_the_api() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = Arc::new(world.api().await?);
    let writers = (0..4).map(|writer| {
        let api = api.clone();
        tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for round in 0.. {
                let keys = (0..50).map(|n| format!("{writer} {round} {n}"));
                let Ok(answer) = send(&api, SET, &set_of(keys)).await else {
                    break;
                };
                for result in results(&answer).unwrap() {
                    assert_eq!(result["status"], 201);
                    let key = result["key"].as_str().unwrap().to_owned();
                    acknowledged.push((key, result["version"].as_u64().unwrap()));
                }
            }
            acknowledged
        })
    });
    let writers: Vec<_> = writers.collect();
    eventually("some batches are in the log", async || {
        Ok((world.log_depth().await?.0 > 400).then_some(()))
    })
    .await?;
    api.process.kill().await?;
    let mut acknowledged = Vec::new();
    for writer in join_all(writers).await {
        acknowledged.extend(writer?);
    }
    assert!(!acknowledged.is_empty());
    let _worker = world.worker().await?;
    world
        .all_stored(acknowledged.iter().map(|(key, version)| (key, version)))
        .await
}

#[tokio::test]
async fn an_answer_that_would_be_too_large_says_which_keys_to_ask_for_again() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_MAX_BATCH_BYTES", "4KiB");
    let api = Api::start(&env).await?;
    let mut open: Vec<String> = (0..10).map(|n| format!("k{n}")).collect();
    let value = json!("x".repeat(1000)).to_string();
    for key in &open {
        api.write(key, &value).await?;
    }
    let mut n_answers = 0;
    while !open.is_empty() {
        let answer = send(&api, "/v1/cache/batch/get", &json!({ "keys": open })).await?;
        assert!(answer.body.len() < 5 << 10, "{} bytes", answer.body.len());
        assert_eq!(
            answer.header("content-length"),
            answer.body.len().to_string()
        );
        let answer = answer.json()?;
        let (found, errors) = (&answer["entries"], &answer["errors"]);
        assert!(!found.as_object().unwrap().is_empty(), "{answer}");
        let left: Vec<String> = errors.as_object().unwrap().keys().cloned().collect();
        assert!(
            left.iter().all(|key| errors[key]["code"] == "TOO_LARGE"),
            "{answer}"
        );
        assert_eq!(found.as_object().unwrap().len() + left.len(), open.len());
        (open, n_answers) = (left, n_answers + 1);
    }
    assert!(n_answers >= 3, "{n_answers}");
    Ok(())
}

/// What is on its way to NATS together takes the time of a few round trips, not of one for each.
#[tokio::test]
async fn the_writes_of_a_batch_are_on_their_way_together() -> Result<()> {
    const N: u32 = 100;
    const LATE: Duration = Duration::from_millis(20);
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    let link = world.stack.nats.proxy()?;
    let api = Api::start(env.through(&link)).await?;
    link.delay(LATE);
    let there_and_back = LATE * 2;
    let started = Instant::now();
    api.write("alone", "1").await?;
    let alone = started.elapsed();
    assert!(alone >= there_and_back, "the link is slow: {alone:?}");
    let keys = || (0..N).map(|n| format!("together {n}"));
    let started = Instant::now();
    let answer = send(&api, SET, &set_of(keys())).await?;
    let took = started.elapsed();
    println!("one write took {alone:?}, {N} together {took:?}");
    assert!(results(&answer)?.iter().all(|it| it["status"] == 201));
    assert!(took < there_and_back * N / 2, "{took:?}");
    let started = Instant::now();
    let keys: Vec<String> = keys().collect();
    let answer = send(&api, DELETE, &json!({ "keys": keys })).await?;
    let took = started.elapsed();
    println!("{N} deletes took {took:?}");
    assert!(results(&answer)?.iter().all(|it| it["status"] == 204));
    assert!(took < there_and_back * N / 2, "{took:?}");
    Ok(())
}
