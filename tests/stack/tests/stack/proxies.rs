//! A proxy in front of a server.

use std::time::{Duration, Instant};

use anyhow::Result;
use birb_nest_stack::shared;

use crate::clients::{RedisConnection, redis};

#[tokio::test]
async fn cut_drops_and_refuses_until_healed() -> Result<()> {
    let proxy = shared().await?.redis.proxy()?;
    let mut connection = RedisConnection::open(proxy.port())?;
    connection.send("PING")?;
    assert_eq!(connection.reply()?, "+PONG");

    proxy.cut();
    assert!(connection.reply().is_err());
    assert!(redis(proxy.port(), "PING").is_err());
    proxy.heal();
    assert_eq!(redis(proxy.port(), "PING")?, "+PONG");
    assert!(
        connection
            .send("PING")
            .and_then(|()| connection.reply())
            .is_err(),
        "an old connection came back"
    );

    // However short it was, no connection survives it.
    let mut connection = RedisConnection::open(proxy.port())?;
    connection.send("PING")?;
    connection.reply()?;
    proxy.cut();
    proxy.heal();
    assert!(connection.reply().is_err());
    Ok(())
}

#[tokio::test]
async fn stall_holds_bytes_and_new_connections_until_resumed() -> Result<()> {
    let stack = shared().await?;
    let proxy = stack.redis.proxy()?;
    let mut old = RedisConnection::open(proxy.port())?;
    old.send("PING")?;
    old.reply()?;

    proxy.stall();
    old.send("SET stalled yes")?;
    let mut new = RedisConnection::open(proxy.port())?;
    new.send("PING")?;
    assert!(old.is_silent()? && new.is_silent()?);
    assert_eq!(redis(stack.redis.port(), "GET stalled")?, "$-1");
    proxy.resume();
    assert_eq!(old.reply()?, "+OK");
    assert_eq!(new.reply()?, "+PONG");
    assert_eq!(redis(stack.redis.port(), "GET stalled")?, "yes");
    Ok(())
}

#[tokio::test]
async fn what_was_swallowed_is_silent_for_ever_and_new_connections_are_not() -> Result<()> {
    let stack = shared().await?;
    let proxy = stack.redis.proxy()?;
    let mut old = RedisConnection::open(proxy.port())?;
    old.send("PING")?;
    old.reply()?;
    proxy.swallow();
    old.send("SET swallowed yes")?;
    assert!(old.is_silent()?);
    assert_eq!(redis(proxy.port(), "GET swallowed")?, "$-1");
    proxy.heal();
    assert!(old.is_silent()?);
    proxy.cut();
    assert!(old.reply().is_err());
    Ok(())
}

#[tokio::test]
async fn delay_adds_to_each_direction() -> Result<()> {
    let proxy = shared().await?.redis.proxy()?;
    let mut connection = RedisConnection::open(proxy.port())?;
    connection.send("PING")?;
    connection.reply()?;
    proxy.delay(Duration::from_millis(50));
    let start = Instant::now();
    connection.send("PING")?;
    assert_eq!(connection.reply()?, "+PONG");
    assert!(
        start.elapsed() >= Duration::from_millis(100),
        "{:?}",
        start.elapsed()
    );
    Ok(())
}

#[tokio::test]
async fn large_values_pass_unharmed() -> Result<()> {
    let proxy = shared().await?.redis.proxy()?;
    let value = "0123456789abcdef".repeat(64 << 10);
    let mut connection = RedisConnection::open(proxy.port())?;
    connection.send(&format!(
        "*3\r\n$3\r\nSET\r\n$5\r\nlarge\r\n${}\r\n{value}",
        value.len()
    ))?;
    assert_eq!(connection.reply()?, "+OK");
    connection.send("GET large")?;
    assert_eq!(connection.reply()?, value);
    Ok(())
}

#[tokio::test]
async fn environment_goes_through_the_proxies_it_is_told_to() -> Result<()> {
    let stack = shared().await?;
    let mut environment = stack.isolated().await?;
    let (redis, nats) = (stack.redis.proxy()?, stack.nats.proxy()?);
    environment.through(&redis).through(&nats);
    assert_eq!(environment.vars["REDIS_PORT"], redis.port().to_string());
    assert_eq!(
        environment.vars["NATS_URL"],
        format!("nats://127.0.0.1:{}", nats.port())
    );
    assert_eq!(
        environment.vars["POSTGRES_PORT"],
        stack.postgres.port().to_string()
    );
    Ok(())
}
