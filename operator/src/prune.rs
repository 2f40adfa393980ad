//! Removes what a nest no longer wants: servers that became external, setup Jobs of earlier settings; also where somebody took
//! its owner away. Never a volume, never a Secret, and never what the operator did not write.

use k8s_openapi::api::{batch::v1::Job, core::v1::PersistentVolumeClaim};
use kube::{ResourceExt, api::ObjectMeta};

use crate::{
    api::DeletionPolicy,
    apply,
    error::Result,
    observe::Setup,
    owned::{self, Writer},
    pass::{Pass, child_error, typed},
    render::{Child, Kind, Names},
    retention,
};

/// Deletes the objects of the nest that are not among `wanted`. Called when everything wanted works, so nothing that is
/// still in use goes. It sees what the watches have seen; what they see later makes another pass.
///
/// # Errors
/// What may go better the next time.
pub async fn prune(pass: &Pass<'_>, wanted: &[&Child]) -> Result<()> {
    let last_failed = last_failed_setup(pass);
    for kind in Kind::ALL {
        for object in pass.context.owned.of(&pass.nest, kind) {
            let name = object.name_any();
            let is_wanted = wanted
                .iter()
                .any(|child| child.kind == kind && child.name == name);
            let is_kept = kind == Kind::Job && last_failed.as_ref() == Some(&name);
            if is_wanted || is_kept || object.metadata.deletion_timestamp.is_some() {
                continue;
            }
            if !is_made_by_us(pass, kind, &name).await? {
                continue;
            }
            if kind == Kind::StatefulSet && !release_volume(pass, &object.metadata).await? {
                continue;
            }
            apply::delete(pass.context, &pass.nest, kind, &object.metadata).await?;
        }
    }
    Ok(())
}

/// Whether the operator wrote it, which the watches do not keep. What nobody can say that of is told of.
async fn is_made_by_us(pass: &Pass<'_>, kind: Kind, name: &str) -> Result<bool> {
    let found = apply::objects(&pass.context.client, &pass.nest, kind)
        .get_metadata_opt(name)
        .await
        .map_err(|source| child_error("look at", kind, name, source))?;
    let Some(found) = found else {
        return Ok(false);
    };
    let writer = owned::writer(&pass.nest, &found.metadata);
    let (memo, nest) = (&pass.context.memo, &pass.nest);
    let uid = found.metadata.uid.unwrap_or_default();
    if writer == Writer::Unknown && memo.is_first_time(&nest.uid, uid) {
        let (namespace, kind) = (&nest.namespace, kind.as_str());
        tracing::warn!(
            "{kind} {namespace}/{name} says it is of nest {}, which does not want it any more, and stays: somebody cleared its \
             managedFields, so nobody can say who wrote it; if nobody needs it: kubectl --namespace {namespace} delete {} {name}",
            nest.name,
            kind.to_lowercase()
        );
    }
    Ok(writer == Writer::Operator)
}

/// Name of the setup Job that failed last: its logs may still be wanted.
fn last_failed_setup(pass: &Pass<'_>) -> Option<String> {
    let jobs = pass.context.owned.of(&pass.nest, Kind::Job);
    let failed = jobs
        .iter()
        .map(|job| typed::<Job>(job.as_ref().clone()))
        .filter(|job| matches!(Setup::of(job, &[]), Setup::Failed(_)));
    let last = failed.max_by_key(|job| job.metadata.creation_timestamp.clone().map(|time| time.0));
    last.map(|job| job.name_any())
}

/// Lets the volume of a managed server, and the Secret with its password, outlive it: an external server took its place,
/// and what it holds may be wanted once more. Returns whether that is done.
async fn release_volume(pass: &Pass<'_>, set: &ObjectMeta) -> Result<bool> {
    let name = set.name.clone().unwrap_or_default();
    let claims = pass.of::<PersistentVolumeClaim>();
    let claim = claims
        .get_metadata_opt(&Names(&pass.nest.name).volume(&name))
        .await
        .map_err(|source| child_error("look at the volume of", Kind::StatefulSet, &name, source))?;
    let Some(claim) = claim else {
        return Ok(true);
    };
    let is_tied = claim
        .owner_references()
        .iter()
        .any(|owner| Some(&owner.uid) == set.uid.as_ref());
    if is_tied {
        // The StatefulSet's controller unties it; that is seen in a later pass.
        retention::when_deleted(pass, &name, DeletionPolicy::Retain).await?;
        return Ok(false);
    }
    retention::set_owner(pass, &name, false).await?;
    tracing::info!(
        "volume {} and Secret {name} in namespace {} stay; delete them when nobody needs what they hold",
        claim.name_any(),
        pass.nest.namespace
    );
    Ok(true)
}
