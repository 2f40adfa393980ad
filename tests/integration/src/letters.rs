//! Dead letters over HTTP: listed, read, tried again, given up.

use anyhow::Result;
use birb_nest_stack::{Process, Role};
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::{
    dead_letters::REFUSE,
    world::{Answer, Api, World, breakable, eventually},
};

const ROUTE: &str = "/v1/dead-letters";

async fn worker(world: &World<'_>) -> Result<Process> {
    let mut env = world.env.replica()?;
    env.set("WORKER_DEAD_LETTER_RETRY", "50ms")
        .set("NATS_DLQ_MAX_RETRIES", "1");
    env.start(Role::Worker).await
}

async fn ask(api: &Api, method: Method, path: &str) -> Result<Answer> {
    api.send(method, &format!("{ROUTE}{path}"), None).await
}

/// All dead letters once `n` are parked.
async fn parked(api: &Api, n: usize) -> Result<Vec<Value>> {
    eventually("the letters are parked", async || {
        let listing = ask(api, Method::GET, "")
            .await?
            .expect(StatusCode::OK)?
            .json()?;
        let letters = listing["dead_letters"].as_array().unwrap().clone();
        let n_parked = letters
            .iter()
            .filter(|letter| letter["state"] == "parked")
            .count();
        Ok((n_parked == n).then_some(letters))
    })
    .await
}

