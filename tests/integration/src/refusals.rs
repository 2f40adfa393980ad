//! What cannot work is refused at start, in a sentence that says what to do.

use std::time::Duration;

use anyhow::{Context, Result};
use birb_nest_stack::{Environment, NatsOptions, Options, RedisOptions, Role, Stack, shared};

use crate::world::World;

/// How a process ends when a person must change something.
pub const REFUSED: i32 = 78;
/// How `setup` ends when a server cannot be reached.
pub const TRY_AGAIN: i32 = 75;

/// A process of this role ends by itself, with this exit code and this sentence in its log.
pub async fn ends(env: &Environment, role: Role, code: i32, sentence: &str) -> Result<()> {
    ends_with(env, role, code, &[sentence]).await
}

/// As [`ends`], with all of these words.
async fn ends_with(env: &Environment, role: Role, code: i32, words: &[&str]) -> Result<()> {
    let process = env.spawn(role)?;
    let status = tokio::time::timeout(Duration::from_secs(30), process.wait())
        .await
        .with_context(|| format!("birb-nest {role} goes on:\n{}", process.last_lines(20)))??;
    let log = process.log()?;
    assert_eq!(status.code(), Some(code), "{log}");
    for words in words {
        assert!(log.contains(words), "`{words}` is not in:\n{log}");
    }
    Ok(())
}

