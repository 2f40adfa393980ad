//! Objects of a nest whose owner somebody took away.

use std::collections::BTreeMap;

use anyhow::Result;
use birb_nest_operator::api::BirbNest;
use k8s_openapi::{
    api::{core::v1::ConfigMap, networking::v1::Ingress},
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use kube::{
    ResourceExt,
    api::{ListParams, ObjectMeta, Patch, PatchParams},
};
use serde_json::json;

use crate::world::World;

const WITH_INGRESS: &str = "{api: {ingress: {className: public, host: cache.example.com}}}";
const WITHOUT: &str = "{paused: false, api: {ingress: null}}";

/// Labels of an object of the nest, of which `change` says what is different.
fn labels(nest: &BirbNest, change: &[(&str, Option<&str>)]) -> BTreeMap<String, String> {
    let uid = nest.uid().unwrap_or_default();
    let mut labels: BTreeMap<String, String> = [
        ("app.kubernetes.io/name", "birb-nest"),
        ("app.kubernetes.io/instance", "cache"),
        ("app.kubernetes.io/managed-by", "birb-nest-operator"),
        ("cache.birb.party/nest-uid", uid.as_str()),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    for (name, value) in change {
        match value {
            Some(value) => labels.insert((*name).to_owned(), (*value).to_owned()),
            None => labels.remove(*name),
        };
    }
    labels
}

/// Applies a ConfigMap as `manager`.
async fn make(world: &World, manager: &str, metadata: ObjectMeta) -> Result<()> {
    let name = metadata.name.clone().unwrap_or_default();
    let map = ConfigMap {
        metadata,
        ..ConfigMap::default()
    };
    world
        .of::<ConfigMap>()
        .patch(&name, &PatchParams::apply(manager), &Patch::Apply(map))
        .await?;
    Ok(())
}

fn named(name: &str, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some(labels),
        ..ObjectMeta::default()
    }
}

#[tokio::test]
async fn what_lost_its_owner_is_taken_back_or_removed_and_nothing_else_is() -> Result<()> {
    let world = World::where_all_works().await?;
    let nest = world.create("cache", WITH_INGRESS).await?;
    world.until_ready("cache", "True", "Available").await?;
    let owner = world.of::<Ingress>().get("cache").await?;
    let owner = owner.owner_references().to_owned();
    let (params, lost) = (
        PatchParams::default(),
        json!({ "metadata": { "ownerReferences": null } }),
    );

    // What is wanted gets it back.
    let ingresses = world.of::<Ingress>();
    ingresses
        .patch("cache", &params, &Patch::Merge(&lost))
        .await?;
    world
        .until::<Ingress>("cache", |ingress| ingress.owner_references() == owner)
        .await?;

    // Nothing is put back meanwhile.
    world.change("cache", "{paused: true}").await?;
    world
        .until_condition("cache", "Progressing", "False", "Paused")
        .await?;
    ingresses
        .patch("cache", &params, &Patch::Merge(&lost))
        .await?;
    let (us, all) = ("birb-nest-operator", labels(&nest, &[]));
    make(&world, us, named("orphan", all.clone())).await?;
    make(&world, "kubectl", named("copy", all.clone())).await?;
    let mut whole = named("whole-copy", all.clone());
    whole.owner_references = Some(owner.clone());
    make(&world, "kubectl", whole).await?;
    let uid = [("cache.birb.party/nest-uid", Some("another"))];
    make(&world, us, named("of-another-life", labels(&nest, &uid))).await?;
    let label = [("app.kubernetes.io/managed-by", None)];
    make(&world, us, named("not-managed", labels(&nest, &label))).await?;
    let label = [("app.kubernetes.io/managed-by", Some("somebody"))];
    make(
        &world,
        us,
        named("managed-by-others", labels(&nest, &label)),
    )
    .await?;
    let mut theirs = named("with-another-owner", all);
    theirs.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "ConfigMap".to_owned(),
        name: "copy".to_owned(),
        uid: world
            .of::<ConfigMap>()
            .get("copy")
            .await?
            .uid()
            .unwrap_or_default(),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    make(&world, us, theirs).await?;

    world.change("cache", WITHOUT).await?;
    world.until_gone::<ConfigMap>("orphan").await?;
    world.until_gone::<Ingress>("cache").await?;
    // Whatever goes, goes in one pass, ConfigMaps first.
    let left = world.of::<ConfigMap>().list(&ListParams::default()).await?;
    for name in [
        "copy",
        "whole-copy",
        "of-another-life",
        "not-managed",
        "managed-by-others",
        "with-another-owner",
    ] {
        let found = left.items.iter().find(|map| map.name_any() == name);
        let is_there = found.is_some_and(|map| map.metadata.deletion_timestamp.is_none());
        assert!(is_there, "{name} is gone");
    }
    world.finish().await
}

#[tokio::test]
async fn an_orphan_of_which_nobody_can_say_who_wrote_it_stays_and_is_told_of_once() -> Result<()> {
    let world = World::where_all_works().await?;
    let nest = world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    // Nothing is removed meanwhile.
    world.change("cache", "{paused: true}").await?;
    world
        .until_condition("cache", "Progressing", "False", "Paused")
        .await?;
    let us = "birb-nest-operator";
    for name in ["cleared", "orphan"] {
        make(&world, us, named(name, labels(&nest, &[]))).await?;
    }
    let clear = json!({ "metadata": { "managedFields": [{}] } });
    let maps = world.of::<ConfigMap>();
    let cleared = maps
        .patch("cleared", &PatchParams::default(), &Patch::Merge(clear))
        .await?;
    assert_eq!(cleared.metadata.managed_fields, None);

    world.change("cache", "{paused: false}").await?;
    world.until_gone::<ConfigMap>("orphan").await?;
    // In each pass after it, too.
    make(&world, us, named("later", labels(&nest, &[]))).await?;
    world.until_gone::<ConfigMap>("later").await?;
    let found = maps.get("cleared").await?;
    assert_eq!(found.metadata.uid, cleared.metadata.uid);
    assert_eq!(found.metadata.deletion_timestamp, None);
    let log = world.shared.operator.process.log()?;
    let told = format!(
        "kubectl --namespace {} delete configmap cleared",
        world.namespace
    );
    assert_eq!(log.matches(&told).count(), 1);
    world.finish().await
}
