//! Who may do what, how often, and from where.

use std::path::PathBuf;

use anyhow::{Context, Result};
use reqwest::{Client, Response, StatusCode};
use serde_json::Value;

use crate::{
    shown::metric,
    world::{Api, World, eventually},
};

const READ: &str = "reader-0123456789abcdef";
const WRITE: &str = "writer-0123456789abcdef";
const ADMIN: &str = "admin-00123456789abcdef";

fn keys() -> String {
    format!("# who\nread dashboards {READ}\nwrite shop {WRITE}\nadmin operators {ADMIN}\n")
}

/// A nest whose API wants keys, and the file they are in.
async fn guarded() -> Result<(World<'static>, Api, PathBuf)> {
    let mut world = World::shared().await?;
    let file = world.env.make_dir()?.join("keys");
    std::fs::write(&file, keys())?;
    world
        .env
        .set("API_KEYS_FILE", file.to_str().context("UTF-8")?);
    let api = world.api().await?;
    Ok((world, api, file))
}

async fn send(api: &Api, method: &str, path: &str, headers: &[(&str, &str)]) -> Result<Response> {
    let mut request = Client::new()
        .request(method.parse()?, format!("{}{path}", api.url))
        .header("content-type", "application/json")
        .body(r#"{"value":1}"#);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    Ok(request.send().await?)
}

async fn status(api: &Api, key: &str) -> Result<StatusCode> {
    Ok(send(api, "GET", "/v1/cache/k", &[("x-api-key", key)])
        .await?
        .status())
}

#[tokio::test]
async fn each_route_wants_its_role() -> Result<()> {
    let (_world, api, _) = guarded().await?;
    let index: Value = send(&api, "GET", "/", &[]).await?.json().await?;
    let (mut n_open, mut n_guarded) = (0, 0);
    for endpoint in index["endpoints"].as_array().unwrap() {
        let (method, path) = endpoint.as_str().unwrap().split_once(' ').unwrap();
        let path = path.replace("{key}", "k").replace("{id}", "1.aw");
        let answer = |key: Option<&'static str>| {
            let (api, path) = (&api, path.clone());
            async move {
                let headers: Vec<_> = key.map(|key| ("x-api-key", key)).into_iter().collect();
                let answer = send(api, method, &path, &headers).await?;
                let challenge = answer.headers().contains_key("www-authenticate");
                let status = answer.status();
                assert_eq!(
                    challenge,
                    status == StatusCode::UNAUTHORIZED,
                    "{method} {path}"
                );
                anyhow::Ok(status.as_u16())
            }
        };
        if !path.starts_with("/v1/") {
            assert_eq!(answer(None).await?, 200, "{method} {path}");
            n_open += 1;
            continue;
        }
        n_guarded += 1;
        for stranger in [None, Some("nobody-0123456789abcdef"), Some("")] {
            assert_eq!(answer(stranger).await?, 401, "{method} {path}");
        }
        // Said here once more, since it is what users rely on.
        let by_key = path == "/v1/cache/k" || path == "/v1/raw/k" || path.contains("/batch/");
        let needed = match (by_key, method) {
            (true, "GET") => 0,
            (true, _) if path.ends_with("/batch/get") => 0,
            (true, _) => 1,
            (false, _) => 2,
        };
        for (role, key) in [READ, WRITE, ADMIN].into_iter().enumerate() {
            let status = answer(Some(key)).await?;
            assert_eq!(
                status == 403,
                role < needed,
                "{method} {path} as {role}: {status}"
            );
            assert_ne!(status, 401, "{method} {path} as {role}");
        }
    }
    assert!(n_open >= 5 && n_guarded >= 20, "{n_open} {n_guarded}");
    let head = send(&api, "HEAD", "/v1/cache/k", &[("x-api-key", READ)]).await?;
    assert_ne!(head.status(), StatusCode::FORBIDDEN);
    let bearer = format!("Bearer {WRITE}");
    let written = send(&api, "POST", "/v1/cache/k", &[("authorization", &bearer)]).await?;
    assert_eq!(written.status(), StatusCode::CREATED);
    let refused = send(&api, "POST", "/v1/cache/k", &[("x-api-key", READ)]).await?;
    let error: Value = refused.json().await?;
    assert_eq!(error["code"], "FORBIDDEN");
    assert!(error["error"].as_str().unwrap().contains("`write`"));
    Ok(())
}

