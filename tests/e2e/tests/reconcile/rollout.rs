//! From nothing to ready, and from one state to another.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use anyhow::{Context, Result};
use birb_nest_e2e::names_of;
use birb_nest_operator::api::BirbNest;
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    batch::v1::Job,
    core::v1::{Secret, Service},
};
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{
    kubelet::{Kubelet, SetupPlay, Waiting},
    world::World,
};

fn image(deployment: &Deployment) -> Option<&str> {
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.as_deref()
}

fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.replicas
}

#[tokio::test]
async fn the_first_pass_creates_and_the_next_changes_nothing() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let all = ListParams::default();
    assert_eq!(
        names_of(&world.of::<Deployment>().list(&all).await?.items),
        ["cache-api", "cache-worker"]
    );
    assert_eq!(
        names_of(&world.of::<StatefulSet>().list(&all).await?.items),
        ["cache-nats", "cache-postgres", "cache-redis"]
    );
    assert_eq!(
        names_of(&world.of::<Service>().list(&all).await?.items),
        [
            "cache",
            "cache-nats",
            "cache-nats-headless",
            "cache-postgres",
            "cache-redis"
        ]
    );
    let before = world.objects("cache").await?;
    assert_eq!(
        before.len(),
        2 + 3 + 5 + 3 + 3 + 1 + 1 + 1 + 3,
        "{before:#?}"
    );

    // Says what was meant anyway, so only the generation is another one.
    world
        .change("cache", "{worker: {scaling: {mode: Lag}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    assert_eq!(world.objects("cache").await?, before);
    world.finish().await
}

#[tokio::test]
async fn new_pods_that_fail_say_why_while_old_ones_serve() -> Result<()> {
    let mut world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world.play(Kubelet {
        works: Arc::new(|deployment| deployment.name_any() != "cache-api"),
        ..Kubelet::default()
    });
    world
        .change("cache", "{cache: {maxValueBytes: 2048}}")
        .await?;
    let api = world
        .until::<Deployment>("cache-api", |api| {
            let seen = api.status.as_ref().and_then(|it| it.observed_generation);
            api.metadata.generation > seen
        })
        .await?;

    let template = api.spec.clone().context("it has a spec")?.template;
    let name = "cache-api-new".to_owned();
    let pod = Waiting::start(&world.client, &api, name, template).await?;
    let words = "NATS takes messages of 1024 bytes, too few for values of 2048";
    pod.crashes(78, words).await?;
    // As its controller would: beside one new pod, old ones are all there.
    let says = async |progressing: &str, reason: &str| {
        let n = replicas(&api);
        let now = jiff::Timestamp::now().to_string();
        let status = json!({ "status": {
            "observedGeneration": api.metadata.generation, "replicas": n.map(|n| n + 1), "updatedReplicas": 1,
            "readyReplicas": n, "availableReplicas": n,
            "conditions": [{ "type": "Progressing", "status": progressing, "reason": reason, "message": reason,
                             "lastUpdateTime": now, "lastTransitionTime": now }],
        } });
        let (params, merge) = (PatchParams::default(), Patch::Merge(status));
        let deployments = world.of::<Deployment>();
        deployments.patch_status("cache-api", &params, &merge).await
    };
    let told = format!("API: pod cache-api-new: CrashLoopBackOff: exit code 78: {words}");
    says("True", "ReplicaSetUpdated").await?;
    birb_nest_e2e::eventually("what holds it up is told", || async {
        let message = world
            .until_condition("cache", "Progressing", "True", "RollingOut")
            .await?;
        Ok(message.contains(&told).then_some(()).ok_or(message))
    })
    .await?;
    world.until_ready("cache", "True", "Available").await?;

    says("False", "ProgressDeadlineExceeded").await?;
    let message = world
        .until_condition("cache", "Degraded", "True", "RolloutStuck")
        .await?;
    assert_eq!(
        message,
        format!("API: ProgressDeadlineExceeded: {}", &told["API: ".len()..])
    );
    world.until_ready("cache", "True", "Available").await?;
    world.until_told("cache", "RolloutStuck").await?;

    says("True", "NewReplicaSetAvailable").await?;
    world
        .until_condition("cache", "Degraded", "False", "AsExpected")
        .await?;
    birb_nest_e2e::told(&world.client, &world.namespace, "cache", "Available", 2).await?;
    world.finish().await
}

