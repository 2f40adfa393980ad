//! Nests that are put to sleep, restarted, or left alone.

use anyhow::{Context, Result, ensure};
use birb_nest_operator::api::{BirbNest, SuspensionStage};
use birb_nest_stack::shared;
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    autoscaling::v2::HorizontalPodAutoscaler,
    core::v1::Pod,
    policy::v1::PodDisruptionBudget,
};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::json;

use crate::{log::Log, scaling::create, world::World};

fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.replicas
}

async fn until(world: &World, name: &str, number: i32) -> Result<()> {
    let has = move |found: &Deployment| replicas(found) == Some(number);
    world.until(name, has).await?;
    Ok(())
}

#[tokio::test]
async fn a_nest_falls_asleep_when_its_log_is_stored_and_wakes_as_it_was() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    let log = Log::new(stack, "sleep").await?;
    create(&world, stack, "sleep", "{mode: Fixed, replicas: 3}").await?;
    let seen = world.watch_replicas("cache-worker").await?;
    log.write(20).await?;
    world.change("cache", "{suspend: true}").await?;
    until(&world, "cache-api", 0).await?;
    world.until_ready("cache", "False", "Draining").await?;
    world.until_gone::<PodDisruptionBudget>("cache-api").await?;
    // Passes in between leave the workers at work.
    world
        .change("cache", "{worker: {batch: {size: 7}}}")
        .await?;
    world.until_ready("cache", "False", "Draining").await?;
    until(&world, "cache-worker", 3).await?;

    log.drain().await?;
    world.until_ready("cache", "False", "Suspended").await?;
    until(&world, "cache-worker", 0).await?;
    world
        .until_condition("cache", "Degraded", "False", "AsExpected")
        .await?;
    world.change("cache", "{api: {replicas: 3}}").await?;
    world.until_ready("cache", "False", "Suspended").await?;
    until(&world, "cache-api", 0).await?;

    world.change("cache", "{suspend: false}").await?;
    world.until_ready("cache", "True", "Available").await?;
    until(&world, "cache-api", 3).await?;
    let nest = world.of::<BirbNest>().get("cache").await?;
    assert_eq!(nest.status.context("a status")?.suspension, None);
    assert_eq!(seen.finish().await, [3, 0, 3]);
    world.finish().await
}