#[tokio::test]
async fn keys_are_exchanged_while_the_process_runs_and_never_logged() -> Result<()> {
    let (world, api, file) = guarded().await?;
    assert_eq!(status(&api, READ).await?, StatusCode::NOT_FOUND);
    // As a mounted Secret changes: another file takes the place of the link.
    let replace = |text: &str| -> Result<()> {
        let new = file.with_extension("new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(&new, &file)?)
    };
    let newer = "reader-fedcba9876543210";
    replace(&format!("read dashboards {newer}\n"))?;
    eventually("the new key is valid", async || {
        Ok((status(&api, newer).await? == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    assert_eq!(status(&api, READ).await?, StatusCode::UNAUTHORIZED);
    replace("read dashboards broken")?;
    eventually("the broken file is noticed", async || {
        let counted = metric(&api.url, "birbnest_api_keys_not_read_total").await?;
        Ok(counted.values().any(|n| *n > 0.0).then_some(()))
    })
    .await?;
    assert_eq!(status(&api, newer).await?, StatusCode::NOT_FOUND);
    std::fs::remove_file(&file)?;
    replace(&keys())?;
    eventually("it is mended", async || {
        Ok((status(&api, READ).await? == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;
    let log = api.process.log()?;
    assert!(log.contains("the keys from before stay valid"), "{log}");
    for secret in [READ, WRITE, ADMIN, newer, "broken"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
    drop(world);
    Ok(())
}

#[tokio::test]
async fn a_key_has_so_many_requests() -> Result<()> {
    let mut world = World::shared().await?;
    let file = world.env.make_dir()?.join("keys");
    std::fs::write(&file, keys())?;
    world
        .env
        .set("API_KEYS_FILE", file.to_str().context("UTF-8")?)
        .set("API_RATE_LIMIT_REQUESTS", "5")
        .set("API_RATE_LIMIT_DURATION", "1h");
    let api = world.api().await?;
    let number = |answer: &Response, name: &str| -> u64 {
        answer.headers()[name].to_str().unwrap().parse().unwrap()
    };
    for key in [READ, WRITE] {
        for remaining in (0..5).rev() {
            let answer = send(&api, "GET", "/v1/cache/k", &[("x-api-key", key)]).await?;
            assert_eq!(answer.status(), StatusCode::NOT_FOUND);
            assert_eq!(number(&answer, "x-ratelimit-limit"), 5);
            assert_eq!(number(&answer, "x-ratelimit-remaining"), remaining);
            let reset = number(&answer, "x-ratelimit-reset");
            assert!(reset.abs_diff((5 - remaining) * 720) <= 60, "{reset}");
        }
        let refused = send(&api, "GET", "/v1/cache/k", &[("x-api-key", key)]).await?;
        assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(number(&refused, "x-ratelimit-remaining"), 0);
        let wait = number(&refused, "retry-after");
        assert!((600..=720).contains(&wait), "{wait}");
        assert_eq!(refused.json::<Value>().await?["code"], "RATE_LIMITED");
    }
    // Guessing is counted by address, and does not touch the keys.
    let mut seen = Vec::new();
    for n in 0..6 {
        seen.push(
            status(&api, &format!("guess-0123456789abcde{n}"))
                .await?
                .as_u16(),
        );
    }
    assert_eq!(seen, [401, 401, 401, 401, 401, 429]);
    for _ in 0..10 {
        assert_eq!(
            send(&api, "GET", "/livez", &[]).await?.status(),
            StatusCode::OK
        );
    }
    Ok(())
}

#[tokio::test]
async fn without_keys_an_address_has_so_many_requests() -> Result<()> {
    let mut world = World::shared().await?;
    world
        .env
        .set("API_RATE_LIMIT_REQUESTS", "3")
        .set("API_RATE_LIMIT_DURATION", "1h");
    let api = world.api().await?;
    // All of the network that begins with 127 is this machine.
    let ask = async |from: [u8; 4], name: &str, value: &str| -> Result<(u16, String)> {
        let client = Client::builder()
            .local_address(std::net::IpAddr::from(from))
            .build()?;
        let url = format!("{}/v1/cache/k", api.url);
        let answer = client.get(url).header(name, value).send().await?;
        let remaining = answer.headers()["x-ratelimit-remaining"].to_str()?;
        Ok((answer.status().as_u16(), remaining.to_owned()))
    };
    // Nothing that a client says of itself makes it another one.
    let said = [
        ("x-api-key", "one"),
        ("authorization", "Bearer two"),
        ("x-forwarded-for", "10.0.0.3"),
        ("forwarded", "for=10.0.0.4"),
        ("x-real-ip", "10.0.0.5"),
    ];
    for from in [[127, 0, 0, 1], [127, 0, 0, 2]] {
        let mut seen = Vec::new();
        for (name, value) in said {
            seen.push(ask(from, name, value).await?);
        }
        let seen: Vec<_> = seen
            .iter()
            .map(|(status, left)| (*status, &**left))
            .collect();
        let expected = [(404, "2"), (404, "1"), (404, "0"), (429, "0"), (429, "0")];
        assert_eq!(seen, expected, "{from:?}");
    }
    let probe = send(&api, "GET", "/livez", &[]).await?;
    assert_eq!(probe.status(), StatusCode::OK);
    Ok(())
}

#[tokio::test]
async fn browsers_of_known_origins_are_let_in() -> Result<()> {
    let (mut world, closed, _) = guarded().await?;
    let preflight = [
        ("origin", "https://app.example.com"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "x-api-key,if-match"),
    ];
    let answer = send(&closed, "OPTIONS", "/v1/cache/k", &preflight).await?;
    assert!(!answer.headers().contains_key("access-control-allow-origin"));
    world.env = world.env.replica()?;
    world.env.set(
        "API_CORS_ORIGINS",
        "https://app.example.com,http://localhost:3000",
    );
    let api = world.api().await?;
    let answer = send(&api, "OPTIONS", "/v1/cache/k", &preflight).await?;
    assert_eq!(answer.status(), StatusCode::OK);
    let header = |answer: &Response, name: &str| {
        let value = answer.headers().get(name);
        value.map_or_else(String::new, |value| value.to_str().unwrap().to_lowercase())
    };
    assert_eq!(
        header(&answer, "access-control-allow-origin"),
        "https://app.example.com"
    );
    assert!(header(&answer, "access-control-allow-methods").contains("put"));
    assert!(header(&answer, "access-control-allow-headers").contains("if-match"));
    let read = [("origin", "http://localhost:3000"), ("x-api-key", READ)];
    let answer = send(&api, "GET", "/v1/cache/k", &read).await?;
    assert_eq!(
        header(&answer, "access-control-allow-origin"),
        "http://localhost:3000"
    );
    assert!(header(&answer, "access-control-expose-headers").contains("etag"));
    let foreign = [("origin", "https://evil.example.com"), ("x-api-key", READ)];
    let answer = send(&api, "GET", "/v1/cache/k", &foreign).await?;
    assert_eq!(header(&answer, "access-control-allow-origin"), "");
    Ok(())
}
