//! What is bounded is refused beyond its bound, cleanly and at once.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use futures::{
    StreamExt, TryStreamExt,
    future::{join_all, try_join_all},
    stream,
};
use reqwest::{Method, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use crate::{
    shown::{counted, metric},
    world::{Api, PATIENCE, World, eventually},
};

#[tokio::test]
async fn a_full_log_refuses_and_drops_nothing() -> Result<()> {
    let world =
        World::shared_with(&[("NATS_STREAM_MAX_BYTES", "256KiB"), ("NATS_SHARDS", "1")]).await?;
    let api = world.api().await?;
    let value = format!("\"{}\"", "x".repeat(20_000));
    let mut written = std::collections::HashMap::new();
    let full = loop {
        let key = format!("k{}", written.len());
        let answer = api.post(&key, format!("{{\"value\":{value}}}")).await?;
        if answer.status != StatusCode::CREATED {
            break answer;
        }
        written.insert(key, answer.version()?);
        ensure!(written.len() < 100, "the log is never full");
    };
    full.refused("UNAVAILABLE")?;
    assert_eq!(full.header("retry-after"), "5");
    let again = api.post("again", format!("{{\"value\":{value}}}")).await?;
    again.refused("UNAVAILABLE")?;
    let n_full = counted(&api.url, "birbnest_errors_total", "log_full").await?;
    ensure!(n_full == 2.0, "{n_full} are counted");
    let warning = "refusing writes: the log of a shard is full";
    let n_warnings = api.process.log()?.matches(warning).count();
    ensure!(n_warnings == 1, "{n_warnings} lines");
    // A key that is in the log makes room for its own next version.
    written.insert("k0".to_owned(), api.write("k0", "\"smaller\"").await?);
    let _worker = world.eager_worker().await?;
    world.all_stored(written.iter()).await?;
    eventually("writes are taken again", async || {
        let answer = api.post("later", format!("{{\"value\":{value}}}")).await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await?;
    for (key, version) in &written {
        assert_eq!(
            api.get(key).await?.expect(StatusCode::OK)?.version()?,
            *version
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_requests_than_allowed_are_refused_at_once() -> Result<()> {
    let world = World::shared().await?;
    let nats = world.stack.nats.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&nats)
        .set("API_MAX_CONCURRENCY", "2")
        .set("NATS_PUBLISH_TIMEOUT", "10s");
    let api = Arc::new(Api::start(&env).await?);
    api.write("k", "1").await?;
    nats.stall();
    let held: Vec<_> = (0..2)
        .map(|n| {
            let api = api.clone();
            tokio::spawn(async move { api.post(&format!("held{n}"), "{\"value\":1}").await })
        })
        .collect();
    for key in ["held0", "held1"] {
        eventually("the write is under way", async || {
            Ok(world
                .in_redis(key)
                .await?
                .filter(|value| value.starts_with('T')))
        })
        .await?;
    }
    for _ in 0..3 {
        api.get("k").await?.refused("UNAVAILABLE")?;
    }
    let n_refused = counted(&api.url, "birbnest_api_requests_refused_total", "").await?;
    ensure!(n_refused == 3.0, "{n_refused} are counted");
    let warning = "refusing requests: API_MAX_CONCURRENCY are under way";
    let n_warnings = api.process.log()?.matches(warning).count();
    ensure!(n_warnings == 1, "{n_warnings} lines");
    // Probes are no requests.
    api.send(Method::GET, "/livez", None)
        .await?
        .expect(StatusCode::OK)?;
    nats.resume();
    for write in held {
        write.await??.expect(StatusCode::CREATED)?;
    }
    api.write("k", "2").await?;
    Ok(())
}

/// A client that sends all of a body but its last byte.
async fn hold_a_body(api: &Api, n_bytes: usize) -> Result<TcpStream> {
    let address = api.url.strip_prefix("http://").context("an address")?;
    let mut connection = TcpStream::connect(address).await?;
    let head = format!(
        "POST /v1/cache/held HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {n_bytes}\r\n\r\n{{\"value\":\""
    );
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(&vec![b'x'; n_bytes - 11]).await?;
    Ok(connection)
}

#[tokio::test]
async fn bodies_that_have_no_room_together_are_refused_and_the_room_comes_back() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    // Room for one largest body and some.
    env.set("API_MAX_VALUE_BYTES", "1MiB")
        .set("API_MAX_BATCH_BYTES", "1MiB")
        .set("API_MAX_BODIES_BYTES", "2MiB")
        .set("API_BODY_TIMEOUT", "60s");
    let api = Api::start(&env).await?;
    let body = format!("{{\"value\":\"{}\"}}", "x".repeat(400_000));
    api.post("k", body.clone())
        .await?
        .expect(StatusCode::CREATED)?;
    let held = Mutex::new(Vec::new());
    eventually("the room is taken", async || {
        // Some of them may be refused themselves.
        let one_more = hold_a_body(&api, 1_000_000).await?;
        held.lock().unwrap().push(one_more);
        let answer = api.post("k", body.clone()).await?;
        match answer.status {
            StatusCode::CREATED => Ok(None),
            _ => answer.refused("UNAVAILABLE").map(Some),
        }
    })
    .await?;
    // What has no body needs no room.
    api.get("k").await?.expect(StatusCode::OK)?;
    drop(held);
    eventually("there is room again", async || {
        let answer = api.post("k", body.clone()).await?;
        Ok((answer.status == StatusCode::CREATED).then_some(()))
    })
    .await
}

/// A client that asks for all of `keys` and takes nothing of the answer.
async fn ask_and_take_nothing(api: &Api, keys: &[String]) -> Result<TcpStream> {
    let address = api.url.strip_prefix("http://").context("an address")?;
    let socket = TcpSocket::new_v4()?;
    // So that little of the answer is on its way.
    socket.set_recv_buffer_size(4096)?;
    let mut connection = socket.connect(address.parse()?).await?;
    let body = serde_json::json!({ "keys": keys }).to_string();
    let head = format!(
        "POST /v1/cache/batch/get HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    connection.write_all(head.as_bytes()).await?;
    Ok(connection)
}

/// They keep no one from writing, others from batch reads only for a while, and then they are cut off.
#[tokio::test]
async fn clients_that_take_no_answer_keep_their_room_for_a_while_only() -> Result<()> {
    const MOST: u64 = 12 << 20;
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_MAX_BATCH_BYTES", "12MiB")
        .set("API_MAX_BODIES_BYTES", "16MiB")
        .set("API_ANSWER_TIMEOUT", "3s");
    let api = Api::start(&env).await?;
    let keys: Vec<String> = (0..10).map(|n| format!("k{n}")).collect();
    for key in &keys {
        api.write(key, &format!("\"{}\"", "x".repeat(1_000_000)))
            .await?;
    }
    let read = async || {
        let body = serde_json::json!({ "keys": keys }).to_string();
        api.send(Method::POST, "/v1/cache/batch/get", Some(body))
            .await
    };
    let clients = Mutex::new(Vec::new());
    eventually("there is no room for another answer", async || {
        let one_more = ask_and_take_nothing(&api, &keys).await?;
        clients.lock().unwrap().push(one_more);
        let answer = read().await?;
        match answer.status {
            StatusCode::OK => Ok(None),
            _ => answer.refused("UNAVAILABLE").map(Some),
        }
    })
    .await?;
    api.write("k", "1").await?;
    assert_eq!(api.read("k").await?.as_deref(), Some("1"));
    // And who takes all of an answer keeps nothing.
    for _ in 0..5 {
        eventually("there is room again", async || {
            Ok((read().await?.status == StatusCode::OK).then_some(()))
        })
        .await?;
    }
    for client in clients.into_inner()? {
        let mut taken = Vec::new();
        // It is reset, or ends early.
        let _ = client.take(MOST).read_to_end(&mut taken).await;
        ensure!(taken.len() < 10_000_000, "{} bytes", taken.len());
    }
    Ok(())
}

#[tokio::test]
async fn more_connections_than_allowed_are_closed_as_they_come() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_MAX_CONNECTIONS", "3")
        .set("API_HEADER_TIMEOUT", "10m");
    let api = Api::start(&env).await?;
    let address = api.url.strip_prefix("http://").context("an address")?;
    let open = Mutex::new(Vec::new());
    eventually("one is closed", async || {
        let mut connection = TcpStream::connect(address).await?;
        // Those that are kept are not answered.
        let mut byte = [0];
        let ended = timeout(Duration::from_millis(100), connection.read(&mut byte)).await;
        open.lock().unwrap().push(connection);
        Ok(ended.ok().map(|_| ()))
    })
    .await?;
    // One may have been closed later than it was looked at.
    let mut open = open.into_inner().unwrap();
    let (n_open, n_closed) = (open.len(), open.len().saturating_sub(3));
    let ends = stream::iter(&mut open)
        .map(async |connection| connection.read(&mut [0]).await)
        .buffer_unordered(n_open);
    let closed = timeout(PATIENCE, ends.take(n_closed).count()).await;
    ensure!(closed.is_ok(), "more than three of {n_open} are kept");
    for _ in 0..3 {
        let mut byte = [0];
        let mut one_more = TcpStream::connect(address).await?;
        let closed = timeout(PATIENCE, one_more.read(&mut byte)).await;
        ensure!(closed.is_ok(), "another one is kept");
    }
    drop(open);
    eventually("there is room again", async || {
        Ok(api.get("k").await.ok().map(|_| ()))
    })
    .await?;
    let refused = api.metric("birbnest_api_connections_refused_total").await?;
    let n_refused = refused.values().sum::<f64>();
    ensure!(n_refused >= 4.0, "{refused:?}");
    let warning = "closing connections as they come: API_MAX_CONNECTIONS are open";
    let n_warnings = api.process.log()?.matches(warning).count();
    ensure!(
        n_warnings >= 1 && (n_warnings as f64) < n_refused,
        "{n_warnings} lines for {n_refused}"
    );
    Ok(())
}

/// Who connects to it and says nothing keeps no probe from it for long, and many take no more than their room.
#[tokio::test]
async fn a_workers_admin_port_is_bounded_too() -> Result<()> {
    const N: usize = 400;
    let world = World::shared().await?;
    let worker = world.worker().await?;
    let url = world.env.worker_url();
    let address = url.strip_prefix("http://").context("an address")?;
    let mut silent = Vec::new();
    for _ in 0..N {
        silent.push(TcpStream::connect(address).await?);
    }
    let ends = silent.iter_mut().map(async |connection| {
        let mut byte = [0];
        timeout(PATIENCE, connection.read(&mut byte)).await.is_ok()
    });
    let n_ended = join_all(ends).await.into_iter().filter(|ended| *ended);
    let n_ended = n_ended.count();
    ensure!(n_ended == N, "{n_ended} were closed");
    let n_refused = eventually("it answers", async || {
        let name = "birbnest_worker_connections_refused_total";
        let refused = metric(&url, name).await.ok();
        Ok(refused.map(|refused| refused.values().sum::<f64>()))
    })
    .await?;
    ensure!(n_refused >= 2.0, "{n_refused} were refused");
    let warning = "closing connections as they come: all that WORKER_ADMIN_PORT has room for";
    let n_warnings = worker.log()?.matches(warning).count();
    ensure!(
        n_warnings >= 1 && (n_warnings as f64) < n_refused,
        "{n_warnings} lines for {n_refused}"
    );
    Ok(())
}

/// A server whose lookups wait for each other is slow, not down: what needs none of them goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lookups_that_take_all_connections_do_not_make_postgresql_seem_down() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("POSTGRES_TIMEOUT", "2s");
    let api = Api::start(&env).await?;
    let (here, lock) = (
        world.sql("select current_database()").await?,
        "begin; lock table cache_entries in access exclusive mode; select pg_sleep(60)",
    );
    let (locking, asking) = (world.sql(lock), async {
        eventually("the lock is held", async || {
            let held = "select count(*) from pg_locks where mode = 'AccessExclusiveLock' and relation = 'cache_entries'::regclass and granted";
            Ok((world.sql(held).await?.trim() == "1").then_some(()))
        })
        .await?;
        // Each takes POSTGRES_TIMEOUT, as long as it is between two looks of the supervisor.
        for round in 0..3 {
            let keys: Vec<String> = (0..40).map(|n| format!("never-{round}-{n}")).collect();
            stream::iter(&keys)
                .map(|key| async { api.get(key).await?.refused("UNAVAILABLE") })
                .buffer_unordered(40)
                .try_collect::<()>()
                .await?;
        }
        let log = api.process.log()?;
        ensure!(!log.contains("lost PostgreSQL"), "{log}");
        let end = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where query like '%pg_sleep(60)' and datname = '{}'
             and pid <> pg_backend_pid()",
            here.trim()
        );
        world.sql(&end).await.map(drop)
    });
    let (locked, asked) = tokio::join!(locking, asking);
    asked?;
    ensure!(locked.is_err(), "{locked:?}");
    Ok(())
}

/// Reads say that they took too long. Writes do not say more than they know: each may happen yet, and here one does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_takes_longer_than_a_request_may_is_told_apart() -> Result<()> {
    let world = World::shared().await?;
    let (nats, postgres) = (world.stack.nats.proxy()?, world.stack.postgres.proxy()?);
    let mut env = world.env.replica()?;
    env.through(&nats)
        .through(&postgres)
        .set("NATS_PUBLISH_TIMEOUT", "10m")
        .set("POSTGRES_TIMEOUT", "10m")
        .set("API_REQUEST_TIMEOUT", "1s");
    let api = Api::start(&env).await?;
    let keys = ["post", "put", "patch", "delete", "raw", "batch"];
    for key in keys {
        api.write(key, "\"old\"").await?;
    }
    let ask = async |&(method, path, body): &(&str, &str, &str)| {
        let body = (!body.is_empty()).then(|| body.to_owned());
        let answer = api.send(method.parse()?, path, body).await?;
        anyhow::Ok((format!("{method} {path}"), answer))
    };

    postgres.stall();
    let reads = [
        ("GET", "/v1/cache/never-1", ""),
        ("GET", "/v1/raw/never-2", ""),
        ("POST", "/v1/cache/batch/get", r#"{"keys":["never-3"]}"#),
        ("GET", "/v1/cache?prefix=never", ""),
        ("GET", "/v1/dead-letters", ""),
    ];
    for (what, late) in try_join_all(reads.iter().map(&ask)).await? {
        ensure!(
            late.status == StatusCode::GATEWAY_TIMEOUT,
            "{what}: {late:?}"
        );
        ensure!(late.json()?["code"] == "TIMEOUT", "{what}: {late:?}");
    }
    let head = api.ask(Method::HEAD, "never-4", &[]).await?;
    head.expect(StatusCode::GATEWAY_TIMEOUT)?;
    let (_, unknown) = ask(&("DELETE", "/v1/cache?prefix=p", "")).await?;
    unknown.refused("UNKNOWN_OUTCOME")?;
    postgres.resume();
    eventually("PostgreSQL answers", async || {
        Ok((api.get("never-1").await?.status == StatusCode::NOT_FOUND).then_some(()))
    })
    .await?;

    nats.stall();
    let new = r#"{"value":"new"}"#;
    let writes = [
        ("POST", "/v1/cache/post", new),
        ("PUT", "/v1/cache/put", new),
        ("PATCH", "/v1/cache/patch", r#"{"ttl":1000}"#),
        ("DELETE", "/v1/cache/delete", ""),
        ("PUT", "/v1/raw/raw", r#""new""#),
        (
            "POST",
            "/v1/cache/batch/set",
            r#"{"entries":[{"key":"batch","value":"new"}]}"#,
        ),
        ("POST", "/v1/cache/batch/delete", r#"{"keys":["batch"]}"#),
    ];
    let answers = try_join_all(writes.iter().map(&ask)).await?;
    nats.resume();
    for (what, answer) in answers {
        answer.refused("UNKNOWN_OUTCOME").context(what)?;
    }
    // It was on its way.
    eventually("the write is in the log", async || {
        let fresh = [("cache-control", "no-cache")];
        let read = api.ask(Method::GET, "post", &fresh).await?;
        Ok((read.status == StatusCode::OK && read.json()?["value"] == "new").then_some(()))
    })
    .await?;
    let kept = world.in_redis("post").await?.unwrap_or_default();
    ensure!(!kept.contains("old"), "{kept}");
    Ok(())
}
