//! Managed and external servers, and what happens when somebody else's are not as they should be.

use anyhow::{Context, Result};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    batch::v1::Job,
    core::v1::{ConfigMap, Secret, Service},
};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use crate::{
    kubelet::{Kubelet, SetupPlay, Waiting},
    world::World,
};

/// How each union is switched: the server, and its external member.
const UNIONS: [(&str, &str); 3] = [
    ("redis", "{urlSecretRef: {name: servers, key: redis}}"),
    (
        "nats",
        "{url: 'nats://nats.infra:4222', user: nest, passwordSecretRef: {name: servers, key: nats}}",
    ),
    ("postgres", "{urlSecretRef: {name: servers, key: postgres}}"),
];

async fn with_servers() -> Result<World> {
    let world = World::where_all_works().await?;
    let data = [
        ("redis", "redis://redis.infra:6379/0"),
        ("nats", "secret"),
        ("postgres", "postgres://birb:secret@postgres.infra/birb"),
    ];
    world.secret("servers", &data).await?;
    Ok(world)
}

fn manifest(spec: &str) -> String {
    format!(
        "{{apiVersion: cache.birb.party/v1alpha1, kind: BirbNest, metadata: {{name: cache}}, spec: {spec}}}"
    )
}

/// Each server external and managed again, the whole spec applied by `apply`, which is kubectl's.
async fn unions_are_switched(apply: &[&str]) -> Result<()> {
    let world = with_servers().await?;
    world.kubectl(apply, &manifest("{}")).await?;
    world.until_ready("cache", "True", "Available").await?;
    for (server, external) in UNIONS {
        let set = format!("cache-{server}");
        world
            .kubectl(
                apply,
                &manifest(&format!("{{{server}: {{external: {external}}}}}")),
            )
            .await?;
        world.until_ready("cache", "True", "Available").await?;
        // What is not wanted goes when what is wanted works.
        world
            .until_gone::<StatefulSet>(&set)
            .await
            .with_context(|| format!("{server} is external"))?;
        world.until_gone::<Service>(&set).await?;
        assert!(
            world.of::<Secret>().get_opt(&set).await?.is_some(),
            "the password stays"
        );
        assert_placement(&world, server, "External").await?;

        world
            .kubectl(
                apply,
                &manifest(&format!("{{{server}: {{managed: {{}}}}}}")),
            )
            .await?;
        world
            .until::<StatefulSet>(&set, |_| true)
            .await
            .with_context(|| format!("{server} is managed"))?;
        world.until_ready("cache", "True", "Available").await?;
        assert_placement(&world, server, "Managed").await?;
        let stored = world.dynamic_nests().get("cache").await?;
        assert!(
            stored.data["spec"][server].get("external").is_none(),
            "{server}: {}",
            stored.data["spec"]
        );

        world.kubectl(apply, &manifest("{}")).await?;
        world.until_ready("cache", "True", "Available").await?;
        let stored = world.dynamic_nests().get("cache").await?;
        assert!(
            stored.data["spec"][server].get("managed").is_none(),
            "{server}: {}",
            stored.data["spec"]
        );
    }
    world.finish().await
}

async fn assert_placement(world: &World, server: &str, placement: &str) -> Result<()> {
    let stored = world.dynamic_nests().get("cache").await?;
    assert_eq!(
        stored.data["status"]["resolved"][server], placement,
        "{server}"
    );
    Ok(())
}

#[tokio::test]
async fn unions_are_switched_both_ways_by_client_side_apply() -> Result<()> {
    unions_are_switched(&["apply", "--filename=-"]).await
}

#[tokio::test]
async fn unions_are_switched_both_ways_by_server_side_apply() -> Result<()> {
    unions_are_switched(&["apply", "--server-side", "--filename=-"]).await
}

#[tokio::test]
async fn a_server_that_became_external_keeps_its_volume() -> Result<()> {
    let world = with_servers().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    // As the StatefulSet's controller would: tied to the set.
    let set = world.of::<StatefulSet>().get("cache-nats").await?;
    let claim = json!({
        "apiVersion": "v1", "kind": "PersistentVolumeClaim",
        "metadata": { "name": "data-cache-nats-0", "ownerReferences": [{
            "apiVersion": "apps/v1", "kind": "StatefulSet", "name": "cache-nats", "uid": set.metadata.uid,
        }] },
        "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } } },
    });
    world
        .of()
        .create(
            &PostParams::default(),
            &serde_json::from_value::<Claim>(claim)?,
        )
        .await?;
    world
        .change("cache", "{nats: {external: {url: 'nats://nats.infra:4222', user: nest, passwordSecretRef: {name: servers, key: nats}}}}")
        .await?;
    // Told to let go of it, and not deleted before it has.
    world
        .until::<StatefulSet>("cache-nats", |set| {
            let policy = set
                .spec
                .as_ref()
                .and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref());
            policy.and_then(|policy| policy.when_deleted.as_deref()) == Some("Retain")
        })
        .await?;
    let untied = json!({ "metadata": { "ownerReferences": null } });
    world
        .of::<Claim>()
        .patch(
            "data-cache-nats-0",
            &PatchParams::default(),
            &Patch::Merge(untied),
        )
        .await?;
    // Anything makes a pass happen.
    world.change("cache", "{api: {replicas: 3}}").await?;
    world.until_gone::<StatefulSet>("cache-nats").await?;
    let claim = world.of::<Claim>().get("data-cache-nats-0").await?;
    assert_eq!(claim.metadata.deletion_timestamp, None);
    let secret = world.of::<Secret>().get("cache-nats").await?;
    assert_eq!(secret.metadata.owner_references.unwrap_or_default(), []);
    world.finish().await
}

