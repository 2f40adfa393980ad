//! Whatever clients send, the answer is a 4xx with the error's body, and nothing is written.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::world::{Api, PATIENCE, World};

const JSON: &str = "Content-Type: application/json\r\n";

struct Raw {
    status: u16,
    head: String,
    body: String,
}

/// Sends bytes as they are and reads until the server closes.
async fn raw(api: &Api, bytes: &[u8]) -> Result<Raw> {
    let address = api.url.trim_start_matches("http://");
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(bytes).await?;
    let mut answer = Vec::new();
    timeout(PATIENCE, connection.read_to_end(&mut answer))
        .await
        .context("no answer")??;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text
        .split_once("\r\n\r\n")
        .with_context(|| format!("no head in {text:?}"))?;
    let status = head.split(' ').nth(1).context("a status")?.parse()?;
    Ok(Raw {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    })
}

async fn request(api: &Api, method: &str, path: &str, headers: &str, body: &[u8]) -> Result<Raw> {
    let mut bytes =
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}")
            .into_bytes();
    if !body.is_empty() || method == "POST" {
        bytes.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    raw(api, &bytes).await
}

/// A request, and what must be answered.
struct Case<'a> {
    method: &'a str,
    path: &'a str,
    headers: &'a str,
    body: &'a [u8],
    status: u16,
    code: &'a str,
    field: Option<&'a str>,
}

impl<'a> Case<'a> {
    fn new(method: &'a str, path: &'a str, status: u16, code: &'a str) -> Self {
        Self {
            method,
            path,
            headers: "",
            body: b"",
            status,
            code,
            field: None,
        }
    }

    /// A POST to a key, or to the batch, that must be answered with 400.
    fn body(path: &'a str, body: &'a [u8], field: Option<&'a str>) -> Self {
        Self {
            headers: JSON,
            body,
            field,
            ..Self::new("POST", path, 400, "INVALID_REQUEST")
        }
    }

    /// A key that must be answered with 400.
    fn key(method: &'a str, path: &'a str) -> Self {
        Self {
            field: Some("key"),
            ..Self::new(method, path, 400, "INVALID_REQUEST")
        }
    }

    async fn check(&self, api: &Api) -> Result<()> {
        let answer = request(api, self.method, self.path, self.headers, self.body).await?;
        let shown = String::from_utf8_lossy(&self.body[..self.body.len().min(80)]).into_owned();
        let what = format!("{} {} {:?} {shown:?}", self.method, self.path, self.headers);
        assert_eq!(answer.status, self.status, "{what}: {}", answer.body);
        let error: Value = serde_json::from_str(&answer.body)
            .with_context(|| format!("{what}: {}", answer.body))?;
        assert_eq!(error["code"], self.code, "{what}");
        assert_eq!(error["field"].as_str(), self.field, "{what}: {error}");
        assert!(
            error["error"].as_str().is_some_and(|text| text.len() > 10),
            "{what}: {error}"
        );
        let id = error["request_id"].as_str().context("a request id")?;
        assert!(
            answer
                .head
                .contains(&format!("x-request-id: {}", id.to_lowercase())),
            "{what}: {}",
            answer.head
        );
        assert!(
            answer.head.contains("content-type: application/json"),
            "{what}: {}",
            answer.head
        );
        Ok(())
    }
}