async fn all_roles(env: &Environment, code: i32, sentence: &str) -> Result<()> {
    for role in [Role::Setup, Role::Api, Role::Worker] {
        ends(env, role, code, sentence).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_foreign_redis_database_is_refused_and_left_alone() -> Result<()> {
    let world = World::shared().await?;
    world.flush_redis().await?;
    let mut redis = world.redis().await?;
    redis::cmd("SET")
        .arg("somebody")
        .arg("else")
        .exec_async(&mut redis)
        .await?;
    all_roles(
        &world.env,
        REFUSED,
        "the database holds keys of something else",
    )
    .await?;
    let kept: String = redis::cmd("GET")
        .arg("somebody")
        .query_async(&mut redis)
        .await?;
    assert_eq!(kept, "else");
    Ok(())
}

#[tokio::test]
async fn another_number_of_shards_is_refused() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("NATS_SHARDS", "4");
    let sentence = "it has a nest of 8 shards, but NATS_SHARDS is 4";
    all_roles(&env, REFUSED, sentence).await?;
    // The log knows it, too.
    env.set("POSTGRES_PORT", "1");
    for role in [Role::Api, Role::Worker] {
        ends(
            &env,
            role,
            REFUSED,
            "is one of 8 shards, but NATS_SHARDS is 4",
        )
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_newer_schema_is_refused() -> Result<()> {
    let world = World::shared().await?;
    world
        .sql(
            "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
             values (9999, 'from the future', true, '', 0)",
        )
        .await?;
    all_roles(
        &world.env,
        REFUSED,
        "its schema is at version 9999, newer than this binary",
    )
    .await
}

#[tokio::test]
async fn a_stream_of_somebody_else_is_refused() -> Result<()> {
    let world = World::not_set_up(shared().await?).await?;
    let name = format!("{}_0", world.env.vars["NATS_STREAM_NAME"]);
    let config = async_nats::jetstream::stream::Config {
        name: name.clone(),
        subjects: vec![format!("foreign.{name}")],
        ..Default::default()
    };
    world.jetstream().await?.create_stream(config).await?;
    ends(
        &world.env,
        Role::Setup,
        REFUSED,
        "was not made by birb-nest",
    )
    .await
}

/// Killed when it is dropped.
struct OldNats(std::process::Child);

impl Drop for OldNats {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_nats_that_loses_messages_is_refused() -> Result<()> {
    let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.dev/old/nats-server");
    let world = World::shared().await?;
    let (port, store) = (
        birb_nest_stack::Port::reserve()?,
        world.stack.root().join("old-nats"),
    );
    let server = std::process::Command::new(program)
        .args([
            "-js",
            "-a",
            "127.0.0.1",
            "-p",
            &port.number().to_string(),
            "-sd",
        ])
        .arg(&store)
        .stderr(std::process::Stdio::null())
        .spawn()
        .with_context(|| format!("{program} does not start: `make test` builds it, with Go"))?;
    let _server = OldNats(server);
    let url = format!("nats://127.0.0.1:{}", port.number());
    crate::world::eventually("the old server answers", async || {
        Ok(async_nats::connect(&url).await.ok())
    })
    .await?;
    let mut env = world.env.replica()?;
    env.set("NATS_URL", url);
    all_roles(
        &env,
        REFUSED,
        "it runs nats-server 2.10.27; 2.12.5 or newer is needed",
    )
    .await
}

#[tokio::test]
async fn values_larger_than_nats_takes_are_refused() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_MAX_VALUE_BYTES", "64MiB");
    ends(
        &env,
        Role::Api,
        REFUSED,
        "max_payload is 4194304 bytes, but API_MAX_VALUE_BYTES needs",
    )
    .await
}

#[tokio::test]
async fn a_log_that_does_not_fit_the_servers_disk_is_refused() -> Result<()> {
    let world = World::not_set_up(shared().await?).await?;
    let mut env = world.env.replica()?;
    env.set("NATS_STREAM_MAX_BYTES", "9000000GiB");
    ends(&env, Role::Setup, REFUSED, "do not fit its file store").await
}

#[tokio::test]
async fn wrong_settings_are_told_all_at_once() -> Result<()> {
    let world = World::not_set_up(shared().await?).await?;
    let mut env = world.env.replica()?;
    env.set("NATS_SHARDS", "0")
        .set("API_PORT", "port")
        .set("POSTGRES_TIMEOUT", "soon")
        .set("WORKER_BATCH_SIZE", "0");
    ends(&env, Role::Api, REFUSED, "3 settings are wrong").await?;
    ends(
        &env,
        Role::Worker,
        REFUSED,
        "WORKER_BATCH_SIZE cannot be `0`",
    )
    .await
}

#[tokio::test]
async fn servers_that_cannot_be_reached_are_tried_again_by_who_runs_setup() -> Result<()> {
    let world = World::not_set_up(shared().await?).await?;
    for (variable, value, sentence) in [
        ("POSTGRES_PORT", "1", "PostgreSQL at 127.0.0.1:1"),
        (
            "NATS_URL",
            "nats://127.0.0.1:1",
            "NATS at nats://127.0.0.1:1",
        ),
        ("REDIS_PORT", "1", "Redis at 127.0.0.1:1"),
    ] {
        let mut env = world.env.replica()?;
        env.set(variable, value);
        ends(&env, Role::Setup, TRY_AGAIN, sentence).await?;
    }
    Ok(())
}

/// Where all three want a password.
#[tokio::test]
async fn a_login_that_a_server_refuses_is_told_with_its_name_and_tried_again() -> Result<()> {
    let stack = Stack::fresh_with(Options {
        redis: RedisOptions {
            password: Some("right".to_owned()),
            ..RedisOptions::default()
        },
        nats: NatsOptions {
            login: Some(("nest".to_owned(), "right".to_owned())),
            ..NatsOptions::default()
        },
        ..Options::default()
    })
    .await?;
    let world = World::not_set_up(&stack).await?;
    let number = &world.env.vars["REDIS_DB"];
    let at = |server: &str, port: u16, rest: &str| {
        format!("{server}127.0.0.1:{port}{rest} cannot be used now: ")
    };
    let database = format!("/{}", world.env.vars["POSTGRES_DB"]);
    let postgres = at("PostgreSQL at ", stack.postgres.port(), &database);
    let nats = at("NATS at nats://", stack.nats.port(), "");
    let redis = at("Redis at ", stack.redis.port(), &format!("/{number}"));
    for (variable, value, server, why) in [
        (
            "POSTGRES_PASSWORD",
            Some("wrong"),
            &postgres,
            "password authentication failed",
        ),
        (
            "NATS_PASSWORD",
            Some("wrong"),
            &nats,
            "authorization violation",
        ),
        ("NATS_USER", Some("other"), &nats, "authorization violation"),
        (
            "REDIS_PASSWORD",
            Some("wrong"),
            &redis,
            "Password authentication failed",
        ),
        ("REDIS_PASSWORD", None, &redis, "Authentication required"),
    ] {
        let mut env = world.env.replica()?;
        match value {
            Some(value) => env.set(variable, value),
            None => env.unset(variable),
        };
        ends_with(&env, Role::Setup, TRY_AGAIN, &[server.as_str(), why]).await?;
    }
    world.env.setup().await
}

#[tokio::test]
async fn files_that_an_api_cannot_use_are_refused() -> Result<()> {
    let world = World::shared().await?;
    let dir = world.env.make_dir()?;
    let keys = dir.join("keys");
    std::fs::write(&keys, "read a 0123456789abcdef\nroot b 0123456789abcdeg\n")?;
    let mut env = world.env.replica()?;
    env.set("API_KEYS_FILE", keys.display().to_string());
    ends(
        &env,
        Role::Api,
        REFUSED,
        "line 2: the role is read, write or admin",
    )
    .await?;
    env.set("API_KEYS_FILE", dir.join("none").display().to_string());
    ends(&env, Role::Api, REFUSED, "No such file").await?;
    env.unset("API_KEYS_FILE")
        .set("API_TLS_CERT_FILE", keys.display().to_string())
        .set("API_TLS_KEY_FILE", keys.display().to_string());
    ends(&env, Role::Api, REFUSED, "API_TLS_CERT_FILE").await?;
    Ok(())
}