#[tokio::test]
async fn servers_come_first_then_setup_then_pods() -> Result<()> {
    let mut world = World::new().await?;
    let nothing_works = Kubelet {
        servers: false,
        setup: SetupPlay::Hangs,
        works: Arc::new(|_| false),
    };
    world.play(nothing_works.clone());
    world.create("cache", "{}").await?;
    let message = world
        .until_ready("cache", "False", "ServerNotReady")
        .await?;
    assert!(
        message.contains("cache-nats") && message.contains("kubectl describe"),
        "{message}"
    );
    assert!(
        world
            .of::<Job>()
            .list(&ListParams::default())
            .await?
            .items
            .is_empty()
    );

    let servers_work = Kubelet {
        servers: true,
        ..nothing_works
    };
    world.play(servers_work.clone());
    world.until_ready("cache", "False", "SetupRunning").await?;
    assert!(
        world
            .of::<Deployment>()
            .list(&ListParams::default())
            .await?
            .items
            .is_empty()
    );

    let setup_works = Kubelet {
        setup: SetupPlay::Succeeds,
        ..servers_work
    };
    world.play(setup_works.clone());
    world.until_ready("cache", "False", "PodsNotReady").await?;

    world.play(Kubelet::default());
    world.until_ready("cache", "True", "Available").await?;
    for reason in [
        "ServerNotReady",
        "SetupRunning",
        "PodsNotReady",
        "Available",
    ] {
        world.until_told("cache", reason).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn pods_that_are_gone_clear_ready() -> Result<()> {
    let mut world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world.play(Kubelet {
        works: Arc::new(|_| false),
        ..Kubelet::default()
    });
    let gone = json!({ "status": { "readyReplicas": null, "availableReplicas": null } });
    world
        .of::<Deployment>()
        .patch_status("cache-api", &PatchParams::default(), &Patch::Merge(gone))
        .await?;
    world.until_ready("cache", "False", "PodsNotReady").await?;
    world
        .until_condition("cache", "APIAvailable", "False", "PodsNotReady")
        .await?;
    world.finish().await
}

#[tokio::test]
async fn a_failed_setup_keeps_the_old_pods_and_says_why() -> Result<()> {
    let mut world = World::where_all_works().await?;
    world.create("cache", "{version: 1.0.0}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let first = world.of::<Job>().list(&ListParams::default()).await?.items;
    assert_eq!(first.len(), 1);

    world.play(Kubelet {
        setup: SetupPlay::Ends(
            78,
            "PostgreSQL at db:5432 is 14.2; birb-nest needs 15 or newer",
        ),
        ..Kubelet::default()
    });
    world.change("cache", "{version: 2.0.0}").await?;
    let message = world
        .until_ready("cache", "False", "MigrationFailed")
        .await?;
    assert!(message.contains("birb-nest needs 15 or newer"), "{message}");
    world
        .until_condition("cache", "APIAvailable", "True", "Available")
        .await?;
    world
        .until_condition("cache", "Degraded", "True", "MigrationFailed")
        .await?;
    for name in ["cache-api", "cache-worker"] {
        let deployment = world.of::<Deployment>().get(name).await?;
        assert!(
            image(&deployment).is_some_and(|image| image.ends_with(":1.0.0")),
            "{name}"
        );
    }

    // As the message says.
    let failed = message.rsplit(' ').next().context("a job's name")?;
    world.play(Kubelet::default());
    world
        .of::<Job>()
        .delete(failed, &DeleteParams::background())
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let deployment = world.of::<Deployment>().get("cache-api").await?;
    assert!(image(&deployment).is_some_and(|image| image.ends_with(":2.0.0")));
    world.until_gone::<Job>(&names_of(&first)[0]).await?;
    world.finish().await
}

#[tokio::test]
async fn a_new_release_reaches_workers_only_when_the_api_has_it() -> Result<()> {
    let mut world = World::where_all_works().await?;
    world.create("cache", "{version: 1.0.0}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let api_works = Arc::new(AtomicBool::new(false));
    let may = Arc::clone(&api_works);
    let is_old =
        |deployment: &Deployment| image(deployment).is_some_and(|image| image.ends_with(":1.0.0"));
    world.play(Kubelet {
        works: Arc::new(move |deployment| is_old(deployment) || may.load(Ordering::Relaxed)),
        ..Kubelet::default()
    });
    world.change("cache", "{version: 2.0.0}").await?;
    world
        .until::<Deployment>("cache-api", |api| !is_old(api))
        .await?;
    world
        .until_condition("cache", "Progressing", "True", "RollingOut")
        .await?;
    assert!(is_old(&world.of::<Deployment>().get("cache-worker").await?));
    let status = world
        .of::<BirbNest>()
        .get("cache")
        .await?
        .status
        .context("a status")?;
    assert_eq!(status.version.as_deref(), Some("1.0.0"));

    api_works.store(true, Ordering::Relaxed);
    world
        .until::<Deployment>("cache-worker", |worker| !is_old(worker))
        .await?;
    world
        .until_condition("cache", "Progressing", "False", "AsExpected")
        .await?;
    let status = world
        .of::<BirbNest>()
        .get("cache")
        .await?
        .status
        .context("a status")?;
    assert_eq!(status.version.as_deref(), Some("2.0.0"));
    world.finish().await
}

#[tokio::test]
async fn two_nests_in_one_namespace_share_nothing() -> Result<()> {
    let Some(world) = World::where_garbage_is_collected().await? else {
        return Ok(());
    };
    world.create("one", "{}").await?;
    world.create("two", "{nats: {shards: 2}}").await?;
    world.until_ready("one", "True", "Available").await?;
    world.until_ready("two", "True", "Available").await?;
    let (one, two) = (world.objects("one").await?, world.objects("two").await?);
    assert_eq!(one.len(), two.len());
    let password = async |name: &str| -> Result<_> {
        let secret = world.of::<Secret>().get(name).await?;
        Ok(secret.data.context("data")?["password"].clone())
    };
    assert_ne!(
        password("one-postgres").await?,
        password("two-postgres").await?
    );

    world
        .of::<BirbNest>()
        .delete("one", &DeleteParams::default())
        .await?;
    world.until_gone::<Deployment>("one-api").await?;
    world.until_gone::<Service>("one").await?;
    world.until_ready("two", "True", "Available").await?;
    let still: Vec<_> = world
        .objects("two")
        .await?
        .into_iter()
        .map(|(kind, name, _)| (kind, name))
        .collect();
    assert_eq!(
        still,
        two.into_iter()
            .map(|(kind, name, _)| (kind, name))
            .collect::<Vec<_>>()
    );
    world.finish().await
}

#[tokio::test]
async fn replicas_of_the_api_that_somebody_edits_are_put_back() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let edit = json!({ "spec": { "replicas": 9 } });
    world
        .of::<Deployment>()
        .patch("cache-api", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    world
        .until::<Deployment>("cache-api", |api| replicas(api) == Some(2))
        .await?;
    world.finish().await
}

#[tokio::test]
async fn a_restart_by_kubectl_survives() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world
        .kubectl(&["rollout", "restart", "deployment/cache-api"], "")
        .await?;
    world.change("cache", "{api: {replicas: 3}}").await?;
    let api = world
        .until::<Deployment>("cache-api", |api| replicas(api) == Some(3))
        .await?;
    let annotations = api
        .spec
        .and_then(|spec| spec.template.metadata?.annotations)
        .unwrap_or_default();
    assert!(
        annotations.contains_key("kubectl.kubernetes.io/restartedAt"),
        "{annotations:?}"
    );
    world.finish().await
}

#[tokio::test]
async fn workers_scaled_by_others_never_pass_through_one() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .create("cache", "{worker: {scaling: {mode: Fixed, replicas: 7}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    // Every state that the Deployment passes through.
    let seen = world.watch_replicas("cache-worker").await?;

    world
        .change("cache", "{worker: {scaling: {mode: External}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let scale = json!({ "spec": { "replicas": 6 } });
    world
        .of::<Deployment>()
        .patch_scale(
            "cache-worker",
            &PatchParams::default(),
            &Patch::Merge(scale),
        )
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    // Passes over a nest in this mode leave the number alone.
    world
        .change("cache", "{worker: {batch: {size: 100}}}")
        .await?;
    world
        .until::<Deployment>("cache-worker", |worker| {
            serde_json::to_string(worker).is_ok_and(|text| text.contains("WORKER_BATCH_SIZE"))
        })
        .await?;
    assert_eq!(
        replicas(&world.of::<Deployment>().get("cache-worker").await?),
        Some(6)
    );

    world
        .change("cache", "{worker: {scaling: {mode: Fixed, replicas: 5}}}")
        .await?;
    world
        .until::<Deployment>("cache-worker", |worker| replicas(worker) == Some(5))
        .await?;
    assert_eq!(seen.finish().await, [7, 6, 5]);
    world.finish().await
}

#[tokio::test]
async fn a_setup_job_that_is_there_is_not_applied_again() -> Result<()> {
    let mut world = World::new().await?;
    world.play(Kubelet {
        setup: SetupPlay::Hangs,
        ..Kubelet::default()
    });
    world.create("cache", "{}").await?;
    world.until_ready("cache", "False", "SetupRunning").await?;
    // What a person adds whose image cannot be pulled. A Job's template cannot be changed.
    world
        .change("cache", "{image: {pullSecrets: [mirror]}}")
        .await?;
    world.until_ready("cache", "False", "SetupRunning").await?;
    world.play(Kubelet::default());
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

#[tokio::test]
async fn a_finished_setup_job_may_be_tidied_up() -> Result<()> {
    let mut world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world.play(Kubelet {
        setup: SetupPlay::Hangs,
        ..Kubelet::default()
    });
    let all = ListParams::default();
    let jobs = names_of(&world.of::<Job>().list(&all).await?.items);
    world
        .of::<Job>()
        .delete(&jobs[0], &DeleteParams::background())
        .await?;
    world.until_gone::<Job>(&jobs[0]).await?;
    world.change("cache", "{api: {replicas: 3}}").await?;
    world
        .until::<Deployment>("cache-api", |api| replicas(api) == Some(3))
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    assert!(world.of::<Job>().list(&all).await?.items.is_empty());
    world.finish().await
}

#[tokio::test]
async fn workers_are_scaled_while_a_pod_of_the_api_is_missing() -> Result<()> {
    let mut world = World::where_all_works().await?;
    world
        .create("cache", "{worker: {scaling: {mode: Fixed}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.play(Kubelet {
        works: Arc::new(|deployment| deployment.metadata.name.as_deref() != Some("cache-api")),
        ..Kubelet::default()
    });
    let one = json!({ "status": { "readyReplicas": 1, "availableReplicas": 1 } });
    world
        .of::<Deployment>()
        .patch_status("cache-api", &PatchParams::default(), &Patch::Merge(one))
        .await?;
    world
        .kubectl(&["scale", "birbnest", "cache", "--replicas=4"], "")
        .await?;
    world
        .until::<Deployment>("cache-worker", |worker| replicas(worker) == Some(4))
        .await?;
    world.finish().await
}
