//! Many requests on one connection: what one client may have under way, and what it may leave untaken.

use std::sync::Mutex;

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Environment;
use bytes::Bytes;
use futures::future::{join_all, try_join_all};
use h2::{
    RecvStream,
    client::{Connection, ResponseFuture, SendRequest},
};
use reqwest::{Method, StatusCode};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

use crate::{
    shown::is_told,
    world::{Api, PATIENCE, World, eventually},
};

/// A connection without TLS, by a client that knows that the server speaks HTTP/2. It takes no more of an answer than its
/// windows of 64 KiB unless it is told to.
struct Http2 {
    url: String,
    client: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
}

impl Http2 {
    async fn to(api: &Api) -> Result<Self> {
        let address = api.url.strip_prefix("http://").context("an address")?;
        let stream = TcpStream::connect(address).await?;
        let (client, connection): (_, Connection<_>) = h2::client::handshake(stream).await?;
        Ok(Self {
            url: api.url.clone(),
            client: client.ready().await?,
            connection: tokio::spawn(connection),
        })
    }

    async fn send(&mut self, method: Method, path: &str, body: &str) -> Result<ResponseFuture> {
        let client = &mut self.client;
        std::future::poll_fn(|context| client.poll_ready(context)).await?;
        let request = http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .body(())?;
        let (answer, mut sending) = client.send_request(request, false)?;
        sending.send_data(Bytes::copy_from_slice(body.as_bytes()), true)?;
        Ok(answer)
    }
}

/// What comes until it ends, or breaks off.
async fn take(mut body: RecvStream) -> Vec<u8> {
    let mut taken = Vec::new();
    while let Some(Ok(part)) = body.data().await {
        let _ = body.flow_control().release_capacity(part.len());
        taken.extend_from_slice(&part);
    }
    taken
}

/// Has an entry `k`, and bytes `b`, of `n_bytes`.
async fn write_large(api: &Api, n_bytes: usize) -> Result<()> {
    let large = "x".repeat(n_bytes);
    api.write("k", &format!("\"{large}\"")).await?;
    api.send(Method::PUT, "/v1/raw/b", Some(format!("\"{large}\"")))
        .await?
        .expect(StatusCode::OK)?;
    Ok(())
}

fn room_of(env: &mut Environment, bodies: &str, patience: &str) {
    env.set("API_MAX_VALUE_BYTES", "1MiB")
        .set("API_MAX_BATCH_BYTES", "1MiB")
        .set("API_MAX_BODIES_BYTES", bodies)
        .set("API_ANSWER_TIMEOUT", patience);
}

#[tokio::test]
async fn answers_that_many_streams_leave_untaken_share_one_room() -> Result<()> {
    const N: usize = 100;
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    room_of(&mut env, "8MiB", "10m");
    let api = Api::start(&env).await?;
    write_large(&api, 900_000).await?;
    let small = api.write("small", "1").await?;
    let mut client = Http2::to(&api).await?;
    let mut answers = Vec::new();
    for n in 0..N {
        let path = ["/v1/cache/k", "/v1/raw/b"][n % 2];
        answers.push(client.send(Method::GET, path, "").await?);
    }
    let heads = try_join_all(answers).await?;
    ensure!(
        client.client.current_max_send_streams() == 128,
        "{} streams",
        client.client.current_max_send_streams()
    );
    let (taken, refused): (Vec<_>, Vec<_>) = heads
        .into_iter()
        .partition(|head| head.status() == StatusCode::OK);
    ensure!((1..10).contains(&taken.len()), "{} have room", taken.len());
    for head in &refused {
        ensure!(
            head.status() == StatusCode::SERVICE_UNAVAILABLE
                && head.headers().contains_key("retry-after"),
            "{head:?}"
        );
    }
    // Writes, and what is small, need none of it.
    api.write("small", "2").await?;
    let answer = api.get("small").await?.expect(StatusCode::OK)?;
    ensure!(answer.version()? > small);
    api.get("k").await?.refused("UNAVAILABLE")?;
    let head = api.ask(Method::HEAD, "k", &[]).await?;
    let length: usize = head
        .expect(StatusCode::OK)?
        .header("content-length")
        .parse()?;
    ensure!(length > 900_000, "{length} bytes");
    // Who takes them has all of them, byte by byte.
    drop(refused);
    let bodies = join_all(taken.into_iter().map(|head| take(head.into_body()))).await;
    for body in bodies {
        ensure!(body.len() > 900_000, "{} bytes", body.len());
    }
    eventually("there is room again", async || {
        Ok((api.get("k").await?.status == StatusCode::OK).then_some(()))
    })
    .await
}

