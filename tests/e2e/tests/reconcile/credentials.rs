//! Secrets: generated ones, and those a nest refers to.

use std::time::Instant;

use anyhow::{Context, Result};
use birb_nest_operator::api::BirbNest;
use k8s_openapi::api::{apps::v1::Deployment, batch::v1::Job, core::v1::Secret};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::world::World;

const EXTERNAL_POSTGRES: &str =
    "{postgres: {external: {urlSecretRef: {name: servers, key: postgres}}}}";

#[tokio::test]
async fn a_missing_secret_is_named_and_its_arrival_heals() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", EXTERNAL_POSTGRES).await?;
    let message = world.until_ready("cache", "False", "SecretMissing").await?;
    assert!(
        message.contains("Secret servers") && message.contains("postgres"),
        "{message}"
    );
    world
        .until_condition("cache", "DependenciesReady", "False", "SecretMissing")
        .await?;
    // While a neighbour goes from nothing to ready it is hardly looked at: nobody asks in a loop whether it is there now.
    let asked = || {
        let of_it = world.requests()?.into_iter().filter(|request| {
            request.uri.contains("/servers") || request.uri.contains("/birbnests/cache")
        });
        anyhow::Ok(of_it.count())
    };
    let (before, begun) = (asked()?, Instant::now());
    world.create("neighbour", "{}").await?;
    world.until_ready("neighbour", "True", "Available").await?;
    let meanwhile = u64::try_from(asked()? - before)?;
    // A pass asks for the nest and for its Secret, and comes once in a `--retry` of a second, besides the one of its own events.
    let most = 2 * (begun.elapsed().as_secs() + 2);
    assert!(
        meanwhile <= most,
        "{meanwhile} requests for a nest that waits, {most} at most"
    );
    world.secret("servers", &[("other", "x")]).await?;
    // It is there now, and its key is not.
    birb_nest_e2e::eventually("the missing key is named", || async {
        let message = world.until_ready("cache", "False", "SecretMissing").await?;
        Ok(if message.contains("no key postgres") {
            Ok(())
        } else {
            Err(message)
        })
    })
    .await?;
    let key = json!({ "stringData": { "postgres": "postgres://birb@db/birb" } });
    world
        .of::<Secret>()
        .patch("servers", &PatchParams::default(), &Patch::Merge(key))
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.until_told("cache", "SecretMissing").await?;
    world.finish().await
}

#[tokio::test]
async fn a_changed_password_is_set_up_and_rolled_out_and_a_label_is_not() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .secret("servers", &[("postgres", "postgres://birb:old@db/birb")])
        .await?;
    world.create("cache", EXTERNAL_POSTGRES).await?;
    world.until_ready("cache", "True", "Available").await?;
    let inputs = |deployment: &Deployment| {
        let annotations = deployment
            .spec
            .as_ref()?
            .template
            .metadata
            .as_ref()?
            .annotations
            .clone()?;
        annotations.get("cache.birb.party/inputs").cloned()
    };
    let before = world.of::<Deployment>().get("cache-api").await?;
    let first = world
        .of::<Job>()
        .list(&ListParams::default())
        .await?
        .items
        .pop()
        .context("a job")?;

    let label = json!({ "metadata": { "labels": { "a": "b" } }, "stringData": { "unused": "x" } });
    world
        .of::<Secret>()
        .patch("servers", &PatchParams::default(), &Patch::Merge(label))
        .await?;
    // A pass after it.
    world
        .change("cache", "{worker: {scaling: {mode: Fixed}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let after = world.of::<Deployment>().get("cache-api").await?;
    assert_eq!(inputs(&after), inputs(&before));
    assert_eq!(after.metadata.generation, before.metadata.generation);

    let password = json!({ "stringData": { "postgres": "postgres://birb:new@db/birb" } });
    world
        .of::<Secret>()
        .patch("servers", &PatchParams::default(), &Patch::Merge(password))
        .await?;
    world
        .until::<Deployment>("cache-worker", |worker| inputs(worker) != inputs(&before))
        .await?;
    world
        .until_gone::<Job>(first.metadata.name.as_deref().unwrap_or_default())
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

#[tokio::test]
async fn a_lost_password_of_a_volume_is_never_made_anew() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world.volume("data-cache-postgres-0").await?;
    let mut secret = world.of::<Secret>().get("cache-postgres").await?;
    world
        .of::<Secret>()
        .delete("cache-postgres", &DeleteParams::default())
        .await?;
    let message = world
        .until_ready("cache", "False", "CredentialsLost")
        .await?;
    assert!(message.contains("data-cache-postgres-0"), "{message}");
    assert!(
        world
            .of::<Secret>()
            .get_opt("cache-postgres")
            .await?
            .is_none()
    );

    secret.metadata.resource_version = None;
    secret.metadata.uid = None;
    world
        .of::<Secret>()
        .create(&PostParams::default(), &secret)
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let back = world.of::<Secret>().get("cache-postgres").await?;
    assert_eq!(back.data, secret.data);
    world.finish().await
}

#[tokio::test]
async fn no_secret_reaches_status_events_or_the_log() -> Result<()> {
    let world = World::where_all_works().await?;
    let password = "hunter2hunter2";
    world
        .secret(
            "servers",
            &[("postgres", &format!("postgres://birb:{password}@db/birb"))],
        )
        .await?;
    world.create("cache", EXTERNAL_POSTGRES).await?;
    world.until_ready("cache", "True", "Available").await?;
    let generated = world
        .of::<Secret>()
        .get("cache-redis")
        .await?
        .data
        .context("data")?["password"]
        .clone();
    let generated = String::from_utf8(generated.0)?;
    assert_eq!(generated.len(), 32);
    let nest = serde_json::to_string(&world.of::<BirbNest>().get("cache").await?)?;
    let all = world
        .kubectl(
            &[
                "get",
                "deployments,statefulsets,jobs,configmaps,events",
                "--output=yaml",
            ],
            "",
        )
        .await?;
    let log = world.shared.operator.process.log()?;
    for text in [&nest, &all, &log] {
        assert!(!text.contains(password) && !text.contains(&generated));
    }
    world.finish().await
}

#[tokio::test]
async fn a_lost_password_does_not_hold_up_the_move_to_an_external_server() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world.volume("data-cache-postgres-0").await?;
    world
        .of::<Secret>()
        .delete("cache-postgres", &DeleteParams::default())
        .await?;
    world
        .until_ready("cache", "False", "CredentialsLost")
        .await?;
    world
        .secret("servers", &[("postgres", "postgres://birb@db/birb")])
        .await?;
    world.change("cache", EXTERNAL_POSTGRES).await?;
    world.until_ready("cache", "True", "Available").await?;
    world
        .until_gone::<k8s_openapi::api::apps::v1::StatefulSet>("cache-postgres")
        .await?;
    world.finish().await
}
