//! Who says how many pods of the API there are.

use anyhow::{Context, Result};
use birb_nest_e2e::{Fault, eventually};
use k8s_openapi::api::{
    apps::v1::Deployment, autoscaling::v2::HorizontalPodAutoscaler, policy::v1::PodDisruptionBudget,
};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};

use crate::{
    kubelet::Kubelet,
    world::{Shared, World},
};

fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.replicas
}

impl World {
    /// As an autoscaler does.
    async fn scale_api(&self, replicas: i32) -> Result<()> {
        let scale = json!({ "spec": { "replicas": replicas } });
        self.of::<Deployment>()
            .patch_scale("cache-api", &PatchParams::default(), &Patch::Merge(scale))
            .await?;
        Ok(())
    }

    async fn until_apis(&self, number: i32) -> Result<Deployment> {
        let has = move |api: &Deployment| replicas(api) == Some(number);
        self.until("cache-api", has).await
    }
}

fn most(autoscaler: &HorizontalPodAutoscaler) -> Option<i32> {
    Some(autoscaler.spec.as_ref()?.max_replicas)
}

#[tokio::test]
async fn an_autoscaler_is_put_back_followed_by_the_budget_and_removed() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .create(
            "cache",
            "{api: {autoscaling: {minReplicas: 1, maxReplicas: 6}}}",
        )
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.until_apis(1).await?;
    world.until_gone::<PodDisruptionBudget>("cache-api").await?;
    world.scale_api(5).await?;
    world
        .until::<PodDisruptionBudget>("cache-api", |_| true)
        .await?;
    assert_eq!(
        replicas(&world.of::<Deployment>().get("cache-api").await?),
        Some(5)
    );

    let autoscalers = world.of::<HorizontalPodAutoscaler>();
    let more = json!({ "spec": { "maxReplicas": 60 } });
    autoscalers
        .patch("cache-api", &PatchParams::default(), &Patch::Merge(more))
        .await?;
    world
        .until::<HorizontalPodAutoscaler>("cache-api", |found| most(found) == Some(6))
        .await?;
    let before = autoscalers.get("cache-api").await?.uid();
    autoscalers
        .delete("cache-api", &DeleteParams::default())
        .await?;
    world
        .until::<HorizontalPodAutoscaler>("cache-api", |found| found.uid() != before)
        .await?;

    world
        .change("cache", "{api: {autoscaling: null, replicas: 3}}")
        .await?;
    world
        .until_gone::<HorizontalPodAutoscaler>("cache-api")
        .await?;
    world.until_apis(3).await?;
    world.finish().await
}

/// How a person changes `spec.api`.
#[derive(Clone, Copy, Debug)]
enum By {
    /// `kubectl apply`
    Client,
    /// `kubectl apply --server-side`
    Server,
}

impl World {
    async fn apply(&self, by: By, api: &Value) -> Result<()> {
        let nest = json!({ "apiVersion": "cache.birb.party/v1alpha1", "kind": "BirbNest",
                           "metadata": { "name": "cache" }, "spec": { "api": api } });
        let arguments: &[&str] = match by {
            By::Client => &["apply", "--filename=-"],
            By::Server => &["apply", "--server-side", "--filename=-"],
        };
        self.kubectl(arguments, &nest.to_string()).await?;
        Ok(())
    }
}

#[tokio::test]
async fn replicas_and_autoscaling_are_switched_both_ways_and_never_pass_through_one() -> Result<()>
{
    for by in [By::Client, By::Server] {
        let world = World::where_all_works().await?;
        world.apply(by, &json!({ "replicas": 4 })).await?;
        world.until_ready("cache", "True", "Available").await?;
        let seen = world.watch_replicas("cache-api").await?;

        let bounds = json!({ "minReplicas": 2, "maxReplicas": 9 });
        world.apply(by, &json!({ "autoscaling": bounds })).await?;
        world
            .until::<HorizontalPodAutoscaler>("cache-api", |_| true)
            .await?;
        world.until_ready("cache", "True", "Available").await?;
        let stored = world.dynamic_nests().get("cache").await?;
        let api = &stored.data["spec"]["api"];
        assert!(api.get("replicas").is_none(), "{by:?}: {api}");
        world.scale_api(7).await?;
        world.until_ready("cache", "True", "Available").await?;
        // A pass that changes the Deployment leaves the number alone.
        world.change("cache", "{cache: {maxTtl: 1h}}").await?;
        world
            .until::<Deployment>("cache-api", |api| {
                serde_json::to_string(api).is_ok_and(|text| text.contains("API_MAX_TTL"))
            })
            .await?;

        world.apply(by, &json!({ "replicas": 5 })).await?;
        world.until_apis(5).await?;
        world
            .until_gone::<HorizontalPodAutoscaler>("cache-api")
            .await?;
        let stored = world.dynamic_nests().get("cache").await?;
        let api = &stored.data["spec"]["api"];
        assert!(api.get("autoscaling").is_none(), "{by:?}: {api}");
        assert_eq!(seen.finish().await, [4, 7, 5], "{by:?}");
        world.finish().await.with_context(|| format!("{by:?}"))?;
    }
    Ok(())
}

/// The pass has seen Deployments that are gone when it comes to them.
#[tokio::test]
async fn deployments_that_go_in_the_middle_of_a_pass_are_made_with_their_number() -> Result<()> {
    let (shared, proxy) = Shared::behind_proxy("middle", &[]).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    let spec = "{api: {autoscaling: {minReplicas: 3, maxReplicas: 4}}, worker: {scaling: {minReplicas: 2}}}";
    world.create("cache", spec).await?;
    world.until_ready("cache", "True", "Available").await?;

    proxy.fault(Fault::HoldServices("cache"));
    world
        .change("cache", "{api: {service: {annotations: {its: other}}}}")
        .await?;
    eventually("a pass is held", || async {
        let hit = proxy.hit();
        Ok(hit
            .contains("services")
            .then_some(())
            .ok_or(format!("{hit:?}")))
    })
    .await?;
    for name in ["cache-api", "cache-worker"] {
        let deployments = world.of::<Deployment>();
        deployments
            .delete(name, &DeleteParams::background())
            .await?;
        world.until_gone::<Deployment>(name).await?;
    }
    proxy.heal();
    for (name, number) in [("cache-api", 3), ("cache-worker", 2)] {
        let made = world.until::<Deployment>(name, |_| true).await?;
        assert_eq!(replicas(&made), Some(number), "{name}");
    }
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}