#[tokio::test]
async fn malformed_requests_are_answered_and_write_nothing() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_MAX_VALUE_BYTES", "1000")
        .set("API_MAX_BATCH", "3")
        .set("API_MAX_BATCH_BYTES", "500")
        .set("API_MAX_TTL", "1h");
    let api = Api::start(&env).await?;
    let long = "x".repeat(513);
    let big = format!("{{\"value\":\"{}\"}}", "x".repeat(1000));
    let huge = vec![b' '; 70_000];
    let batch_huge = format!("{{\"keys\":[\"{}\"]}}", "x".repeat(600));
    let text = "Content-Type: text/plain\r\n";
    let unsupported = Case::new("POST", "/v1/cache/a", 415, "UNSUPPORTED_MEDIA_TYPE");
    let too_large = |path, body| Case {
        headers: JSON,
        body,
        ..Case::new("POST", path, 413, "TOO_LARGE")
    };
    let (k, batch) = ("/v1/cache/a", "/v1/cache/batch/get");
    let long = format!("/v1/cache/{long}");
    let too_long = |method| Case {
        status: 414,
        ..Case::key(method, &long)
    };
    let conditional = |method, headers, field| Case {
        headers,
        field: Some(field),
        ..Case::new(method, k, 400, "INVALID_REQUEST")
    };
    let cases = [
        Case::new("GET", "/nonsense", 404, "NOT_FOUND"),
        Case::new("GET", "/v1/cache/", 404, "NOT_FOUND"),
        Case::new("GET", "/v1/cache/a/b", 404, "NOT_FOUND"),
        Case::new("OPTIONS", k, 405, "METHOD_NOT_ALLOWED"),
        Case::new("DELETE", batch, 405, "METHOD_NOT_ALLOWED"),
        Case {
            headers: "Accept: text/html\r\n",
            ..Case::new("GET", k, 406, "NOT_ACCEPTABLE")
        },
        Case {
            headers: text,
            body: b"{\"value\":1}",
            ..unsupported
        },
        Case {
            body: b"{\"value\":1}",
            ..unsupported
        },
        Case::body(k, b"", None),
        Case::body(k, b"{", None),
        Case::body(k, b"[]", None),
        Case::body(k, b"\xff\xfe{}", None),
        Case::body(k, b"{}", Some("value")),
        Case::body(k, b"{\"value\":1,\"tll\":5}", Some("tll")),
        Case::body(k, b"{\"value\":1,\"ttl\":-5}", Some("ttl")),
        Case::body(k, b"{\"value\":1,\"ttl\":0}", Some("ttl")),
        Case::body(k, b"{\"value\":1,\"ttl\":3601}", Some("ttl")),
        Case::body(k, b"{\"value\":1,\"ttl\":\"5\"}", Some("ttl")),
        Case {
            method: "PUT",
            ..Case::body(k, b"{\"value\":1,\"metadata\":7}", Some("metadata"))
        },
        too_large(k, big.as_bytes()),
        too_large(k, &huge),
        too_large(batch, batch_huge.as_bytes()),
        conditional("PUT", "If-Match: 17\r\n", "if-match"),
        conditional("PUT", "If-Match: W/\"17\"\r\n", "if-match"),
        conditional("POST", "If-Match: *\r\nIf-Match: \"17\"\r\n", "if-match"),
        conditional("POST", "If-None-Match: \"17\r\n", "if-none-match"),
        conditional("DELETE", "If-Match: \r\n", "if-match"),
        conditional("DELETE", "If-None-Match: \"1\" \"2\"\r\n", "if-none-match"),
        conditional("GET", "If-None-Match: 17\r\n", "if-none-match"),
        conditional("PUT", "Birb-Durability: disk\r\n", "birb-durability"),
        conditional(
            "DELETE",
            "Birb-Durability: log\r\nBirb-Durability: database\r\n",
            "birb-durability",
        ),
        Case::key("GET", "/v1/cache/a%00b"),
        Case::key("GET", "/v1/cache/a%0ab"),
        Case::key("DELETE", "/v1/cache/a%7fb"),
        Case::key("GET", "/v1/cache/%zz"),
        Case::key("GET", "/v1/cache/a%"),
        Case {
            headers: JSON,
            body: b"{\"value\":1}",
            ..Case::key("POST", "/v1/cache/%ff%fe")
        },
        too_long("GET"),
        Case {
            headers: JSON,
            body: b"{\"value\":1}",
            ..too_long("POST")
        },
        Case::body(batch, b"{}", Some("keys")),
        Case::body(batch, b"{\"keys\":[1]}", Some("keys")),
        Case::body(batch, b"{\"keys\":[\"a\",\"\"]}", Some("keys[1]")),
        Case::body(batch, b"{\"keys\":[\"a\",\"b\",\"c\",\"d\"]}", Some("keys")),
    ];
    let (_, before) = world.log_depth().await?;
    for case in &cases {
        case.check(&api).await?;
    }
    // A client's own id comes back.
    let answer = request(&api, "GET", "/nonsense", "X-Request-Id: mine-7\r\n", b"").await?;
    assert!(
        answer.head.contains("x-request-id: mine-7")
            && answer.body.contains("\"request_id\":\"mine-7\"")
    );
    // What is no HTTP at all gets a 400 or nothing, and the next one is served.
    let _ = raw(&api, b"\x16\x03\x01 not http\r\n\r\n").await;
    let bad = raw(&api, b"GET /v1/cache/a b HTTP/1.1\r\n\r\n").await?;
    assert_eq!(bad.status, 400);
    assert_eq!(world.log_depth().await?.1, before, "something was written");
    api.write("a", "1").await?;
    Ok(())
}