#[tokio::test]
async fn an_api_that_still_ends_may_still_write() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    Log::new(stack, "ending").await?;
    create(&world, stack, "ending", "{pollInterval: 1s}").await?;
    let pod = json!({ "metadata": { "name": "last", "labels": {
            "app.kubernetes.io/name": "birb-nest", "app.kubernetes.io/instance": "cache",
            "app.kubernetes.io/component": "api",
        } },
        "spec": { "securityContext": { "runAsNonRoot": true, "runAsUser": 1, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{ "name": "api", "image": "it", "securityContext": {
                "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } } }] } });
    let pods = world.of::<Pod>();
    pods.create(&PostParams::default(), &serde_json::from_value(pod)?)
        .await?;
    world.change("cache", "{suspend: true}").await?;
    until(&world, "cache-api", 0).await?;
    // The log is empty, and read again and again.
    for size in 1..4 {
        let change = format!("{{worker: {{batch: {{size: {size}}}}}}}");
        world.change("cache", &change).await?;
        world.until_ready("cache", "False", "Draining").await?;
        tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    }
    until(&world, "cache-worker", 1).await?;
    let now = DeleteParams::default().grace_period(0);
    pods.delete("last", &now).await?;
    world.until_ready("cache", "False", "Suspended").await?;
    until(&world, "cache-worker", 0).await?;
    let nest = world.of::<BirbNest>().get("cache").await?;
    let worker = nest.status.context("a status")?.worker;
    assert_eq!(worker.lag, None, "nobody reads it any more");
    world.finish().await
}

#[tokio::test]
async fn what_no_worker_can_store_is_told_and_the_nest_sleeps() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    let log = Log::new(stack, "left").await?;
    create(&world, stack, "left", "{mode: Fixed, replicas: 1}").await?;
    world
        .change("cache", "{worker: {scaling: {replicas: 0}}}")
        .await?;
    until(&world, "cache-worker", 0).await?;
    log.write(5).await?;
    world.change("cache", "{suspend: true}").await?;
    let message = world
        .until_condition("cache", "Degraded", "True", "NotDrained")
        .await?;
    assert!(message.contains("stays in it"), "{message}");
    let nest = world.of::<BirbNest>().get("cache").await?;
    let suspension = nest.status.and_then(|status| status.suspension);
    assert_eq!(
        suspension.context("it sleeps")?.stage,
        SuspensionStage::NotDrained
    );
    world.finish().await
}

/// Whoever moves a nest to another log trusts in that.
#[tokio::test]
async fn a_log_whose_workers_somebody_deleted_is_not_said_to_be_stored() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    let log = Log::new(stack, "deleted").await?;
    create(&world, stack, "deleted", "{mode: Fixed, replicas: 1}").await?;
    log.write(5).await?;
    world.change("cache", "{paused: true}").await?;
    world
        .until_condition("cache", "Progressing", "False", "Paused")
        .await?;
    let deployments = world.of::<Deployment>();
    deployments
        .delete("cache-worker", &DeleteParams::default())
        .await?;
    world.until_gone::<Deployment>("cache-worker").await?;
    world
        .change("cache", "{suspend: true, paused: false}")
        .await?;
    world
        .until_condition("cache", "Degraded", "True", "NotDrained")
        .await?;
    until(&world, "cache-worker", 0).await?;
    world.change("cache", "{suspend: false}").await?;
    until(&world, "cache-worker", 1).await?;
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

#[tokio::test]
async fn an_autoscaler_goes_first_and_its_api_wakes_with_the_fewest() -> Result<()> {
    let world = World::where_all_works().await?;
    let spec = "{api: {autoscaling: {minReplicas: 3, maxReplicas: 6}}, worker: {scaling: {mode: External}}}";
    world.create("cache", "{suspend: true}").await?;
    world.until_ready("cache", "False", "Suspended").await?;
    for name in ["cache-api", "cache-worker"] {
        until(&world, name, 0).await?;
    }
    let servers = world
        .of::<StatefulSet>()
        .list(&ListParams::default())
        .await?;
    assert_eq!(servers.items.len(), 3);
    world.change("cache", spec).await?;
    world.change("cache", "{suspend: false}").await?;
    world.until_ready("cache", "True", "Available").await?;
    until(&world, "cache-api", 3).await?;
    until(&world, "cache-worker", 1).await?;
    let most = |found: &HorizontalPodAutoscaler| Some(found.spec.as_ref()?.max_replicas);
    world
        .until::<HorizontalPodAutoscaler>("cache-api", |_| true)
        .await?;
    // Put back: the operator has heard of it.
    let edit = json!({ "spec": { "maxReplicas": 60 } });
    world
        .of::<HorizontalPodAutoscaler>()
        .patch("cache-api", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    world
        .until::<HorizontalPodAutoscaler>("cache-api", |found| most(found) == Some(6))
        .await?;
    let since = Timestamp::now();
    world.change("cache", "{suspend: true}").await?;
    world
        .until_gone::<HorizontalPodAutoscaler>("cache-api")
        .await?;
    until(&world, "cache-api", 0).await?;

    // In between it would start pods again.
    let all = world.requests()?;
    let first = |verb: &str, resource: &str, words: &str| {
        let mut found = all.iter().filter(|request| {
            request.received > since
                && (request.verb.as_str(), request.resource.as_str()) == (verb, resource)
                && request.uri.contains("/cache-api")
                && request.uri.contains(words)
        });
        found.next().with_context(|| format!("{verb} {resource}"))
    };
    let deleted = first("delete", "horizontalpodautoscalers", "")?;
    let scaled = first("patch", "deployments", "fieldManager=birb-nest-autoscaler")?;
    ensure!(
        deleted.answered <= scaled.received,
        "scaled before the autoscaler was gone: {scaled:#?} {deleted:#?}"
    );
    world.finish().await
}

/// The spec is changed while nothing may be done about it.
#[tokio::test]
async fn a_nest_that_is_told_to_wake_while_paused_wakes_with_its_workers() -> Result<()> {
    let world = World::where_all_works().await?;
    let spec = "{suspend: true, worker: {scaling: {mode: External}}}";
    world.create("cache", spec).await?;
    world.until_ready("cache", "False", "Suspended").await?;
    until(&world, "cache-worker", 0).await?;
    world.change("cache", "{paused: true}").await?;
    world.change("cache", "{suspend: false}").await?;
    world
        .until_condition("cache", "Progressing", "False", "Paused")
        .await?;
    world.until_ready("cache", "False", "Suspended").await?;
    world.change("cache", "{paused: false}").await?;
    world.until_ready("cache", "True", "Available").await?;
    until(&world, "cache-worker", 1).await?;
    let nest = world.of::<BirbNest>().get("cache").await?;
    assert_eq!(nest.status.context("a status")?.suspension, None);
    world.finish().await
}

#[tokio::test]
async fn another_value_of_the_restart_annotation_replaces_pods() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let job = world.objects("cache").await?;
    world
        .kubectl(
            &[
                "annotate",
                "birbnest",
                "cache",
                "cache.birb.party/restart=now",
            ],
            "",
        )
        .await?;
    let is_restarted = |found: &Deployment| {
        let metadata = found
            .spec
            .as_ref()
            .and_then(|spec| spec.template.metadata.as_ref());
        let annotations = metadata.and_then(|metadata| metadata.annotations.as_ref());
        annotations.is_some_and(|all| {
            all.get("cache.birb.party/restart").map(String::as_str) == Some("now")
        })
    };
    for name in ["cache-api", "cache-worker"] {
        world.until::<Deployment>(name, is_restarted).await?;
    }
    world.until_ready("cache", "True", "Available").await?;
    // No other setup, no other servers.
    let names = |objects: Vec<(_, String, _)>| -> Vec<_> {
        objects
            .into_iter()
            .map(|(kind, name, _)| (kind, name))
            .collect()
    };
    assert_eq!(names(world.objects("cache").await?), names(job));
    world.finish().await
}

#[tokio::test]
async fn paused_writes_nothing_but_the_status_and_scales_nothing() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    let log = Log::new(stack, "paused").await?;
    create(&world, stack, "paused", "{targetLag: 10, pollInterval: 1s}").await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    world
        .change(
            "cache",
            "{paused: true, api: {replicas: 5}, version: 9.9.9}",
        )
        .await?;
    world
        .until_condition("cache", "Progressing", "False", "Paused")
        .await?;
    let writes = || {
        let own = world.requests()?.into_iter().filter(|request| {
            !["get", "list", "watch"].contains(&request.verb.as_str())
                && !["birbnests", "events"].contains(&request.resource.as_str())
        });
        anyhow::Ok(own.map(|request| request.uri).collect::<Vec<_>>())
    };
    let (before, objects) = (writes()?, world.objects("cache").await?);
    log.write(100).await?;
    // Whatever makes a pass: another spec, a drift, a lag.
    for change in [
        "{worker: {scaling: {minReplicas: 3}}}",
        "{suspend: true}",
        "{suspend: false}",
    ] {
        world.change("cache", change).await?;
        world
            .until_condition("cache", "Progressing", "False", "Paused")
            .await?;
    }
    world
        .until_condition("cache", "ScalingActive", "False", "Paused")
        .await?;
    assert_eq!(world.objects("cache").await?, objects);
    assert_eq!(writes()?, before);
    let edit = json!({ "metadata": { "labels": { "drifted": "yes" } }, "spec": { "replicas": 2 } });
    world
        .of::<Deployment>()
        .patch("cache-worker", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    world
        .change("cache", "{worker: {scaling: {minReplicas: 2}}}")
        .await?;
    world
        .until_condition("cache", "Progressing", "False", "Paused")
        .await?;
    assert_eq!(writes()?, before);

    world.change("cache", "{paused: false}").await?;
    until(&world, "cache-api", 5).await?;
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}
