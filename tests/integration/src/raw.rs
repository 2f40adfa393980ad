//! Values as bytes, with a media type of their own; and the time to live of any value.

use anyhow::Result;
use reqwest::{
    Method, Response, StatusCode,
    header::{HeaderMap, HeaderName, HeaderValue},
};

use crate::world::{Api, World, eventually};

fn every_byte() -> Vec<u8> {
    (0..=255).cycle().take(1000).collect()
}

async fn send(
    api: &Api,
    method: Method,
    path: &str,
    headers: &[(&'static str, &'static str)],
    body: impl Into<reqwest::Body>,
) -> Result<Response> {
    let headers: HeaderMap = headers
        .iter()
        .map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        })
        .collect();
    Ok(reqwest::Client::new()
        .request(method, format!("{}{path}", api.url))
        .headers(headers)
        .body(body)
        .send()
        .await?)
}

async fn check_image(api: &Api, source: &str) -> Result<()> {
    let got = send(
        api,
        Method::GET,
        "/v1/raw/image",
        &[("accept", "image/*")],
        "",
    )
    .await?;
    assert_eq!(got.status(), StatusCode::OK, "from {source}");
    let header = |name: &str| got.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("content-type"), "image/png");
    assert_eq!(header("birb-source"), source);
    assert_eq!(header("birb-meta-author"), "somebody");
    assert_eq!(header("x-content-type-options"), "nosniff");
    let ttl: u64 = header("birb-ttl").parse()?;
    assert!((3000..=3600).contains(&ttl), "{ttl}");
    assert_eq!(got.bytes().await?, every_byte(), "from {source}");
    Ok(())
}

#[tokio::test]
async fn bytes_come_back_exactly_from_each_store() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let sent = send(
        &api,
        Method::PUT,
        "/v1/raw/image",
        &[
            ("content-type", "image/png"),
            ("birb-ttl", "3600"),
            ("birb-meta-author", "somebody"),
        ],
        every_byte(),
    )
    .await?;
    assert_eq!(sent.status(), StatusCode::OK);
    let version: u64 = sent.headers()["etag"].to_str()?.trim_matches('"').parse()?;
    check_image(&api, "redis").await?;
    world.flush_redis().await?;
    check_image(&api, "log").await?;
    let _worker = world.eager_worker().await?;
    world.stored("image", version).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    world.flush_redis().await?;
    check_image(&api, "postgres").await?;

    // As JSON the same bytes are in base64, and say so.
    let entry = api.get("image").await?.expect(StatusCode::OK)?.json()?;
    assert_eq!(entry["encoding"], "base64");
    assert_eq!(entry["content_type"], "image/png");
    assert_eq!(entry["metadata"]["author"], "somebody");
    assert!(
        entry["value"]
            .as_str()
            .unwrap()
            .starts_with("AAECAwQFBgcICQ")
    );
    let head = send(&api, Method::HEAD, "/v1/raw/image", &[], "").await?;
    assert_eq!(head.headers()["content-length"], "1000");
    api.delete("image").await?.expect(StatusCode::NO_CONTENT)?;
    let gone = send(&api, Method::GET, "/v1/raw/image", &[], "").await?;
    assert_eq!(gone.status(), StatusCode::NOT_FOUND);
    Ok(())
}

