//! What the API server refuses is a condition in its words, told once, and heals; and whatever is in the way, nobody asks in a
//! loop whether it still is.

use std::{sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use birb_nest_e2e::{eventually, requests};
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

/// How long those are watched that wait.
const WINDOW: Duration = Duration::from_secs(10);
/// Passes in that time; one, if time has come to look again.
const PASSES: usize = 2;

/// With the pauses of production, where other tests are in a hurry.
#[tokio::test]
async fn whatever_is_in_the_way_is_hardly_looked_at() -> Result<()> {
    let flags = ["--resync=10m", "--retry=30s", "--setup-retry=60s"];
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
    let down = Kubelet {
        servers: false,
        ..Kubelet::default()
    };
    let down = world(down).await?;
    let external = "{postgres: {external: {urlSecretRef: {name: servers, key: postgres}}}}";
    let template = "{api: {podTemplate: {spec: {containers: [{name: api, image: other}]}}}}";
    let waiting = [
        (unreachable, "{}", "ServerUnreachable"),
        (old_nats, "{}", "MigrationFailed"),
        (foreign, "{}", "NameConflict"),
        (quota, "{}", "InvalidObject"),
        (no_secret, external, "SecretMissing"),
        (lost, "{}", "CredentialsLost"),
        (overridden, template, "PodTemplateInvalid"),
        (down, "{}", "ServerNotReady"),
    ];
    for (world, spec, _) in &waiting {
        world.create("cache", spec).await?;
    }
    for (world, _, reason) in &waiting {
        world.until_ready("cache", "False", reason).await?;
    }
    let asked = |world: &World| -> Result<(usize, usize)> {
        let all = requests(&world.shared.cluster, &world.shared.installation)?;
        let of_it: Vec<_> = all
            .iter()
            .filter(|request| request.namespace == world.namespace)
            .collect();
        // Each pass begins with the nest itself.
        let passes = of_it
            .iter()
            .filter(|request| request.verb == "get" && request.resource == "birbnests");
        Ok((passes.count(), of_it.len()))
    };
    let before = waiting.each_ref().map(|(world, ..)| asked(world));
    tokio::time::sleep(WINDOW).await;
    let mut in_a_loop = Vec::new();
    for ((world, _, reason), before) in waiting.into_iter().zip(before) {
        let (before, after) = (before?, asked(&world)?);
        let (n_passes, n_requests) = (after.0 - before.0, after.1 - before.1);
        println!("{reason}: {n_passes} passes, {n_requests} requests in {WINDOW:?}");
        if n_passes > PASSES {
            in_a_loop.push(reason);
        }
        world.finish().await?;
    }
    ensure!(in_a_loop.is_empty(), "looked at in a loop: {in_a_loop:?}");
    Ok(())
}

/// Not only what is applied can be refused.
#[tokio::test]
async fn a_policy_in_the_way_is_a_condition_that_heals() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let policy = Policy::begin(&world).await?;

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

    let policy = Policy::begin(&world).await?;
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

/// No budget may be deleted in the namespace, and no Deployment scaled to zero.
struct Policy<'a>(&'a World);

impl<'a> Policy<'a> {
    async fn begin(world: &'a World) -> Result<Self> {
        let name = &world.namespace;
        let kind = "admissionregistration.k8s.io/v1";
        let policy = json!({ "apiVersion": kind, "kind": "ValidatingAdmissionPolicy", "metadata": { "name": name }, "spec": {
            "matchConstraints": { "resourceRules": [
                { "apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["UPDATE"], "resources": ["deployments"] },
                { "apiGroups": ["policy"], "apiVersions": ["v1"], "operations": ["DELETE"], "resources": ["poddisruptionbudgets"] },
            ] },
            "validations": [{ "expression": "request.operation != 'DELETE' && object.spec.replicas > 0",
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
        let policy = Self(world);
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
        let zero = Patch::Merge(json!({ "spec": { "replicas": 0 } }));
        let try_out = PatchParams::default().dry_run();
        eventually("the API server has taken notice of the policy", || async {
            let tried = deployments.patch("cache-api", &try_out, &zero).await;
            Ok(if tried.is_err() == stands {
                Ok(())
            } else {
                Err(format!("{:?}", tried.map(|it| it.name_any())))
            })
        })
        .await
    }
}
