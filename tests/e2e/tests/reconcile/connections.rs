//! Whose lag is read through which connection to NATS, and what a server that refuses one makes of it.

use anyhow::{Context, Result};
use async_nats::ConnectOptions;
use birb_nest_e2e::{condition, eventually};
use birb_nest_operator::api::BirbNest;
use birb_nest_stack::{NatsOptions, Options, Port, Stack};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::{log::Log, scaling::address, world::World};

/// Waits until the server has so many connections of the operator.
async fn until_open(monitoring: u16, number: usize) -> Result<()> {
    let url = format!("http://127.0.0.1:{monitoring}/connz?limit=10000");
    eventually(
        &format!("the operator has {number} connections"),
        || async {
            let told: Value = reqwest::get(&url).await?.json().await?;
            let all = told["connections"].as_array().context("connections")?;
            let own = all
                .iter()
                .filter(|connection| connection["name"] == "birb-nest-operator");
            let open: Vec<&Value> = own.map(|connection| &connection["cid"]).collect();
            Ok(if open.len() == number {
                Ok(())
            } else {
                Err(format!("{open:?}"))
            })
        },
    )
    .await
}

/// A nest that logs in with the password in the Secret of its name.
async fn create(world: &World, stack: &Stack, name: &str) -> Result<()> {
    let data = [
        ("redis", "redis://cache:6379"),
        ("postgres", "postgres://me@db/db"),
        ("nats", "first"),
    ];
    world.secret(name, &data).await?;
    let address = address(stack);
    let spec = format!(
        "redis: {{external: {{urlSecretRef: {{name: {name}, key: redis}}}}}}
postgres: {{external: {{urlSecretRef: {{name: {name}, key: postgres}}}}}}
nats: {{external: {{url: 'nats://{address}', prefix: {name}, user: nest, passwordSecretRef: {{name: {name}, key: nats}}}}}}
worker: {{scaling: {{pollInterval: 1s}}}}"
    );
    world.create(name, &spec).await?;
    Ok(())
}

async fn until_followed(world: &World, name: &str) -> Result<()> {
    world
        .until_condition(name, "ScalingActive", "True", "AsExpected")
        .await
        .map(drop)
}

async fn rotate(world: &World, name: &str) -> Result<()> {
    let patch = Patch::Merge(json!({ "stringData": { "nats": "second" } }));
    let params = PatchParams::default();
    world.of::<Secret>().patch(name, &params, &patch).await?;
    Ok(())
}

/// The server lets everyone in: only the operator can know that another password is another connection.
#[tokio::test]
async fn nests_with_the_same_server_and_password_share_a_connection() -> Result<()> {
    let port = Port::reserve()?;
    let monitoring = port.number();
    let nats = NatsOptions {
        monitoring: Some(monitoring),
        ..NatsOptions::default()
    };
    let options = Options {
        nats,
        ..Options::default()
    };
    let (world, stack) = (
        World::where_all_works().await?,
        Stack::fresh_with(options).await?,
    );
    for name in ["one", "two"] {
        Log::new(&stack, name).await?;
        create(&world, &stack, name).await?;
        until_followed(&world, name).await?;
    }
    until_open(monitoring, 1).await?;
    rotate(&world, "one").await?;
    until_open(monitoring, 2).await?;
    rotate(&world, "two").await?;
    until_open(monitoring, 1).await?;

    let nests = world.of::<BirbNest>();
    nests.delete("one", &DeleteParams::default()).await?;
    let labels = format!("namespace=\"{}\",nest=\"one\"", world.namespace);
    let followed = format!("birbnest_operator_workers_desired{{{labels}}}");
    eventually("its lag is followed no more", || async {
        Ok(match world.shared.operator.metric(&followed).await {
            Err(_) => Ok(()),
            Ok(_) => Err("it is".to_owned()),
        })
    })
    .await?;
    until_open(monitoring, 1).await?;
    nests.delete("two", &DeleteParams::default()).await?;
    until_open(monitoring, 0).await?;
    world.finish().await
}

/// Pods have their own words for it: the operator reads the log by itself.
#[tokio::test]
async fn a_password_that_nats_refuses_is_told_and_heals() -> Result<()> {
    let (user, password) = ("nest".to_owned(), "second".to_owned());
    let nats = NatsOptions {
        login: Some((user.clone(), password.clone())),
        ..NatsOptions::default()
    };
    let options = Options {
        nats,
        ..Options::default()
    };
    let (world, stack) = (
        World::where_all_works().await?,
        Stack::fresh_with(options).await?,
    );
    let options = ConnectOptions::with_user_and_password(user, password);
    let client = options.connect(address(&stack)).await?;
    Log::made_by(client, "cache", 1).await?;
    create(&world, &stack, "cache").await?;
    let is_told = |nest: &BirbNest| {
        condition(nest, "ScalingActive").is_some_and(|found| {
            (found.status.as_str(), found.reason.as_str()) == ("False", "LagUnknown")
                && found.message.contains("NATS refuses the credentials")
        })
    };
    let nest = world.until("cache", is_told).await?;
    assert_eq!(nest.status.and_then(|status| status.worker.lag), None);
    let refused = "birbnest_operator_external_calls_total{dependency=\"nats\",result=\"refused\"}";
    assert!(world.shared.operator.metric(refused).await? >= 1.0);
    // By the Secret alone.
    rotate(&world, "cache").await?;
    until_followed(&world, "cache").await?;
    world.finish().await
}
