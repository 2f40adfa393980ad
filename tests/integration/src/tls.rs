//! Connections that nobody else can read: each server by TLS with an authority of our own, and the API itself.

use std::process::Command;

use anyhow::Result;
use birb_nest_stack::{Authority, Port, Role};
use reqwest::{Method, StatusCode};

use crate::{
    refusals::{TRY_AGAIN, ends},
    world::{Api, World, breakable, eventually},
};

#[tokio::test]
async fn the_api_speaks_https_with_a_certificate_that_may_change() -> Result<()> {
    let mut world = World::shared().await?;
    let authority = Authority::new(world.env.make_dir()?)?;
    authority.issue("localhost")?;
    world
        .env
        .set("API_TLS_CERT_FILE", authority.path("cert.pem"))
        .set("API_TLS_KEY_FILE", authority.path("key.pem"));
    let api = world.env.spawn(Role::Api)?;
    let url = world
        .env
        .api_url()
        .replace("http://127.0.0.1", "https://localhost");
    let curl = async |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command
            .args([
                "-sS",
                "--max-time",
                "10",
                "--cacert",
                &authority.path("ca.pem"),
            ])
            .args(arguments);
        let output = birb_nest_stack::blocking(move || Ok(command.output()?)).await?;
        anyhow::Ok(String::from_utf8(output.stdout)? + &String::from_utf8(output.stderr)?)
    };
    let ready = format!("{url}/readyz");
    eventually("it is ready", async || {
        Ok(curl(&[&ready])
            .await?
            .contains("\"ready\":true")
            .then_some(()))
    })
    .await?;
    let version = curl(&["-o", "/dev/null", "-w", "%{http_version}", &ready]).await?;
    assert_eq!(version, "2");
    let plain = curl(&[&ready.replace("https://", "http://")]).await?;
    assert!(!plain.contains("ready\":"), "{plain}");
    authority.issue("elsewhere")?;
    eventually("the new certificate is there", async || {
        Ok(curl(&[&ready]).await?.contains("SSL").then_some(()))
    })
    .await?;
    // A pair that is none: the one from before stays.
    std::fs::write(authority.path("cert.pem"), "nonsense")?;
    eventually("it is said", async || {
        Ok(api
            .log()?
            .contains("the certificate from before stays")
            .then_some(()))
    })
    .await?;
    authority.issue("localhost")?;
    eventually("it is mended", async || {
        Ok(curl(&[&ready])
            .await?
            .contains("\"ready\":true")
            .then_some(()))
    })
    .await
}

#[tokio::test]
async fn redis_by_tls_with_an_authority_of_our_own() -> Result<()> {
    let mut world = World::shared().await?;
    let authority = Authority::new(world.env.make_dir()?)?;
    authority.issue("localhost")?;
    let port = Port::reserve()?;
    let _redis = authority.redis(port.number())?;
    world
        .env
        .set("REDIS_HOST", "localhost")
        .set("REDIS_PORT", port.number().to_string())
        // This one has sixteen databases; the shared one's number may be greater.
        .set("REDIS_DB", "0")
        .set("REDIS_TLS", "true")
        .set("REDIS_TIMEOUT", "2s")
        .set("REDIS_CA_FILE", authority.path("ca.pem"));
    let api = world.api().await?;
    eventually("hits come from it", async || {
        api.write("k", "1").await?;
        let read = api.get("k").await?.expect(StatusCode::OK)?;
        Ok((read.header("birb-source") == "redis").then_some(()))
    })
    .await?;
    // By an address; one without TLS is not taken where TLS is asked for.
    for (scheme, is_taken) in [("rediss", true), ("redis", false)] {
        let mut env = world.env.replica()?;
        let url = format!("{scheme}://localhost:{}/0", port.number());
        env.set("REDIS_URL", url);
        let started = Api::start(&env).await;
        if !is_taken {
            let Err(error) = started else {
                panic!("{scheme} is taken")
            };
            let error = format!("{error:#}");
            assert!(error.contains("does not begin with rediss://"), "{error}");
            continue;
        }
        let by_address = started?;
        eventually("hits come from it", async || {
            let read = by_address.get("k").await?.expect(StatusCode::OK)?;
            Ok((read.header("birb-source") == "redis").then_some(()))
        })
        .await?;
    }
    // The wrong host, and an authority that nobody knows: never used, and said why.
    for (host, file, why) in [
        ("127.0.0.1", Some("ca.pem"), "certificate"),
        ("localhost", None, "certificate"),
    ] {
        let mut env = world.env.replica()?;
        env.set("REDIS_HOST", host);
        match file {
            Some(file) => env.set("REDIS_CA_FILE", authority.path(file)),
            None => env.unset("REDIS_CA_FILE"),
        };
        let distrusting = Api::start_alone(&env).await?;
        distrusting.write("k", "2").await?;
        let ready = distrusting.send(Method::GET, "/readyz", None).await?;
        assert!(ready.body.contains("redis"), "{host}: {}", ready.body);
        let log = distrusting.process.log()?;
        assert!(log.to_lowercase().contains(why), "{host}: {log}");
    }
    Ok(())
}

