//! What was written comes back as it was written, from every store.

use anyhow::Result;
use reqwest::{Method, StatusCode};

use crate::world::{Api, World};

fn values() -> Vec<String> {
    let mut values: Vec<String> = [
        "null",
        "1.0",
        "1e400",
        "-0",
        "0.1000000000000000055511151231257827",
        "123456789012345678901234567890",
        r#""""#,
        r#""\u00e9\/\ud83d\udc26 é 🐦 \\ \" \u0000""#,
        r#"{"z":1,"a":2,"z":3,"":{}}"#,
        "[ 1 ,\t2,\r\n 3 ]",
    ]
    .map(str::to_owned)
    .into();
    values.push(format!("\"{}\"", "x".repeat((1 << 20) - 2)));
    values
}

fn value_of(body: &str) -> &str {
    let start = body.find("\"value\":").unwrap() + "\"value\":".len();
    let end = body.rfind(",\"version\":").unwrap();
    &body[start..end]
}

async fn check(api: &Api, source: &str) -> Result<()> {
    for (n, value) in values().iter().enumerate() {
        let answer = api
            .get(&format!("value {n}/ä"))
            .await?
            .expect(StatusCode::OK)?;
        assert_eq!(value_of(&answer.body), value, "from {source}");
        assert_eq!(answer.header("birb-source"), source);
    }
    Ok(())
}

#[tokio::test]
async fn values_come_back_byte_for_byte_from_each_store() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut last = 0;
    for (n, value) in values().iter().enumerate() {
        let body = format!(r#"{{"metadata": {{"b" : 1.0, "a":"\u00e9"}}, "value":{value}}}"#);
        let answer = api
            .post(&format!("value {n}/ä"), body)
            .await?
            .expect(StatusCode::CREATED)?;
        assert_eq!(value_of(&answer.body), value);
        assert!(
            answer
                .body
                .contains(r#""metadata":{"b" : 1.0, "a":"\u00e9"}"#),
            "{}",
            answer.body
        );
        last = answer.version()?;
    }
    check(&api, "redis").await?;
    world.flush_redis().await?;
    check(&api, "log").await?;
    let worker = world.eager_worker().await?;
    world
        .stored(&format!("value {}/ä", values().len() - 1), last)
        .await?;
    crate::world::eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    world.flush_redis().await?;
    check(&api, "postgres").await?;
    drop(worker);
    Ok(())
}

#[tokio::test]
async fn a_batch_has_every_key_in_exactly_one_place() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    for n in 0..5 {
        api.write(&format!("k{n}"), &format!("[{n}.0]")).await?;
    }
    api.delete("k4").await?.expect(StatusCode::NO_CONTENT)?;
    for flush in [false, true] {
        if flush {
            world.flush_redis().await?;
        }
        let body = r#"{"keys":["k0","k1","k2","k3","k4","never","k0"]}"#.to_owned();
        let answer = api
            .send(Method::POST, "/v1/cache/batch/get", Some(body))
            .await?
            .expect(StatusCode::OK)?;
        let json = answer.json()?;
        assert_eq!(json["entries"].as_object().unwrap().len(), 4);
        assert!(answer.body.contains(r#""value":[3.0]"#), "{}", answer.body);
        assert_eq!(json["missing"], serde_json::json!(["k4", "never"]));
        assert_eq!(json["errors"], serde_json::json!({}));
    }
    Ok(())
}

#[tokio::test]
async fn head_has_the_headers_and_put_replaces() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let put = |value: &str| {
        api.send(
            Method::PUT,
            "/v1/cache/k",
            Some(format!("{{\"value\":{value}}}")),
        )
    };
    let first = put("1").await?.expect(StatusCode::OK)?.version()?;
    let second = put("2").await?.expect(StatusCode::OK)?.version()?;
    assert!(second > first);
    let get = api.get("k").await?.expect(StatusCode::OK)?;
    let head = api
        .send(Method::HEAD, "/v1/cache/k", None)
        .await?
        .expect(StatusCode::OK)?;
    assert_eq!(head.body, "");
    for name in [
        "etag",
        "content-type",
        "content-length",
        "birb-source",
        "cache-control",
    ] {
        assert_eq!(head.header(name), get.header(name), "{name}");
        assert_ne!(head.header(name), "", "{name}");
    }
    // `batch` is a key like any other.
    api.write("batch", "1").await?;
    assert_eq!(api.read("batch").await?.as_deref(), Some("1"));
    Ok(())
}
