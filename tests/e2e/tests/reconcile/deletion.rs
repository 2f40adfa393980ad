//! The end of a nest.

use std::{os::unix::fs::symlink, process::Command};

use anyhow::{Result, ensure};
use birb_nest_cluster::Programs;
use birb_nest_e2e::eventually;
use birb_nest_operator::{api::BirbNest, render::Kind};
use birb_nest_stack::{Root, blocking};
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::{Deployment, StatefulSet},
        core::v1::{Secret, Service, ServiceAccount},
    },
    jiff::Timestamp,
    serde::de::DeserializeOwned,
};
use kube::{
    Resource,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use crate::world::World;

#[tokio::test]
async fn all_objects_go_with_their_nest() -> Result<()> {
    let Some(world) = World::where_garbage_is_collected().await? else {
        return Ok(());
    };
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world
        .of::<BirbNest>()
        .delete("cache", &DeleteParams::default())
        .await?;
    world.until_left("cache", &[]).await?;
    world.finish().await
}

#[tokio::test]
async fn retained_passwords_are_taken_up_again() -> Result<()> {
    let Some(world) = World::where_garbage_is_collected().await? else {
        return Ok(());
    };
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
    let Some(world) = World::where_garbage_is_collected().await? else {
        return Ok(());
    };
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

/// What keeps an object until the test has looked.
const HOLD: &str = "birb-nest-test/hold";

impl World {
    /// Waits until these objects of the nest are left, and no others.
    async fn until_left(&self, nest: &str, expected: &[(Kind, &str)]) -> Result<()> {
        eventually(&format!("of {nest} {expected:?} is left"), || async {
            let left = self.objects(nest).await?;
            let names = left.iter().map(|(kind, name, _)| (*kind, name.as_str()));
            Ok(if names.eq(expected.iter().copied()) {
                Ok(())
            } else {
                Err(format!("{left:?}"))
            })
        })
        .await
    }

    async fn hold<K>(&self, name: &str, is_held: bool) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        let finalizers = json!({ "metadata": { "finalizers": is_held.then_some([HOLD]) } });
        let params = PatchParams::default();
        let patch = Patch::Merge(finalizers);
        self.of::<K>().patch(name, &params, &patch).await?;
        Ok(())
    }

    /// Passes up to now that found the nest on its way out.
    fn passes_in_vain(&self, nest: &str) -> Result<usize> {
        let words = format!(
            "nest {}/{nest} is being deleted and is left alone",
            self.namespace
        );
        Ok(self.shared.operator.process.log()?.matches(&words).count())
    }

    /// Waits until more than `before` such passes have been made.
    async fn until_passed(&self, nest: &str, before: usize) -> Result<()> {
        eventually(&format!("a pass over {nest}"), || async {
            let now = self.passes_in_vain(nest)?;
            Ok(if now > before {
                Ok(())
            } else {
                Err(format!("{now} passes"))
            })
        })
        .await
    }

    /// Fails if the operator wrote anything here after `since`.
    fn nothing_written(&self, since: Timestamp) -> Result<()> {
        let mut written = self.requests()?;
        written.retain(|request| request.is_write() && request.received > since);
        ensure!(written.is_empty(), "{written:#?}");
        Ok(())
    }
}

#[tokio::test]
async fn the_objects_of_a_nest_that_goes_after_them_are_not_made_again() -> Result<()> {
    let Some(world) = World::where_garbage_is_collected().await? else {
        return Ok(());
    };
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    // Else all could be gone before a pass sees any of it.
    world.hold::<ServiceAccount>("cache", true).await?;
    world
        .of::<BirbNest>()
        .delete("cache", &DeleteParams::foreground())
        .await?;
    world.until_passed("cache", 0).await?;
    let (since, n_before) = (Timestamp::now(), world.passes_in_vain("cache")?);
    world
        .until_left("cache", &[(Kind::ServiceAccount, "cache")])
        .await?;
    world.of::<BirbNest>().get("cache").await?;
    // What is held is not put back either.
    let edit = json!({ "metadata": { "labels": { "app.kubernetes.io/component": "edited" } } });
    world
        .of::<ServiceAccount>()
        .patch("cache", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    world.until_passed("cache", n_before).await?;
    world.hold::<ServiceAccount>("cache", false).await?;
    world.until_gone::<BirbNest>("cache").await?;
    world.until_left("cache", &[]).await?;
    world.nothing_written(since)?;
    world.finish().await
}

/// Such as one of somebody who saves what is in it first.
#[tokio::test]
async fn a_nest_that_is_held_on_its_way_out_is_left_alone() -> Result<()> {
    let Some(world) = World::where_garbage_is_collected().await? else {
        return Ok(());
    };
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    world.hold::<BirbNest>("cache", true).await?;
    world
        .of::<BirbNest>()
        .delete("cache", &DeleteParams::default())
        .await?;
    world.until_passed("cache", 0).await?;
    let (since, n_before) = (Timestamp::now(), world.passes_in_vain("cache")?);
    world
        .of::<Service>()
        .delete("cache", &DeleteParams::default())
        .await?;
    world.until_passed("cache", n_before).await?;
    ensure!(world.of::<Service>().get_opt("cache").await?.is_none());
    ensure!(
        world
            .of::<Deployment>()
            .get_opt("cache-api")
            .await?
            .is_some()
    );
    world.nothing_written(since)?;
    world.hold::<BirbNest>("cache", false).await?;
    world.until_gone::<BirbNest>("cache").await?;
    world.until_left("cache", &[]).await?;
    world.finish().await
}

/// As with `KUBEBUILDER_ASSETS`, whose API server nobody tidies up after.
#[tokio::test]
async fn what_needs_garbage_collection_is_not_run_without_it_and_says_so() -> Result<()> {
    let need_it = [
        "deletion::a_nest_made_again_at_once_waits_for_the_end_of_the_first",
        "deletion::a_nest_that_is_held_on_its_way_out_is_left_alone",
        "deletion::all_objects_go_with_their_nest",
        "deletion::retained_passwords_are_taken_up_again",
        "deletion::the_objects_of_a_nest_that_goes_after_them_are_not_made_again",
        "rollout::two_nests_in_one_namespace_share_nothing",
    ];
    let root = Root::temporary("assets", |_| Ok(()))?;
    let programs = blocking(Programs::build).await?;
    for name in ["etcd", "kube-apiserver", "kubectl"] {
        symlink(programs.path(name)?, root.path().join(name))?;
    }
    let mut again = Command::new(std::env::current_exe()?);
    again
        .args(["--exact", "--nocapture"])
        .args(need_it)
        .env("KUBEBUILDER_ASSETS", root.path());
    let output = blocking(move || Ok(again.output()?)).await?;
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    ensure!(output.status.success(), "{said}");
    let n_said = said.matches("not checked: garbage collection").count();
    ensure!(n_said == need_it.len(), "{n_said} times: {said}");
    Ok(())
}