type Claim = k8s_openapi::api::core::v1::PersistentVolumeClaim;

#[tokio::test]
async fn an_unreachable_server_is_told_of_once_and_heals() -> Result<()> {
    let mut world = World::new().await?;
    let unreachable = "PostgreSQL at postgres.infra:5432 cannot be reached: connection refused";
    world.play(Kubelet {
        setup: SetupPlay::Ends(75, unreachable),
        ..Kubelet::default()
    });
    world.create("cache", "{}").await?;
    let message = world
        .until_ready("cache", "False", "ServerUnreachable")
        .await?;
    assert!(message.contains(unreachable), "{message}");
    world
        .until_condition("cache", "DependenciesReady", "False", "ServerUnreachable")
        .await?;
    let status = world.dynamic_nests().get("cache").await?.data["status"].clone();
    let name = status["migration"]["job"].as_str().context("a job")?;
    // Kubernetes would pause longer and longer: it is begun anew, more than once, and nobody hears of it again.
    let uid = std::sync::Mutex::new(None);
    for _ in 0..3 {
        let next = world
            .until::<Job>(name, |job| {
                job.metadata.uid != *uid.lock().expect("nobody panicked")
            })
            .await?;
        *uid.lock().expect("nobody panicked") = next.metadata.uid;
    }
    world.until_told("cache", "ServerUnreachable").await?;
    // It heals while a setup is at work.
    let at_work = |job: &Job| {
        job.status
            .as_ref()
            .is_some_and(|status| status.active == Some(1))
    };
    world.until::<Job>(name, at_work).await?;
    world.play(Kubelet::default());
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

/// What a node says of a pod changes no object that is watched.
#[tokio::test]
async fn a_server_whose_image_is_nowhere_says_so_and_heals() -> Result<()> {
    let mut world = World::new().await?;
    world.play(Kubelet {
        servers: false,
        ..Kubelet::default()
    });
    let image = "registry.invalid/redis:8";
    let spec = format!("{{redis: {{managed: {{image: '{image}'}}}}}}");
    world.create("cache", &spec).await?;
    world
        .until_ready("cache", "False", "ServerNotReady")
        .await?;
    let set = world.until::<StatefulSet>("cache-redis", |_| true).await?;
    let template = set.spec.clone().context("it has a spec")?.template;
    let name = "cache-redis-0".to_owned();
    let pod = Waiting::start(&world.client, &set, name, template).await?;
    let sentence = format!("failed to pull \"{image}\": no such host");
    for reason in ["ErrImagePull", "ImagePullBackOff"] {
        pod.because(reason, &sentence).await?;
        let told = format!("pod cache-redis-0: {reason}: {sentence}");
        birb_nest_e2e::eventually("what the node says is told", || async {
            let message = world
                .until_ready("cache", "False", "ServerNotReady")
                .await?;
            Ok(if message.contains(&told) {
                Ok(())
            } else {
                Err(message)
            })
        })
        .await?;
    }
    world.change("cache", "{redis: null}").await?;
    // What is played from here on is about the mended pod alone.
    let is_mended = |set: &StatefulSet| {
        let pod = set
            .spec
            .as_ref()
            .and_then(|spec| spec.template.spec.as_ref());
        pod.is_some_and(|pod| pod.containers[0].image.as_deref() != Some(image))
    };
    world.until::<StatefulSet>("cache-redis", is_mended).await?;
    world.play(Kubelet::default());
    world.until_ready("cache", "True", "Available").await?;
    world.until_told("cache", "ServerNotReady").await?;
    world.finish().await
}

#[tokio::test]
async fn objects_of_others_are_left_alone_until_they_are_gone() -> Result<()> {
    let world = World::where_all_works().await?;
    let foreign: Vec<Value> = [("Service", "cache"), ("ConfigMap", "cache-connection")]
        .into_iter()
        .map(|(kind, name)| json!({ "apiVersion": "v1", "kind": kind, "metadata": { "name": name } }))
        .collect();
    let mut service = foreign[0].clone();
    service["spec"] = json!({ "ports": [{ "port": 1 }] });
    world
        .of::<Service>()
        .create(&PostParams::default(), &serde_json::from_value(service)?)
        .await?;
    world
        .of::<ConfigMap>()
        .create(
            &PostParams::default(),
            &serde_json::from_value(foreign[1].clone())?,
        )
        .await?;
    world.create("cache", "{}").await?;
    let message = world.until_ready("cache", "False", "NameConflict").await?;
    assert!(
        message.contains("Service cache") && message.contains("was not made by birb-nest"),
        "{message}"
    );
    let service = world.of::<Service>().get("cache").await?;
    assert!(
        service.metadata.labels.is_none() && service.metadata.owner_references.is_none(),
        "{service:?}"
    );
    assert!(
        world
            .of::<Deployment>()
            .list(&ListParams::default())
            .await?
            .items
            .is_empty()
    );

    world
        .of::<Service>()
        .delete("cache", &DeleteParams::default())
        .await?;
    world
        .of::<ConfigMap>()
        .delete("cache-connection", &DeleteParams::default())
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.until_told("cache", "NameConflict").await?;
    world.finish().await
}

/// Both want a Service `cache-redis`: one for its Redis, the other for its clients.
#[tokio::test]
async fn what_is_another_nests_is_left_alone_until_that_gives_it_up() -> Result<()> {
    let world = with_servers().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let before = world.of::<Service>().get("cache-redis").await?;
    world.create("cache-redis", "{}").await?;
    let message = world
        .until_ready("cache-redis", "False", "NameConflict")
        .await?;
    for words in [
        "Service cache-redis",
        "belongs to BirbNest cache;",
        "give the nest another name",
    ] {
        assert!(message.contains(words), "{message}");
    }
    // Another pass over the one that has it.
    world.change("cache", "{api: {replicas: 3}}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let after = world.of::<Service>().get("cache-redis").await?;
    assert_eq!(after.metadata.uid, before.metadata.uid);
    assert_eq!(
        after.metadata.resource_version,
        before.metadata.resource_version
    );

    let external = format!("{{redis: {{external: {}}}}}", UNIONS[0].1);
    world.change("cache", &external).await?;
    for name in ["cache", "cache-redis"] {
        world.until_ready(name, "True", "Available").await?;
    }
    let taken = world.of::<Service>().get("cache-redis").await?;
    assert_ne!(taken.metadata.uid, before.metadata.uid);
    world.until_told("cache-redis", "NameConflict").await?;
    world.finish().await
}

#[tokio::test]
async fn what_the_api_server_refuses_is_a_condition_that_heals() -> Result<()> {
    let world = World::where_all_works().await?;
    // The schema admits any quantity; the API server knows that a request may not be above its limit.
    world
        .create(
            "cache",
            "{api: {resources: {requests: {memory: 2Gi}, limits: {memory: 1Gi}}}}",
        )
        .await?;
    let message = world.until_ready("cache", "False", "InvalidObject").await?;
    assert!(
        message.contains("cache-api") && message.contains("memory"),
        "{message}"
    );
    world
        .change("cache", "{api: {resources: {limits: {memory: 4Gi}}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

#[tokio::test]
async fn setup_runs_again_on_a_new_volume() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let job = async || -> Result<String> {
        let status = world.dynamic_nests().get("cache").await?.data["status"].clone();
        Ok(status["migration"]["job"]
            .as_str()
            .context("a job")?
            .to_owned())
    };
    let mut jobs = vec![job().await?];
    for replicas in [3, 4] {
        world.volume("data-cache-postgres-0").await?;
        // Anything makes a pass happen.
        let change = format!("{{api: {{replicas: {replicas}}}}}");
        world.change("cache", &change).await?;
        world.until_ready("cache", "True", "Available").await?;
        let next = job().await?;
        assert!(!jobs.contains(&next), "{jobs:?}");
        jobs.push(next);
        let claims = world.of::<Claim>();
        claims
            .delete("data-cache-postgres-0", &DeleteParams::default())
            .await?;
        // The controller that protects claims in use does not run here.
        let unprotected = json!({ "metadata": { "finalizers": null } });
        let params = PatchParams::default();
        let _ = claims
            .patch("data-cache-postgres-0", &params, &Patch::Merge(unprotected))
            .await;
        world.until_gone::<Claim>("data-cache-postgres-0").await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_foreign_deployment_is_not_taken_for_the_nests_own() -> Result<()> {
    let world = World::where_all_works().await?;
    let pod = json!({ "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } });
    let foreign = json!({ "metadata": { "name": "cache-api" },
        "spec": { "replicas": 7, "selector": { "matchLabels": { "a": "b" } }, "template": pod } });
    world
        .of::<Deployment>()
        .create(&PostParams::default(), &serde_json::from_value(foreign)?)
        .await?;
    world.create("cache", "{}").await?;
    let message = world.until_ready("cache", "False", "NameConflict").await?;
    assert!(message.contains("Deployment cache-api"), "{message}");
    world
        .until_condition("cache", "APIAvailable", "False", "WaitingForDependencies")
        .await?;
    assert!(
        world
            .of::<Deployment>()
            .get_opt("cache-worker")
            .await?
            .is_none()
    );
    let untouched = world.of::<Deployment>().get("cache-api").await?;
    assert_eq!(untouched.spec.and_then(|spec| spec.replicas), Some(7));
    world.finish().await
}
