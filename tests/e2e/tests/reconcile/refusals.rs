//! What the API server refuses is a condition in its words, told once, and heals; and whatever is in the way, nobody asks in a
//! loop whether it still is.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::{Request, eventually, requests};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ResourceQuota, Service},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use crate::{
    kubelet::{Kubelet, SetupPlay},
    world::{Shared, World},
};

/// A quota that allows none of what is `counted`.
async fn forbid(world: &World, counted: &str) -> Result<()> {
    let quotas: Api<ResourceQuota> = world.of();
    let none = json!({ counted: "0" });
    let quota = json!({ "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "none" },
                        "spec": { "hard": none } });
    quotas
        .create(&PostParams::default(), &serde_json::from_value(quota)?)
        .await?;
    // The quota's own controller does not run here.
    let used = json!({ "status": { "hard": none, "used": none } });
    quotas
        .patch_status("none", &PatchParams::default(), &Patch::Merge(used))
        .await?;
    Ok(())
}

#[tokio::test]
async fn a_quota_in_the_way_is_a_condition_that_heals() -> Result<()> {
    let world = World::where_all_works().await?;
    for (number, counted) in [
        "count/secrets",
        "count/services",
        "count/statefulsets.apps",
        "count/jobs.batch",
        "count/deployments.apps",
    ]
    .into_iter()
    .enumerate()
    {
        forbid(&world, counted).await?;
        let nest = format!("cache-{number}");
        world.create(&nest, "{}").await?;
        let message = world.until_ready(&nest, "False", "InvalidObject").await?;
        ensure!(
            message.contains("exceeded quota") && message.contains(counted),
            "{message}"
        );
        let quotas: Api<ResourceQuota> = world.of();
        quotas.delete("none", &DeleteParams::default()).await?;
        world.until_ready(&nest, "True", "Available").await?;
        world.until_told(&nest, "InvalidObject").await?;
    }
    world.finish().await
}

/// Nobody is watched before nothing has happened for so long.
const REST: Duration = Duration::from_secs(3);
/// How long those are watched that wait. Shorter than what `--retry` is here: one pass, if time has come to look again. And longer
/// than what is left of that after the rest: a pass, if time is what brings it.
const WINDOW: Duration = Duration::from_secs(13);

/// With pauses like those of production, where other tests are in a hurry. What a change must mend, of the nest or of something
/// else that is watched, is not looked at at all.
#[tokio::test]
async fn whatever_is_in_the_way_is_hardly_looked_at() -> Result<()> {
    let flags = ["--resync=10m", "--retry=14s", "--setup-retry=60s"];
    let shared = Shared::with_flags("waiting", &flags).await?;
    let world = async |kubelet: Kubelet| -> Result<World> {
        let mut world = World::on(Arc::clone(&shared)).await?;
        world.play(kubelet);
        Ok(world)
    };
    let setup = |code, words| Kubelet {
        setup: SetupPlay::Ends(code, words),
        ..Kubelet::default()
    };
    let unreachable = world(setup(75, "PostgreSQL at db:5432 cannot be reached")).await?;
    let old_nats = world(setup(78, "it runs nats-server 2.10.27")).await?;
    let foreign = world(Kubelet::default()).await?;
    let service = json!({ "metadata": { "name": "cache" }, "spec": { "ports": [{ "port": 1 }] } });
    let services: Api<Service> = foreign.of();
    services
        .create(&PostParams::default(), &serde_json::from_value(service)?)
        .await?;
    let quota = world(Kubelet::default()).await?;
    forbid(&quota, "count/deployments.apps").await?;
    // They get nowhere, so there is nothing to play.
    let no_secret = World::on(Arc::clone(&shared)).await?;
    let lost = World::on(Arc::clone(&shared)).await?;
    lost.volume("data-cache-postgres-0").await?;
    let overridden = world(Kubelet::default()).await?;
    let no_template = world(Kubelet::default()).await?;
    let invalid = world(Kubelet::default()).await?;
    let down = Kubelet {
        servers: false,
        ..Kubelet::default()
    };
    let down = world(down).await?;
    let external = "{postgres: {external: {urlSecretRef: {name: servers, key: postgres}}}}";
    // As the operator sees itself, and as only the API server knows.
    let template = "{api: {podTemplate: {spec: {containers: [{name: api, image: other}]}}}}";
    let odd_name = "{worker: {podTemplate: {spec: {priorityClassName: NOT A NAME}}}}";
    let odd_size = "{api: {resources: {requests: {memory: 2Gi}, limits: {memory: 1Gi}}}}";
    let waiting = [
        (unreachable, "{}", "ServerUnreachable", 1),
        (old_nats, "{}", "MigrationFailed", 0),
        (foreign, "{}", "NameConflict", 1),
        (quota, "{}", "InvalidObject", 1),
        (invalid, odd_size, "InvalidObject", 0),
        (no_secret, external, "SecretMissing", 0),
        (lost, "{}", "CredentialsLost", 1),
        (overridden, template, "PodTemplateInvalid", 0),
        (no_template, odd_name, "PodTemplateInvalid", 0),
        (down, "{}", "ServerNotReady", 1),
    ];
    for (world, spec, ..) in &waiting {
        world.create("cache", spec).await?;
    }
    for (world, _, reason, _) in &waiting {
        world.until_ready("cache", "False", reason).await?;
    }
    // What was written on the way there causes a pass of its own.
    let mut begun = Vec::new();
    for (world, ..) in &waiting {
        begun.push(until_at_rest(world).await?);
    }
    tokio::time::sleep(WINDOW).await;
    let mut too_often = Vec::new();
    for ((world, spec, reason, most), begun) in waiting.into_iter().zip(begun) {
        let window = begun..begun + WINDOW;
        let n = passes(&world)?
            .iter()
            .filter(|at| window.contains(at))
            .count();
        println!("{reason} {spec}: {n} passes in {WINDOW:?}");
        if n > most {
            too_often.push((reason, spec, n));
        }
        world.finish().await?;
    }
    ensure!(too_often.is_empty(), "looked at too often: {too_often:?}");
    Ok(())
}

