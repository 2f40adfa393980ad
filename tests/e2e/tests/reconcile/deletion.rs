//! The end of a nest.

use anyhow::Result;
use birb_nest_operator::api::BirbNest;
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::Secret,
};
use kube::api::DeleteParams;

use crate::world::World;

#[tokio::test]
async fn all_objects_go_with_their_nest() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world
        .of::<BirbNest>()
        .delete("cache", &DeleteParams::default())
        .await?;
    birb_nest_e2e::eventually("nothing is left", || async {
        let left = world.objects("cache").await?;
        Ok(if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        })
    })
    .await?;
    world.finish().await
}

#[tokio::test]
async fn retained_passwords_are_taken_up_again() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{deletionPolicy: Retain}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let set = world.of::<StatefulSet>().get("cache-postgres").await?;
    let policy = set
        .spec
        .and_then(|spec| spec.persistent_volume_claim_retention_policy);
    assert_eq!(
        policy.and_then(|policy| policy.when_deleted).as_deref(),
        Some("Retain")
    );
    let before = world.of::<Secret>().get("cache-postgres").await?;
    world
        .of::<BirbNest>()
        .delete("cache", &DeleteParams::default())
        .await?;
    world.until_gone::<Deployment>("cache-api").await?;
    world.until_gone::<StatefulSet>("cache-postgres").await?;

    world.create("cache", "{deletionPolicy: Delete}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let secret = world
        .until::<Secret>("cache-postgres", |secret| {
            secret.metadata.owner_references.is_some()
        })
        .await?;
    assert_eq!(secret.data, before.data);
    world.finish().await
}

#[tokio::test]
async fn a_nest_made_again_at_once_waits_for_the_end_of_the_first() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world
        .of::<BirbNest>()
        .delete("cache", &DeleteParams::default())
        .await?;
    let second = world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let secret = world.of::<Secret>().get("cache-postgres").await?;
    let owners = secret.metadata.owner_references.unwrap_or_default();
    assert_eq!(
        owners.first().map(|owner| &owner.uid),
        second.metadata.uid.as_ref()
    );
    world.finish().await
}

/// Who sets it is about to delete the nest, because something is wrong with it.
#[tokio::test]
async fn retain_reaches_volumes_and_passwords_whatever_is_in_the_way() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let kept = async |what: &str| -> Result<()> {
        for name in ["cache-nats", "cache-postgres"] {
            world
                .until::<StatefulSet>(name, |set| {
                    let policy = set
                        .spec
                        .as_ref()
                        .and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref());
                    policy.and_then(|policy| policy.when_deleted.as_deref()) == Some(what)
                })
                .await?;
        }
        world
            .until::<Secret>("cache-postgres", |secret| {
                secret.metadata.owner_references.is_none() == (what == "Retain")
            })
            .await?;
        Ok(())
    };
    kept("Delete").await?;
    world
        .change(
            "cache",
            "{deletionPolicy: Retain, redis: {external: {urlSecretRef: {name: gone, key: url}}}}",
        )
        .await?;
    world.until_ready("cache", "False", "SecretMissing").await?;
    kept("Retain").await?;
    world
        .change("cache", "{deletionPolicy: Delete, paused: true}")
        .await?;
    kept("Delete").await?;
    world.finish().await
}
