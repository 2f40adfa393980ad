//! What a watch is for: one odd object does not stop the others, and no change of a nest is missed.

use anyhow::{Context, Result};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{Operator, client, eventually, install, nothing_forbidden};
use birb_nest_operator::api::BirbNest;
use birb_nest_stack::Root;
use k8s_openapi::{
    api::{core::v1::ServiceAccount, events::v1::Event},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, CustomResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    core::ApiResource,
};
use serde_json::json;

use crate::world::World;

/// In a control plane of its own, whose schema is loosened.
#[tokio::test]
async fn a_nest_that_cannot_be_read_does_not_stop_its_neighbour() -> Result<()> {
    let root = Root::temporary("odd", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let client = client(&cluster).await?;
    // As an older release, or somebody who edits CRDs, may leave it.
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let anything = json!([{ "op": "replace", "path": "/spec/versions/0/schema/openAPIV3Schema", "value": {
        "type": "object", "x-kubernetes-preserve-unknown-fields": true,
    } }]);
    let patch: Patch<()> = Patch::Json(serde_json::from_value(anything)?);
    definitions
        .patch(BirbNest::crd_name(), &PatchParams::default(), &patch)
        .await?;

    let resource = ApiResource::erase::<BirbNest>(&());
    let nests: Api<DynamicObject> = Api::default_namespaced_with(client.clone(), &resource);
    let create = async |name: &str, spec: serde_json::Value| -> Result<()> {
        let nest = json!({ "apiVersion": "cache.birb.party/v1alpha1", "kind": "BirbNest",
                           "metadata": { "name": name }, "spec": spec });
        let nest: DynamicObject = serde_json::from_value(nest)?;
        nests.create(&PostParams::default(), &nest).await?;
        Ok(())
    };
    let odd = json!({ "nats": "not an object" });
    eventually("the loosened schema is in force", || async {
        Ok(create("odd", odd.clone())
            .await
            .map_err(|error| format!("{error:#}")))
    })
    .await?;

    let operator = Operator::start(&cluster, &installation, root.path(), "operator").await?;
    create("cache", json!({})).await?;
    let accounts: Api<ServiceAccount> = Api::default_namespaced(client.clone());
    let is_made = async |name: &str| -> Result<()> {
        let what = format!("the pass over {name} makes its objects");
        eventually(&what, || async {
            Ok(accounts
                .get_opt(name)
                .await?
                .map(|_| ())
                .ok_or_else(|| "nothing".to_owned()))
        })
        .await
        .with_context(|| operator.process.log().unwrap_or_default())
    };
    is_made("cache").await?;
    let events: Api<Event> = Api::default_namespaced(client.clone());
    eventually("the odd nest is told of", || async {
        let found = events.list(&ListParams::default()).await?;
        let told = found.iter().any(|event| {
            event.reason.as_deref() == Some("Unreadable")
                && event
                    .regarding
                    .as_ref()
                    .and_then(|about| about.name.as_deref())
                    == Some("odd")
        });
        Ok(if told {
            Ok(())
        } else {
            Err(format!("{} events", found.items.len()))
        })
    })
    .await?;
    let n_unreadable = async || -> Result<f64> {
        let url = format!("{}/metrics", operator.url);
        let text = reqwest::get(url).await?.text().await?;
        let line = text.lines().find(|line| {
            line.starts_with("birbnest_operator_unreadable_total{") && line.contains("BirbNest")
        });
        let value = line.and_then(|line| line.rsplit(' ').next());
        Ok(value.with_context(|| text.clone())?.parse()?)
    };
    let n_before = n_unreadable().await?;

    // Corrected, it is a nest like any other.
    let spec = json!({ "spec": { "nats": null } });
    nests
        .patch("odd", &PatchParams::default(), &Patch::Merge(spec))
        .await?;
    is_made("odd").await?;

    // What it has by then it keeps when it cannot be read again, whatever else the operator does.
    let uid = async |name: &str| anyhow::Ok(accounts.get(name).await?.metadata.uid);
    let (had, neighbours) = (uid("odd").await?, uid("cache").await?);
    let spec = json!({ "spec": odd });
    nests
        .patch("odd", &PatchParams::default(), &Patch::Merge(spec))
        .await?;
    eventually("it is told of again", || async {
        let n = n_unreadable().await?;
        Ok(if n > n_before {
            Ok(())
        } else {
            Err(format!("{n} times"))
        })
    })
    .await?;
    accounts.delete("cache", &DeleteParams::default()).await?;
    is_made("cache").await?;
    assert_ne!(uid("cache").await?, neighbours);
    assert_eq!(uid("odd").await?, had);
    nothing_forbidden(&cluster, &installation)
}

/// They move no generation. Whoever adds or takes one may have waited for the operator to do something before or after it.
#[tokio::test]
async fn finalizers_alone_bring_a_pass_about() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let nests = world.of::<BirbNest>();
    // Echoes of what was done until now make a few passes, but not so many; and the resync comes after minutes.
    for round in 0..8 {
        let before = world.n_passes()?;
        let finalizers = (round % 2 == 0).then_some(["birb-nest-test/hold"]);
        let patch = json!({ "metadata": { "finalizers": finalizers } });
        nests
            .patch("cache", &PatchParams::default(), &Patch::Merge(patch))
            .await?;
        eventually(&format!("pass {round} is made"), || async {
            let now = world.n_passes()?;
            Ok(if now > before {
                Ok(())
            } else {
                Err(format!("{now} passes"))
            })
        })
        .await?;
    }
    world.finish().await
}
