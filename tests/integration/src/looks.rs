//! What each store has of a key, for people: `/v1/debug/{key}`.

use anyhow::Result;
use birb_nest_core::Key;
use birb_nest_stack::Role;
use birb_nest_store::LogConfig;
use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::{
    dead_letters::REFUSE,
    world::{Api, PATIENCE, World, breakable, eventually},
};

async fn look(api: &Api, key: &str) -> Result<Value> {
    api.send(Method::GET, &format!("/v1/debug/{key}"), None)
        .await?
        .expect(StatusCode::OK)?
        .json()
}

fn states(report: &Value) -> [&str; 3] {
    ["redis", "log", "postgres"].map(|store| report[store]["state"].as_str().unwrap())
}

#[tokio::test]
async fn each_store_says_what_it_has() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    assert_eq!(states(&look(&api, "k").await?), ["nothing"; 3]);
    let written = api.post("k", r#"{"value":"1234","ttl":600}"#).await?;
    let (version, written) = (written.version()?, written.json()?);
    let shard = world
        .config::<LogConfig>()?
        .nats_shards
        .shard_of(&Key::parse("k")?);
    let pending = look(&api, "k").await?;
    assert_eq!(states(&pending), ["entry", "entry", "nothing"]);
    for store in ["redis", "log"] {
        assert_eq!(pending[store]["version"], version);
        assert_eq!(pending[store]["expired"], false);
        assert_eq!(pending[store]["expires_at"], written["expires_at"]);
    }
    assert_eq!(
        (&pending["key"], &pending["shard"]),
        (&"k".into(), &shard.index().into())
    );
    assert_eq!(pending["log"]["written_at"], written["updated_at"]);
    assert_eq!(pending["log"]["size"], 6);
    assert_eq!(pending["log"]["pending"], true);
    let base = pending["log"]["base"].as_u64().unwrap();
    assert_eq!(base + pending["log"]["sequence"].as_u64().unwrap(), version);
    assert!(
        pending["log"]["subject"].as_str().unwrap().ends_with(".aw"),
        "{pending}"
    );
    world.flush_redis().await?;
    assert_eq!(
        states(&look(&api, "k").await?)[0],
        "nothing",
        "a look fills nothing"
    );

    world.sql(REFUSE).await?;
    let mut env = world.env.replica()?;
    env.set("LOG_TRIM_LAG", "1ms")
        .set("LOG_TRIM_INTERVAL", "20ms");
    let _worker = env.start(Role::Worker).await?;
    let dead = api.write("poison", "1").await?;
    world.stored("k", version).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    let stored = look(&api, "k").await?;
    assert_eq!(states(&stored), ["nothing", "nothing", "entry"]);
    assert_eq!(stored["postgres"]["version"], version);
    assert!(stored["postgres"]["applied_to"].as_u64().unwrap() >= version);
    assert_eq!(stored["postgres"]["expires_at"], written["expires_at"]);
    // As if that were long ago.
    for (expires_at, is_expired) in [("2001-01-01", true), ("2101-01-01", false)] {
        let update = format!(
            "update cache_entries set written_at = clock_timestamp() - interval '1 hour',
                                      expires_at = '{expires_at}T00:00:00Z' where key = 'k'"
        );
        world.sql(&update).await?;
        let old = &look(&api, "k").await?["postgres"];
        let age = old["age_seconds"].as_u64().unwrap();
        assert!((3599..3600 + PATIENCE.as_secs()).contains(&age), "{age}");
        assert_eq!(old["expires_at"], format!("{expires_at}T00:00:00.000000Z"));
        assert_eq!(old["expired"], is_expired);
    }
    let poison = look(&api, "poison").await?;
    assert_eq!(states(&poison)[2], "nothing");
    assert_eq!(poison["postgres"]["dead_version"], dead);

    api.delete("k").await?.expect(StatusCode::NO_CONTENT)?;
    eventually("the tombstone is stored", async || {
        let report = look(&api, "k").await?;
        Ok(
            (report["postgres"]["state"] == "deleted" && report["redis"]["state"] == "deleted")
                .then_some(()),
        )
    })
    .await?;
    api.get("never").await?.expect(StatusCode::NOT_FOUND)?;
    assert_eq!(look(&api, "never").await?["redis"]["state"], "absent");
    api.post_if("pinned", &[("if-match", "*")], "1")
        .await?
        .expect(StatusCode::PRECONDITION_FAILED)?;
    let pinned = look(&api, "pinned").await?;
    assert!(["pin", "nothing"].contains(&states(&pinned)[1]), "{pinned}");
    Ok(())
}

#[tokio::test]
async fn a_store_that_is_down_is_named() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    api.write("k", "1").await?;
    stack.redis.kill().await?;
    stack.postgres.kill().await?;
    assert_eq!(
        states(&look(&api, "k").await?),
        ["unavailable", "entry", "unavailable"]
    );
    stack.nats.kill().await?;
    let report = eventually("NATS is known to be down", async || {
        let report = look(&api, "k").await?;
        Ok((states(&report) == ["unavailable"; 3]).then_some(report))
    })
    .await?;
    assert!(!report["log"]["why"].as_str().unwrap().is_empty());
    Ok(())
}