#[tokio::test]
async fn slow_and_broken_clients_are_let_go() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_HEADER_TIMEOUT", "300ms")
        .set("API_KEEPALIVE_TIMEOUT", "300ms")
        .set("API_BODY_TIMEOUT", "300ms");
    let api = Api::start(&env).await?;
    let (_, before) = world.log_depth().await?;
    // A head that never ends: the connection is closed.
    let address = api.url.trim_start_matches("http://").to_owned();
    let mut slow = TcpStream::connect(&address).await?;
    slow.write_all(b"GET /v1/cache/a HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        .await?;
    let mut rest = Vec::new();
    timeout(Duration::from_secs(10), slow.read_to_end(&mut rest))
        .await
        .context("held for ever")??;
    // One that is served, and asks for nothing more: `raw` comes back once the connection is closed.
    let idle = raw(&api, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await?;
    assert_eq!(idle.status, 200);
    // A body that never ends: 408.
    let head = format!(
        "POST /v1/cache/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}Content-Length: 100\r\n\r\n{{\"value\""
    );
    let answer = raw(&api, head.as_bytes()).await?;
    assert_eq!(answer.status, 408, "{}", answer.body);
    assert!(
        answer.body.contains("\"code\":\"TIMEOUT\""),
        "{}",
        answer.body
    );
    // One that goes away in the middle.
    let mut broken = TcpStream::connect(&address).await?;
    broken.write_all(head.as_bytes()).await?;
    drop(broken);
    // A chunked body that lies about its chunks.
    let lies = format!(
        "POST /v1/cache/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}Transfer-Encoding: chunked\r\n\r\nzz\r\n{{}}\r\n0\r\n\r\n"
    );
    assert_eq!(raw(&api, lies.as_bytes()).await?.status, 400);
    assert_eq!(world.log_depth().await?.1, before, "something was written");
    api.write("a", "1").await?;
    Ok(())
}

#[tokio::test]
async fn a_head_that_is_too_large_is_refused() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let fields: String = (0..200).map(|n| format!("x-{n}: 1\r\n")).collect();
    let many = request(&api, "GET", "/v1/cache/a", &fields, b"").await?;
    assert_eq!(many.status, 431);
    // Most of it is never read, so that the answer may be lost with the connection; the connection is.
    let mut connection = TcpStream::connect(api.url.trim_start_matches("http://")).await?;
    let long = format!(
        "GET /v1/cache/a HTTP/1.1\r\nX-Long: {}",
        "x".repeat(8 << 20)
    );
    let cut = async {
        let _ = connection.write_all(long.as_bytes()).await;
        let _ = connection.read_to_end(&mut Vec::new()).await;
    };
    // Sooner than API_HEADER_TIMEOUT would do it.
    timeout(Duration::from_secs(9), cut).await.context("held")?;
    api.write("a", "1").await?;
    Ok(())
}

#[tokio::test]
async fn the_plain_routes_answer() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    let admin = birb_nest_stack::Port::reserve()?;
    env.set("API_ADMIN_PORT", admin.number().to_string());
    let api = Api::start(&env).await?;
    api.write("k", "1").await?;
    api.read("k").await?;
    api.read("none").await?;
    let root = api.send(reqwest::Method::GET, "/", None).await?.json()?;
    assert_eq!(root["service"], "birb-nest");
    assert!(
        root["endpoints"]
            .as_array()
            .is_some_and(|list| list.len() >= 10)
    );
    let health = api
        .send(reqwest::Method::GET, "/health", None)
        .await?
        .json()?;
    assert_eq!(health["status"], "healthy");
    assert_eq!(
        health["checks"],
        serde_json::json!({"database": "ok", "redis": "ok", "nats": "ok"})
    );
    for url in [
        api.url.clone(),
        format!("http://127.0.0.1:{}", admin.number()),
    ] {
        for path in ["/livez", "/readyz", "/metrics"] {
            assert_eq!(
                reqwest::get(format!("{url}{path}")).await?.status(),
                200,
                "{url}{path}"
            );
        }
    }
    assert_eq!(
        reqwest::get(format!("http://127.0.0.1:{}/v1/cache/k", admin.number()))
            .await?
            .status(),
        404
    );
    let summary = reqwest::Client::new()
        .get(format!("{}/metrics", api.url))
        .header("accept", "application/json")
        .send()
        .await?
        .text()
        .await?;
    let summary: Value = serde_json::from_str(&summary)?;
    assert_eq!(
        (
            summary["cache_hits"].as_u64(),
            summary["cache_misses"].as_u64()
        ),
        (Some(1), Some(1)),
        "{summary}"
    );
    assert!(
        summary["total_requests"].as_u64().is_some_and(|n| n >= 5),
        "{summary}"
    );
    assert!(
        summary["average_latency_ms"]
            .as_f64()
            .is_some_and(|ms| ms > 0.0),
        "{summary}"
    );
    Ok(())
}