#[tokio::test]
async fn a_parked_letter_is_listed_read_and_replayed() -> Result<()> {
    let world = World::shared().await?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    let _worker = worker(&world).await?;
    let body = r#"{"value":[1.0],"metadata":{"a":1}}"#;
    let version = api
        .post("poison/ä", body)
        .await?
        .expect(StatusCode::CREATED)?
        .version()?;
    let letters = parked(&api, 1).await?;
    let letter = &letters[0];
    assert_eq!(letter["key"], "poison/ä");
    assert_eq!(letter["version"], version);
    assert_eq!(letter["sqlstate"], "P0001");
    assert!(
        letter["reason"]
            .as_str()
            .unwrap()
            .contains("no poison/ä here")
    );
    assert_eq!(letter["attempts"], 2);
    assert!(letter["first_failed_at"].as_str() <= letter["last_failed_at"].as_str());
    assert_eq!(letter.get("entry"), None, "lists have no values");
    let id = letter["id"].as_str().unwrap();
    let one = ask(&api, Method::GET, &format!("/{id}"))
        .await?
        .expect(StatusCode::OK)?;
    assert!(one.body.contains(r#""value":[1.0],"#), "{}", one.body);
    assert_eq!(one.json()?["entry"]["version"], version);

    // Its cause is still there: one attempt more, and parked again.
    let replay = format!("/{id}/replay");
    ask(&api, Method::POST, &replay)
        .await?
        .expect(StatusCode::ACCEPTED)?;
    eventually("it was tried once more", async || {
        let letters = parked(&api, 1).await?;
        Ok((letters[0]["attempts"] == 3).then_some(()))
    })
    .await?;
    world.sql("drop trigger refuse on cache_entries").await?;
    let replayed = ask(&api, Method::POST, &replay)
        .await?
        .expect(StatusCode::ACCEPTED)?;
    assert_eq!(replayed.json()?["replayed"], 1);
    world.stored("poison/ä", version).await?;
    parked(&api, 0).await?;
    ask(&api, Method::POST, &replay)
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    ask(&api, Method::GET, &format!("/{id}"))
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    Ok(())
}

#[tokio::test]
async fn a_replay_brings_nothing_old_back() -> Result<()> {
    let world = World::shared().await?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    let worker = worker(&world).await?;
    api.write("poison", "\"old\"").await?;
    let letters = parked(&api, 1).await?;
    let id = letters[0]["id"].as_str().unwrap().to_owned();
    worker.kill().await?;
    // Written again, and not stored yet: the letter is there still.
    let newer = api.write("poison", "\"new\"").await?;
    ask(&api, Method::POST, &format!("/{id}/replay"))
        .await?
        .expect(StatusCode::ACCEPTED)?;
    assert_eq!(api.read("poison").await?.as_deref(), Some("\"new\""));
    world.sql("drop trigger refuse on cache_entries").await?;
    let _worker = self::worker(&world).await?;
    world.stored("poison", newer).await?;
    parked(&api, 0).await?;
    world.flush_redis().await?;
    assert_eq!(api.get("poison").await?.version()?, newer);
    assert_eq!(world.row("poison").await?.unwrap().0, newer);
    Ok(())
}

#[tokio::test]
async fn what_is_given_up_is_deleted_and_nothing_older_shows() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = worker(&world).await?;
    let older = api.write("poison 1", "\"older\"").await?;
    world.stored("poison 1", older).await?;
    world.sql(REFUSE).await?;
    for n in 1..=3 {
        api.write(&format!("poison {n}"), "\"refused\"").await?;
    }
    let letters = parked(&api, 3).await?;
    let id = letters[0]["id"].as_str().unwrap();
    world.sql("drop trigger refuse on cache_entries").await?;
    ask(&api, Method::DELETE, &format!("/{id}"))
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    for _ in 0..2 {
        assert_eq!(api.read("poison 1").await?, None);
        world.flush_redis().await?;
    }
    parked(&api, 2).await?;
    ask(&api, Method::DELETE, &format!("/{id}"))
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    let rest = ask(&api, Method::DELETE, "")
        .await?
        .expect(StatusCode::OK)?
        .json()?;
    assert_eq!(
        (&rest["purged"], &rest["complete"]),
        (&2.into(), &true.into())
    );
    parked(&api, 0).await?;
    assert_eq!(api.read("poison 3").await?, None);
    Ok(())
}

/// A refused delete, a write that has expired since, and one whose message is gone can be given up like any other.
#[tokio::test]
async fn what_has_no_value_is_given_up_as_well() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = worker(&world).await?;
    let stored = api.write("poison deleted", "1").await?;
    world.stored("poison deleted", stored).await?;
    world.sql(REFUSE).await?;
    api.delete("poison deleted")
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    api.post("poison expired", r#"{"value":1,"ttl":1}"#)
        .await?
        .expect(StatusCode::CREATED)?;
    parked(&api, 2).await?;
    eventually("it expires", async || {
        let answer = api.get("poison expired").await?;
        Ok((answer.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    // Only now, so that those that are read above are there.
    api.write("poison gone", "1").await?;
    let letters = parked(&api, 3).await?;
    let gone = letters
        .iter()
        .find(|letter| letter["key"] == "poison gone")
        .unwrap();
    let jetstream = world.jetstream().await?;
    let dead = jetstream
        .get_stream(&world.env.vars["NATS_DLQ_STREAM_NAME"])
        .await?;
    let newest = dead.cached_info().state.last_sequence;
    assert!(dead.delete_message(newest).await?);
    world.flush_redis().await?;
    world.sql("drop trigger refuse on cache_entries").await?;
    let id = gone["id"].as_str().unwrap();
    ask(&api, Method::DELETE, &format!("/{id}"))
        .await?
        .expect(StatusCode::NO_CONTENT)?;
    parked(&api, 2).await?;
    let rest = ask(&api, Method::DELETE, "")
        .await?
        .expect(StatusCode::OK)?
        .json()?;
    assert_eq!(rest["purged"], 2, "{rest}");
    parked(&api, 0).await?;
    for key in ["poison deleted", "poison expired", "poison gone"] {
        world.flush_redis().await?;
        assert_eq!(api.read(key).await?, None, "{key}");
        let (_, is_deleted, _) = world.row(key).await?.unwrap();
        assert!(is_deleted, "{key}");
    }
    Ok(())
}

#[tokio::test]
async fn all_parked_letters_are_listed_page_by_page_and_replayed() -> Result<()> {
    let world = World::shared().await?;
    world.sql(REFUSE).await?;
    let api = world.api().await?;
    let _worker = worker(&world).await?;
    let mut versions = Vec::new();
    // A good one between them, lest they look like a broken PostgreSQL.
    for n in 0..7 {
        let key = format!("poison {n}");
        versions.push((key.clone(), api.write(&key, "1").await?));
        for other in 0..8 {
            api.write(&format!("good {n} {other}"), "1").await?;
        }
    }
    parked(&api, 7).await?;
    let (mut keys, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = ask(&api, Method::GET, &format!("?limit=3{cursor}"))
            .await?
            .json()?;
        let letters = page["dead_letters"].as_array().unwrap();
        keys.extend(
            letters
                .iter()
                .map(|letter| letter["key"].as_str().unwrap().to_owned()),
        );
        let Some(next) = page["cursor"].as_str() else {
            break;
        };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(
        keys,
        versions
            .iter()
            .map(|(key, _)| key.clone())
            .collect::<Vec<_>>()
    );
    world.sql("drop trigger refuse on cache_entries").await?;
    let replayed = ask(&api, Method::POST, "/replay")
        .await?
        .expect(StatusCode::ACCEPTED)?;
    assert_eq!(replayed.body, r#"{"replayed":7,"complete":true}"#);
    parked(&api, 0).await?;
    for (key, version) in versions {
        world.stored(&key, version).await?;
    }
    Ok(())
}

#[tokio::test]
async fn letters_that_cannot_be_are_refused() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    for id in [
        "nonsense",
        "1.YQ",
        "x.YQ",
        "1.!",
        "1.",
        "99999999999999999999.YQ",
        "%FF",
        "1.YQ%FF",
    ] {
        for (method, path) in [
            (Method::GET, format!("/{id}")),
            (Method::DELETE, format!("/{id}")),
            (Method::POST, format!("/{id}/replay")),
        ] {
            let answer = ask(&api, method, &path)
                .await?
                .expect(StatusCode::NOT_FOUND)?;
            assert_eq!(answer.json()?["code"], "NOT_FOUND", "{answer:?}");
        }
    }
    for query in ["?limit=0", "?cursor=%21", "?x=1"] {
        ask(&api, Method::GET, query)
            .await?
            .expect(StatusCode::BAD_REQUEST)?;
    }
    stack.postgres.kill().await?;
    for (method, path) in [
        (Method::GET, ""),
        (Method::DELETE, ""),
        (Method::POST, "/replay"),
        (Method::GET, "/1.YQ"),
        (Method::DELETE, "/1.YQ"),
        (Method::POST, "/1.YQ/replay"),
    ] {
        ask(&api, method, path).await?.refused("UNAVAILABLE")?;
    }
    Ok(())
}