#[tokio::test]
async fn json_is_the_same_value_by_both_routes() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    api.write("a", r#"{"z": 1.0,"a":"\u00e9"}"#).await?;
    let raw = send(&api, Method::GET, "/v1/raw/a", &[], "").await?;
    assert_eq!(raw.headers()["content-type"], "application/json");
    assert_eq!(raw.text().await?, r#"{"z": 1.0,"a":"\u00e9"}"#);
    let json = [("content-type", "application/json; charset=utf-8")];
    let put = send(&api, Method::PUT, "/v1/raw/b", &json, " [1.0 ]\n").await?;
    assert_eq!(put.status(), StatusCode::OK);
    let entry = api.get("b").await?.expect(StatusCode::OK)?;
    assert!(
        entry.body.contains(r#""value":[1.0 ],"version""#),
        "{}",
        entry.body
    );
    let empty = send(&api, Method::PUT, "/v1/raw/c", &[], "").await?;
    assert_eq!(empty.status(), StatusCode::OK);
    let empty = send(&api, Method::GET, "/v1/raw/c", &[], "").await?;
    assert_eq!(empty.headers()["content-type"], "application/octet-stream");
    assert_eq!(empty.bytes().await?.len(), 0);
    Ok(())
}

#[tokio::test]
async fn raw_values_obey_conditions() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let create = [("if-none-match", "*"), ("content-type", "text/plain")];
    let first = send(&api, Method::PUT, "/v1/raw/k", &create, "one").await?;
    assert_eq!(first.status(), StatusCode::OK);
    let etag = first.headers()["etag"].clone();
    let again = send(&api, Method::PUT, "/v1/raw/k", &create, "two").await?;
    assert_eq!(again.status(), StatusCode::PRECONDITION_FAILED);
    assert_eq!(again.headers()["etag"], etag);
    let known = reqwest::Client::new()
        .get(format!("{}/v1/raw/k", api.url))
        .header("if-none-match", &etag)
        .send()
        .await?;
    assert_eq!(known.status(), StatusCode::NOT_MODIFIED);
    let strong = [("cache-control", "no-cache")];
    let strong = send(&api, Method::GET, "/v1/raw/k", &strong, "").await?;
    assert_eq!(strong.headers()["birb-source"], "log");
    assert_eq!(strong.text().await?, "one");
    Ok(())
}

#[tokio::test]
async fn raw_requests_that_break_a_rule_are_refused() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    for (headers, body, status, field) in [
        (
            &[("content-type", "nonsense")][..],
            "x",
            400,
            Some("content-type"),
        ),
        (&[("content-type", "application/json")], "{", 400, None),
        (&[("birb-ttl", "0")], "x", 400, Some("birb-ttl")),
        (&[("birb-ttl", "1.5")], "x", 400, Some("birb-ttl")),
        (&[("birb-meta-", "x")], "x", 400, Some("birb-meta-")),
        (
            &[("birb-durability", "moon")],
            "x",
            400,
            Some("birb-durability"),
        ),
        (&[("if-match", "x")], "x", 400, Some("if-match")),
    ] {
        let answer = send(&api, Method::PUT, "/v1/raw/k", headers, body).await?;
        assert_eq!(answer.status().as_u16(), status, "{headers:?}");
        let error: serde_json::Value = answer.json().await?;
        assert_eq!(error["field"].as_str(), field, "{headers:?}");
    }
    for name in ["birb-ttl", "content-type"] {
        let twice = reqwest::Client::new()
            .put(format!("{}/v1/raw/k", api.url))
            .header(name, "1")
            .header(name, "2")
            .send()
            .await?;
        assert_eq!(twice.status(), StatusCode::BAD_REQUEST, "{name}");
        assert_eq!(twice.json::<serde_json::Value>().await?["field"], name);
    }
    let large = send(&api, Method::PUT, "/v1/raw/k", &[], vec![0; (1 << 20) + 1]).await?;
    assert_eq!(large.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let post = send(&api, Method::POST, "/v1/raw/k", &[], "x").await?;
    assert_eq!(post.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(api.read("k").await?, None);
    Ok(())
}

async fn touch(api: &Api, key: &str, ttl: &str) -> Result<crate::world::Answer> {
    let body = format!("{{\"ttl\":{ttl}}}");
    api.send(Method::PATCH, &format!("/v1/cache/{key}"), Some(body))
        .await
}

#[tokio::test]
async fn a_touch_is_a_new_version_with_every_byte_of_the_old_one() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let body = r#"{"value":{"z":1.0,"a":"\u00e9"},"metadata":{"m" : 1e2},"ttl":60}"#;
    let first = api
        .post("json", body)
        .await?
        .expect(StatusCode::CREATED)?
        .version()?;
    send(
        &api,
        Method::PUT,
        "/v1/raw/bytes",
        &[("content-type", "image/png")],
        every_byte(),
    )
    .await?;
    let check = async |source: &str, ttl: &str| {
        let touched = touch(&api, "json", ttl).await?.expect(StatusCode::OK)?;
        assert!(touched.version()? > first, "from {source}");
        world.flush_redis().await?;
        let read = api.get("json").await?.expect(StatusCode::OK)?;
        assert_eq!(read.version()?, touched.version()?);
        for part in [
            r#""value":{"z":1.0,"a":"\u00e9"},"#,
            r#""metadata":{"m" : 1e2},"#,
        ] {
            assert!(read.body.contains(part), "{source}: {}", read.body);
        }
        let left = read.json()?["ttl"].as_u64();
        assert_eq!(
            left.is_some_and(|left| left > 3000),
            ttl != "null",
            "{left:?}"
        );
        touch(&api, "bytes", ttl).await?.expect(StatusCode::OK)?;
        world.flush_redis().await?;
        let bytes = send(&api, Method::GET, "/v1/raw/bytes", &[], "").await?;
        assert_eq!(bytes.headers()["content-type"], "image/png");
        assert_eq!(bytes.bytes().await?, every_byte(), "from {source}");
        anyhow::Ok(touched.version()?)
    };
    let touched = check("the log", "3600").await?;
    let _worker = world.eager_worker().await?;
    world.stored("json", touched).await?;
    eventually("the log is trimmed", async || {
        Ok((world.log_depth().await?.0 == 0).then_some(()))
    })
    .await?;
    check("postgresql", "null").await?;
    Ok(())
}

#[tokio::test]
async fn a_touch_that_cannot_be_is_refused() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    touch(&api, "never", "5")
        .await?
        .expect(StatusCode::NOT_FOUND)?;
    let version = api.write("k", "1").await?;
    for body in ["{}", r#"{"ttl":0}"#, r#"{"ttl":1,"value":2}"#, "x"] {
        api.send(Method::PATCH, "/v1/cache/k", Some(body.to_owned()))
            .await?
            .expect(StatusCode::BAD_REQUEST)?;
    }
    let other = [("if-match", "\"1\""), ("content-type", "application/json")];
    let answer = send(&api, Method::PATCH, "/v1/cache/k", &other, r#"{"ttl":5}"#).await?;
    assert_eq!(answer.status(), StatusCode::PRECONDITION_FAILED);
    assert_eq!(api.get("k").await?.version()?, version);
    Ok(())
}

/// Touch and delete race through two APIs; whichever came first, a delete that was answered is the end of the value.
#[tokio::test]
async fn a_touch_brings_nothing_back() -> Result<()> {
    let world = World::shared().await?;
    let apis = [world.api().await?, Api::start(&world.env.replica()?).await?];
    let _worker = world.eager_worker().await?;
    for round in 0..60 {
        let key = format!("raced-{round}");
        apis[round % 2].write(&key, "1").await?;
        let (touched, deleted) = tokio::join!(touch(&apis[0], &key, "600"), apis[1].delete(&key));
        deleted?.expect(StatusCode::NO_CONTENT)?;
        let touched = touched?.status;
        assert!(
            [StatusCode::OK, StatusCode::NOT_FOUND].contains(&touched),
            "{touched}"
        );
        for api in &apis {
            assert_eq!(api.read(&key).await?, None, "{key}, touched: {touched}");
        }
    }
    Ok(())
}

/// Touch and write race through two APIs; whichever came first, the value that was written is there, and is the newest.
#[tokio::test]
async fn a_touch_hides_nothing_newer() -> Result<()> {
    let world = World::shared().await?;
    let apis = [world.api().await?, Api::start(&world.env.replica()?).await?];
    let _worker = world.eager_worker().await?;
    let mut n_touched_last = 0;
    for round in 0..60 {
        let key = format!("overtaken-{round}");
        apis[round % 2].write(&key, "1").await?;
        let (touched, written) =
            tokio::join!(touch(&apis[0], &key, "600"), apis[1].write(&key, "2"));
        let touched = touched?.expect(StatusCode::OK)?.version()?;
        let newest = touched.max(written?);
        n_touched_last += usize::from(newest == touched);
        for api in &apis {
            let entry = api.get(&key).await?.expect(StatusCode::OK)?;
            assert_eq!(entry.version()?, newest, "{key}");
            assert_eq!(entry.json()?["value"], 2, "{key}");
            assert_eq!(entry.json()?["ttl"].is_u64(), newest == touched, "{key}");
        }
    }
    println!("in {n_touched_last} of 60 rounds the touch came last");
    Ok(())
}