/// HTTP/2 has windows of its own: its client need not leave TCP's closed.
#[tokio::test]
async fn an_http2_client_that_takes_no_answer_loses_its_connection() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    room_of(&mut env, "8MiB", "1s");
    let api = Api::start(&env).await?;
    write_large(&api, 500_000).await?;
    let large = format!(r#"{{"value":"{}"}}"#, "x".repeat(500_000));
    for (method, path, body) in [
        (Method::POST, "/v1/cache/batch/get", r#"{"keys":["k"]}"#),
        (Method::GET, "/v1/cache/k", ""),
        (Method::GET, "/v1/raw/b", ""),
        (Method::PUT, "/v1/cache/k", &large),
        (Method::PATCH, "/v1/cache/k", r#"{"ttl":1000}"#),
        (Method::GET, "/docs/swagger-ui-bundle.js", ""),
    ] {
        let mut client = Http2::to(&api).await?;
        let answer = client.send(method.clone(), path, body).await?.await?;
        ensure!(answer.status() == StatusCode::OK, "{answer:?}");
        let ended = timeout(PATIENCE, &mut client.connection).await;
        ensure!(ended.is_ok(), "{method} {path}: its connection stays");
        let n_bytes = take(answer.into_body()).await.len();
        ensure!(n_bytes < 500_000, "{method} {path}: {n_bytes} bytes");
    }
    Ok(())
}

/// Lookups that are under way are bounded as well, by whichever requests they were begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_lookups_than_allowed_are_refused_and_counted() -> Result<()> {
    const STREAMS: usize = 128;
    const CLIENTS: usize = 4096 / STREAMS + 1;
    let world = World::shared().await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link)
        .set("POSTGRES_TIMEOUT", "10m")
        .set("API_REQUEST_TIMEOUT", "10m")
        .set("API_MAX_CONCURRENCY", "10000");
    let api = Api::start(&env).await?;
    link.stall();
    let (mut clients, mut answers) = (Vec::new(), Vec::new());
    for n in 0..CLIENTS {
        let mut client = Http2::to(&api).await?;
        for m in 0..STREAMS {
            let path = format!("/v1/cache/never-{n}-{m}");
            answers.push(client.send(Method::GET, &path, "").await?);
        }
        clients.push(client);
    }
    eventually("some are refused", async || {
        let errors = api.metric("birbnest_errors_total").await?;
        let is_shed = |labels: &String| labels.contains("lookup_shed");
        Ok(errors.keys().any(is_shed).then_some(()))
    })
    .await?;
    is_told(&api.process, "too many lookups are under way").await?;
    link.resume();
    let heads = try_join_all(answers).await?;
    let n_with = |status| heads.iter().filter(|head| head.status() == status).count();
    let n_refused = n_with(StatusCode::SERVICE_UNAVAILABLE);
    let n_missing = n_with(StatusCode::NOT_FOUND);
    ensure!(
        n_refused > 0 && n_refused <= STREAMS && n_refused + n_missing == heads.len(),
        "{n_refused} refused, {n_missing} missing"
    );
    api.get("never").await?.expect(StatusCode::NOT_FOUND)?;
    Ok(())
}

/// A key that is looked up has a token in Redis: these are counted while PostgreSQL keeps all lookups waiting. Batches that are in
/// Redis do not wait for them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_batches_that_are_read_at_once_are_bounded() -> Result<()> {
    const KEYS: usize = 32;
    const PARTS: usize = 32;
    let world = World::shared().await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link)
        .set("POSTGRES_TIMEOUT", "10m")
        .set("API_REQUEST_TIMEOUT", "10m");
    let api = Api::start(&env).await?;
    let hits: Vec<String> = (0..2 * KEYS).map(|n| format!("hit-{n}")).collect();
    for key in &hits {
        api.write(key, "1").await?;
    }
    link.stall();
    let mut client = Http2::to(&api).await?;
    let mut answers = Vec::new();
    for n in 0..2 * PARTS {
        let keys: Vec<String> = (0..KEYS).map(|m| format!("never-{n}-{m}")).collect();
        let body = serde_json::json!({ "keys": keys }).to_string();
        let path = "/v1/cache/batch/get";
        answers.push(client.send(Method::POST, path, &body).await?);
    }
    let n_tokens = async || {
        let n: usize = redis::cmd("DBSIZE")
            .query_async(&mut world.redis().await?)
            .await?;
        anyhow::Ok(n)
    };
    // The most that were seen, and for how many looks there were no more.
    let seen = Mutex::new((0, 0));
    let most = eventually("lookups wait, and no more come", async || {
        let n = n_tokens().await?;
        let mut seen = seen.lock().unwrap();
        *seen = match *seen {
            (most, n_looks) if n <= most => (most, n_looks + 1),
            _ => (n, 0),
        };
        let (most, n_looks) = *seen;
        Ok((most > hits.len() + PARTS * KEYS / 2 && n_looks >= 25).then_some(most))
    })
    .await?;
    // What says whose database this is counts, too.
    ensure!(most <= PARTS * KEYS + 1 + hits.len(), "{most} keys");
    let body = serde_json::json!({ "keys": hits }).to_string();
    let read = api.send(Method::POST, "/v1/cache/batch/get", Some(body));
    let read = read.await?.expect(StatusCode::OK)?.json()?;
    ensure!(
        read["entries"].as_object().map(serde_json::Map::len) == Some(hits.len()),
        "{read}"
    );
    link.resume();
    for answer in answers {
        let answer = answer.await?;
        ensure!(answer.status() == StatusCode::OK, "{answer:?}");
        let body: serde_json::Value = serde_json::from_slice(&take(answer.into_body()).await)?;
        ensure!(
            body["missing"].as_array().map(Vec::len) == Some(KEYS),
            "{body}"
        );
    }
    Ok(())
}
