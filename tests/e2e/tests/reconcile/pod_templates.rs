//! What a nest says of its own pods.

use anyhow::{Context, Result};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::PodSpec};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::world::World;

fn pod(deployment: &Deployment) -> Option<&PodSpec> {
    deployment.spec.as_ref()?.template.spec.as_ref()
}

fn priority(deployment: &Deployment) -> Option<&str> {
    pod(deployment)?.priority_class_name.as_deref()
}

#[tokio::test]
async fn an_override_is_laid_over_put_back_and_taken_away() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .create("cache", "
api: {podTemplate: {spec: {priorityClassName: high, containers: [{name: api, env: [{name: EXTRA, value: it}]}]}}}
worker: {podTemplate: {spec: {priorityClassName: low}}}
")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let api = world.of::<Deployment>().get("cache-api").await?;
    assert_eq!(priority(&api), Some("high"));
    let container = &pod(&api).context("a pod")?.containers[0];
    let env = container.env.as_deref().unwrap_or_default();
    for name in ["EXTRA", "NATS_URL"] {
        assert!(env.iter().any(|variable| variable.name == name), "{name}");
    }
    let worker = world.of::<Deployment>().get("cache-worker").await?;
    assert_eq!(priority(&worker), Some("low"));

    let edit = json!({ "spec": { "template": { "spec": { "priorityClassName": "other" } } } });
    world
        .of::<Deployment>()
        .patch("cache-api", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    let is_high = |api: &Deployment| priority(api) == Some("high");
    world.until::<Deployment>("cache-api", is_high).await?;
    world
        .change(
            "cache",
            "{api: {podTemplate: null}, worker: {podTemplate: null}}",
        )
        .await?;
    for name in ["cache-api", "cache-worker"] {
        let is_plain = |found: &Deployment| priority(found).is_none();
        world.until::<Deployment>(name, is_plain).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn an_override_that_cannot_be_is_told_and_old_pods_serve() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let generation = async |name: &str| -> Result<_> {
        Ok(world
            .of::<Deployment>()
            .get(name)
            .await?
            .metadata
            .generation)
    };
    let before = [
        generation("cache-api").await?,
        generation("cache-worker").await?,
    ];
    for (change, words) in [
        // As the operator sees itself, as its type says, and as only the API server knows.
        (
            "{worker: {podTemplate: {spec: {containers: [{name: worker, args: [api]}]}}}}",
            "spec.containers[0].args cannot be overridden",
        ),
        (
            "{worker: {podTemplate: {spec: {containers: null, tolerance: 1}}}}",
            "no field spec.tolerance",
        ),
        (
            "{worker: {podTemplate: {spec: {tolerance: null, priorityClassName: NOT A NAME}}}}",
            "priorityClassName",
        ),
    ] {
        world
            .change(
                "cache",
                &format!("{{cache: {{maxTtl: 2h}}, {}", &change[1..]),
            )
            .await?;
        let message = world
            .until_ready("cache", "False", "PodTemplateInvalid")
            .await?;
        assert!(
            message.contains("worker.podTemplate") && message.contains(words),
            "{message}"
        );
        world
            .until_condition("cache", "APIAvailable", "True", "Available")
            .await?;
    }
    // Neither of them was changed, not even for what else was asked for.
    let after = [
        generation("cache-api").await?,
        generation("cache-worker").await?,
    ];
    assert_eq!(before, after);
    world
        .change(
            "cache",
            "{worker: {podTemplate: {spec: {priorityClassName: fine}}}}",
        )
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let worker = world.of::<Deployment>().get("cache-worker").await?;
    assert_eq!(priority(&worker), Some("fine"));
    world.finish().await
}
