//! One server at a time: start, kill, pause, snapshot.

use std::os::unix::fs::PermissionsExt;

use anyhow::Result;
use birb_nest_stack::{NatsOptions, Options, Ports, RedisOptions, Stack, shared};

use crate::clients::{RedisConnection, nats, redis};

const STREAM: &str = r#"{"name":"S","subjects":["s"],"storage":"file","retention":"limits","max_msgs":-1,"max_bytes":-1,"max_age":0,"max_consumers":-1,"num_replicas":1,"discard":"old"}"#;

/// Writes one more thing to each server that keeps data.
async fn write(stack: &Stack, number: u32) -> Result<()> {
    stack
        .psql("birb_nest", "create table if not exists t (n int)")
        .await?;
    stack
        .psql("birb_nest", &format!("insert into t values ({number})"))
        .await?;
    nats(stack.nats.port(), "$JS.API.STREAM.CREATE.S", STREAM)?;
    let ack = nats(stack.nats.port(), "s", &number.to_string())?;
    assert!(ack.contains("\"seq\""), "{ack}");
    redis(stack.redis.port(), &format!("SET n {number}"))?;
    Ok(())
}

/// The rows in PostgreSQL, and how many messages the stream holds.
async fn kept(stack: &Stack) -> Result<(String, String)> {
    let rows = stack
        .psql(
            "birb_nest",
            "select string_agg(n::text, ',' order by n) from t",
        )
        .await?;
    let info = nats(stack.nats.port(), "$JS.API.STREAM.INFO.S", "")?;
    let messages = info
        .split_once("\"messages\":")
        .map(|found| found.1)
        .unwrap_or_default();
    Ok((
        rows,
        messages.chars().take_while(char::is_ascii_digit).collect(),
    ))
}

#[tokio::test]
async fn data_survives_kill_and_start_where_it_is_meant_to() -> Result<()> {
    let stack = Stack::fresh().await?;
    write(&stack, 1).await?;
    let ports = stack.servers().map(|server| server.port());
    for server in stack.servers() {
        server.kill().await?;
        assert_eq!(server.pid(), None);
        server.start().await?;
    }
    assert_eq!(stack.servers().map(|server| server.port()), ports);
    assert_eq!(kept(&stack).await?, ("1".into(), "1".into()));
    assert_eq!(redis(stack.redis.port(), "GET n")?, "$-1");

    write(&stack, 2).await?;
    for server in stack.servers() {
        server.restart().await?;
    }
    assert_eq!(kept(&stack).await?, ("1,2".into(), "2".into()));
    Ok(())
}

#[tokio::test]
async fn snapshots_bring_old_data_back() -> Result<()> {
    let stack = Stack::fresh().await?;
    write(&stack, 1).await?;
    let mut snapshots = Vec::new();
    for server in stack.servers() {
        snapshots.push(server.snapshot().await?);
    }
    write(&stack, 2).await?;
    for (server, snapshot) in stack.servers().into_iter().zip(&snapshots) {
        let refused = server.restore(snapshot).await.unwrap_err().to_string();
        assert!(refused.contains("stop or kill it"), "{refused}");
        server.kill().await?;
        server.restore(snapshot).await?;
        server.start().await?;
    }
    assert_eq!(kept(&stack).await?, ("1".into(), "1".into()));
    assert_eq!(redis(stack.redis.port(), "GET n")?, "1");

    // What a server came back with it can lose again.
    assert!(stack.redis.lose_data().await.is_err(), "it runs");
    stack.redis.kill().await?;
    stack.redis.lose_data().await?;
    stack.redis.start().await?;
    assert_eq!(redis(stack.redis.port(), "GET n")?, "$-1");

    // The copy of a stopped server works as well.
    stack.postgres.stop().await?;
    let stopped = stack.postgres.snapshot().await?;
    stack.postgres.start().await?;
    write(&stack, 3).await?;
    stack.postgres.stop().await?;
    stack.postgres.restore(&stopped).await?;
    stack.postgres.start().await?;
    assert_eq!(kept(&stack).await?.0, "1");
    Ok(())
}

/// A copy has what was written before it, also while Redis is writing an older one by itself.
#[tokio::test]
async fn a_snapshot_waits_for_one_that_is_under_way() -> Result<()> {
    let stack = Stack::fresh().await?;
    let port = stack.redis.port();
    redis(port, "SET n 1")?;
    // Microseconds for each key.
    redis(port, "CONFIG SET rdb-key-save-delay 500000")?;
    redis(port, "BGSAVE")?;
    redis(port, "SET n 2")?;
    let copy = stack.redis.snapshot().await?;
    stack.redis.kill().await?;
    stack.redis.restore(&copy).await?;
    stack.redis.start().await?;
    assert_eq!(redis(port, "GET n")?, "2");
    Ok(())
}

