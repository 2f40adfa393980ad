//! How long volumes and their passwords live. It is seen to first, whatever else is in the way and even in a paused nest: who
//! sets `deletionPolicy: Retain` is about to delete it.

use k8s_openapi::api::apps::v1::StatefulSet;
use kube::ResourceExt;
use serde_json::json;

use crate::{
    api::DeletionPolicy,
    apply,
    error::Result,
    pass::{Pass, child_error},
    render::{self, Kind, Names},
};

impl DeletionPolicy {
    /// As a StatefulSet's `whenDeleted`.
    pub fn when_deleted(self) -> &'static str {
        match self {
            Self::Delete => "Delete",
            Self::Retain => "Retain",
        }
    }
}

/// Ties the volumes of the managed servers' sets, and the generated Secrets, to the nest or unties them.
///
/// # Errors
/// What may go better the next time.
pub async fn ensure(pass: &Pass<'_>) -> Result<()> {
    let policy = pass.nest.deletion_policy;
    let names = Names(&pass.nest.name);
    let sets = [
        pass.nest.nats.managed().map(|_| names.nats()),
        pass.nest.postgres.managed().map(|_| names.postgres()),
    ];
    for name in sets.into_iter().flatten() {
        let found = pass
            .of::<StatefulSet>()
            .get_opt(&name)
            .await
            .map_err(|source| child_error("look at", Kind::StatefulSet, &name, source))?;
        let Some(set) = found else { continue };
        let now = set
            .spec
            .as_ref()
            .and_then(|spec| spec.persistent_volume_claim_retention_policy.as_ref())
            .and_then(|policy| policy.when_deleted.as_deref());
        let is_ours = apply::foreign(&pass.nest, Kind::StatefulSet, &set.metadata).is_none();
        if is_ours && now != Some(policy.when_deleted()) {
            when_deleted(pass, &name, policy).await?;
        }
    }
    for secret in render::generated_secrets(&pass.nest) {
        let found = apply::objects(&pass.context.client, &pass.nest, Kind::Secret)
            .get_metadata_opt(&secret.name)
            .await
            .map_err(|source| child_error("look at", Kind::Secret, &secret.name, source))?;
        let Some(found) = found else { continue };
        let is_ours = apply::foreign(&pass.nest, Kind::Secret, &found.metadata).is_none();
        let should_be_owned = policy == DeletionPolicy::Delete;
        let mut owners = found.owner_references().iter();
        let is_owned = owners.any(|owner| owner.uid == pass.nest.uid);
        if is_ours && is_owned != should_be_owned {
            set_owner(pass, &secret.name, should_be_owned).await?;
        }
    }
    Ok(())
}

/// Says what becomes of the volume of the StatefulSet called `name` when that is deleted.
///
/// # Errors
/// As of any request.
pub async fn when_deleted(pass: &Pass<'_>, name: &str, policy: DeletionPolicy) -> Result<()> {
    let change = json!({ "spec": { "persistentVolumeClaimRetentionPolicy": {
        "whenDeleted": policy.when_deleted(),
    } } });
    apply::change(pass.context, &pass.nest, Kind::StatefulSet, name, change).await
}

/// Lets the Secret called `name` go with the nest, or outlive it.
///
/// # Errors
/// As of any request.
pub async fn set_owner(pass: &Pass<'_>, name: &str, owned: bool) -> Result<()> {
    // By uid: other owners stay.
    let owner = if owned {
        render::owner_reference(&pass.nest)
    } else {
        json!({ "$patch": "delete", "uid": pass.nest.uid })
    };
    let change = json!({ "metadata": { "ownerReferences": [owner] } });
    apply::change(pass.context, &pass.nest, Kind::Secret, name, change).await
}