/// When the passes over the nest of `world` began: each begins with the nest itself.
fn passes(world: &World) -> Result<Vec<Timestamp>> {
    let all = requests(&world.shared.cluster, &world.shared.installation)?.into_iter();
    let is_first = |request: &Request| {
        request.namespace == world.namespace
            && request.verb == "get"
            && request.resource == "birbnests"
    };
    Ok(all.filter(is_first).map(|first| first.received).collect())
}

/// Waits until no pass over the nest of `world` has begun for a while; returns the time.
async fn until_at_rest(world: &World) -> Result<Timestamp> {
    eventually("no pass begins any more", || async {
        let last = passes(world)?.pop().context("there was one")?;
        let now = Timestamp::now();
        Ok(if now.duration_since(last).unsigned_abs() >= REST {
            Ok(now)
        } else {
            Err(format!("one began at {last}"))
        })
    })
    .await
}

/// Not only what is applied can be refused.
#[tokio::test]
async fn a_policy_in_the_way_is_a_condition_that_heals() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let policy = Policy::begin(&world, 0).await?;

    world.change("cache", "{api: {replicas: 1}}").await?;
    let message = world.until_ready("cache", "False", "InvalidObject").await?;
    ensure!(
        message.contains("PodDisruptionBudget cache-api") && message.contains("as the test says"),
        "{message}"
    );
    policy.end().await?;
    world.until_ready("cache", "True", "Available").await?;
    world.until_gone::<PodDisruptionBudget>("cache-api").await?;
    world.until_told("cache", "InvalidObject").await?;

    let policy = Policy::begin(&world, 0).await?;
    world.change("cache", "{suspend: true}").await?;
    let message = world.until_ready("cache", "False", "InvalidObject").await?;
    ensure!(
        message.contains("Deployment cache-api") && message.contains("as the test says"),
        "{message}"
    );
    policy.end().await?;
    world
        .until::<Deployment>("cache-api", |api| replicas(api) == Some(0))
        .await?;
    world.finish().await
}

fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.replicas
}

/// Whom to wake is not forgotten when it fails at first.
#[tokio::test]
async fn workers_that_may_not_be_woken_at_first_are_woken_later() -> Result<()> {
    let world = World::where_all_works().await?;
    let spec = "{suspend: true, worker: {scaling: {mode: External}}}";
    world.create("cache", spec).await?;
    world.until_ready("cache", "False", "Suspended").await?;
    let number = async |number: i32| {
        let has = move |worker: &Deployment| replicas(worker) == Some(number);
        world.until::<Deployment>("cache-worker", has).await
    };
    number(0).await?;
    let policy = Policy::begin(&world, 1).await?;
    world.change("cache", "{suspend: false}").await?;
    let message = world.until_ready("cache", "False", "InvalidObject").await?;
    ensure!(message.contains("Deployment cache-worker"), "{message}");
    policy.end().await?;
    world.until_ready("cache", "True", "Available").await?;
    number(1).await?;
    world.finish().await
}

/// No budget may be deleted in the namespace, and no Deployment have this many replicas.
struct Policy<'a>(&'a World, i32);

impl<'a> Policy<'a> {
    async fn begin(world: &'a World, refused: i32) -> Result<Self> {
        let name = &world.namespace;
        let kind = "admissionregistration.k8s.io/v1";
        let policy = json!({ "apiVersion": kind, "kind": "ValidatingAdmissionPolicy", "metadata": { "name": name }, "spec": {
            "matchConstraints": { "resourceRules": [
                { "apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["deployments"] },
                { "apiGroups": ["policy"], "apiVersions": ["v1"], "operations": ["DELETE"], "resources": ["poddisruptionbudgets"] },
            ] },
            "validations": [{ "expression": format!("request.operation != 'DELETE' && object.spec.replicas != {refused}"),
                              "message": "as the test says" }],
        } });
        let here = json!({ "matchLabels": { "kubernetes.io/metadata.name": name } });
        let binding = json!({ "apiVersion": kind, "kind": "ValidatingAdmissionPolicyBinding", "metadata": { "name": name },
            "spec": { "policyName": name, "validationActions": ["Deny"], "matchResources": { "namespaceSelector": here } } });
        for object in [policy, binding] {
            world
                .kubectl(&["apply", "--filename=-"], &object.to_string())
                .await?;
        }
        let policy = Self(world, refused);
        policy.until(true).await?;
        Ok(policy)
    }

    async fn end(self) -> Result<()> {
        let name = &self.0.namespace;
        let bindings = "validatingadmissionpolicybindings";
        self.0.kubectl(&["delete", bindings, name], "").await?;
        self.until(false).await
    }

    /// The API server takes notice of policies in its own time.
    async fn until(&self, stands: bool) -> Result<()> {
        let deployments: Api<Deployment> = self.0.of();
        let refused = Patch::Merge(json!({ "spec": { "replicas": self.1 } }));
        let try_out = PatchParams::default().dry_run();
        eventually("the API server has taken notice of the policy", || async {
            let tried = deployments.patch("cache-api", &try_out, &refused).await;
            Ok(if tried.is_err() == stands {
                Ok(())
            } else {
                Err(format!("{:?}", tried.map(|it| it.name_any())))
            })
        })
        .await
    }
}