#[tokio::test]
async fn paused_server_is_silent_until_resumed() -> Result<()> {
    let stack = Stack::fresh().await?;
    stack.redis.pause().await?;
    let mut connection = RedisConnection::open(stack.redis.port())?;
    connection.send("PING")?;
    assert!(connection.is_silent()?);
    stack.redis.resume().await?;
    assert_eq!(connection.reply()?, "+PONG");

    // A backend that is in the middle of a statement stands still with the rest.
    stack.psql("birb_nest", "create table go ()").await?;
    let sql = "do $$ begin while not exists (select from go) loop perform pg_sleep(0.01); end loop; end $$; select 'done'";
    let mut running = std::pin::pin!(stack.psql("birb_nest", sql));
    let seen = async {
        let it = "select pid from pg_stat_activity where query like 'do $$%'";
        loop {
            let pid = stack.psql("birb_nest", it).await?;
            if !pid.is_empty() {
                return anyhow::Ok(pid);
            }
        }
    };
    let pid = tokio::select! {
        done = &mut running => panic!("the statement cannot be done yet: {done:?}"),
        pid = seen => pid?,
    };
    stack.postgres.pause().await?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    assert!(stat.contains(") T "), "its backend goes on: {stat}");
    stack.postgres.resume().await?;
    let go = stack.psql("birb_nest", "insert into go default values");
    let (done, _) = tokio::try_join!(running, go)?;
    assert!(done.ends_with("done"));

    // Every order of calls ends as its last call says.
    for server in stack.servers() {
        server.pause().await?;
        server.pause().await?;
        server.start().await?;
        server.pause().await?;
        server.stop().await?;
        server.stop().await?;
        server.kill().await?;
        let refused = server.pause().await.unwrap_err().to_string();
        assert!(refused.contains("start it first"), "{refused}");
        server.start().await?;
        server.pause().await?;
        server.kill().await?;
        server.start().await?;
        server.start().await?;
        assert_eq!(server.exited()?, None);
    }
    Ok(())
}

#[tokio::test]
async fn options_reach_the_servers() -> Result<()> {
    let redis_options = RedisOptions {
        snapshots: true,
        maxmemory_bytes: Some(32 << 20),
        password: Some("secret".into()),
    };
    let nats_options = NatsOptions {
        relaxed_sync: true,
        login: Some(("user".into(), "secret".into())),
        ..NatsOptions::default()
    };
    let stack = Stack::fresh_with(Options {
        redis: redis_options,
        nats: nats_options,
        ..Options::default()
    })
    .await?;
    assert!(redis(stack.redis.port(), "PING")?.starts_with("-NOAUTH"));
    assert!(nats(stack.nats.port(), "s", "").is_err());
    let environment = stack.isolated().await?;
    assert_eq!(environment.vars["REDIS_PASSWORD"], "secret");
    assert_eq!(environment.vars["NATS_USER"], "user");

    let mut connection = RedisConnection::open(stack.redis.port())?;
    for command in ["AUTH secret", "SET n 1"] {
        connection.send(command)?;
        assert_eq!(connection.reply()?, "+OK");
    }
    stack.redis.restart().await?;
    let mut connection = RedisConnection::open(stack.redis.port())?;
    connection.send("AUTH secret")?;
    connection.reply()?;
    connection.send("GET n")?;
    assert_eq!(connection.reply()?, "1");
    Ok(())
}

#[tokio::test]
async fn data_may_lie_where_nobody_else_may_enter() -> Result<()> {
    let private = std::env::temp_dir().join(format!("birb-nest-private-{}", std::process::id()));
    std::fs::create_dir_all(&private)?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o700))?;
    let stack = Stack::open(&private.join("dev"), Ports::reserve, Options::default()).await?;
    stack.start().await?;
    stack.psql("birb_nest", "create table t (n int)").await?;
    stack.stop().await?;
    drop(stack);

    let stack = Stack::open(&private.join("dev"), Ports::reserve, Options::default()).await?;
    stack.postgres.start().await?;
    assert_eq!(
        stack.psql("birb_nest", "select count(*) from t").await?,
        "0"
    );
    drop(stack);
    std::fs::remove_dir_all(private)?;
    Ok(())
}

#[test]
fn shared_stack_outlives_the_runtime_that_started_it() -> Result<()> {
    let environment = || -> Result<_> {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?
            .block_on(async { shared().await?.isolated().await })
    };
    let (first, second) = (environment()?, environment()?);
    for name in ["POSTGRES_HOST", "POSTGRES_PORT", "REDIS_PORT", "NATS_URL"] {
        assert_eq!(first.vars[name], second.vars[name], "{name}");
    }
    for name in [
        "POSTGRES_DB",
        "REDIS_DB",
        "NATS_STREAM_NAME",
        "NATS_DLQ_STREAM_NAME",
        "NATS_SUBJECT_PREFIX",
        "API_PORT",
    ] {
        assert_ne!(first.vars[name], second.vars[name], "{name}");
    }
    Ok(())
}