#[tokio::test]
async fn nats_by_tls_with_an_authority_of_our_own() -> Result<()> {
    let mut world = World::not_set_up(birb_nest_stack::shared().await?).await?;
    let authority = Authority::new(world.env.make_dir()?)?;
    authority.issue("localhost")?;
    let port = Port::reserve()?;
    let _nats = authority.nats(port.number()).await?;
    let url = |host: &str| format!("nats://{host}:{}", port.number());
    world
        .env
        .set("NATS_URL", url("localhost"))
        .set("NATS_TLS", "true")
        .set("NATS_CA_FILE", authority.path("ca.pem"))
        // Nobody breaks these servers: that one is slow means that this machine is busy.
        .set("NATS_PUBLISH_TIMEOUT", "20s")
        .set("POSTGRES_TIMEOUT", "20s");
    // The wrong host, and an authority that nobody knows.
    let mut wrong_host = world.env.replica()?;
    wrong_host.set("NATS_URL", url("127.0.0.1"));
    let mut stranger = world.env.replica()?;
    stranger.unset("NATS_CA_FILE");
    for env in [wrong_host, stranger] {
        ends(&env, Role::Setup, TRY_AGAIN, "invalid peer certificate").await?;
    }
    world.env.setup().await?;
    let api = world.api().await?;
    let version = api.write("k", "1").await?;
    let _worker = world.worker().await?;
    world.stored("k", version).await
}

#[tokio::test]
async fn postgresql_by_tls_with_an_authority_of_our_own() -> Result<()> {
    let stack = breakable().await?;
    let mut world = World::not_set_up(&stack).await?;
    let authority = Authority::new(world.env.make_dir()?)?;
    authority.issue("localhost")?;
    authority.postgres(&stack).await?;
    world
        .env
        .set("POSTGRES_HOST", "localhost")
        .set("POSTGRES_SSLMODE", "verify-full")
        .set("POSTGRES_CA_FILE", authority.path("ca.pem"))
        .set("POSTGRES_TIMEOUT", "20s");
    // The wrong host, and an authority that nobody knows.
    let mut wrong_host = world.env.replica()?;
    wrong_host.set("POSTGRES_HOST", "127.0.0.1");
    let mut stranger = world.env.replica()?;
    stranger.unset("POSTGRES_CA_FILE");
    for env in [&wrong_host, &stranger] {
        ends(env, Role::Setup, TRY_AGAIN, "invalid peer certificate").await?;
    }
    // What `verify-ca` is for.
    wrong_host
        .set("POSTGRES_SSLMODE", "verify-ca")
        .setup()
        .await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    let plain = "select count(*) from pg_stat_ssl join pg_stat_activity using (pid)
                 where application_name like 'birb-nest%' and not ssl";
    assert_eq!(world.sql(plain).await?, "0");
    let by_tls = plain.replace("not ssl", "ssl");
    assert_ne!(world.sql(&by_tls).await?, "0");
    Ok(())
}
