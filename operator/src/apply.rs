//! Writes to the API server: forced server-side apply by one field manager, never over an object that is somebody
//! else's.

use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, DynamicObject, PartialObjectMeta, Patch, PatchParams, Preconditions},
    core::ObjectMeta,
};

use crate::{
    api::{BirbNest, Reason},
    error::{Error, Result},
    metrics::METRICS,
    render::{CONTROLLER, Child, INSTANCE_LABEL, Kind, MANAGED_BY_LABEL},
    resolve::Nest,
    status::Problem,
};

/// Field manager that only ever says how many workers there are.
pub const AUTOSCALER: &str = "birb-nest-autoscaler";

/// What became of an object that was to be applied.
pub enum Outcome {
    /// It is as it should be.
    Applied(Box<DynamicObject>),
    /// It cannot be, and trying again does not help.
    Blocked(Problem),
}

/// Objects of `kind` in the nest's namespace.
pub fn objects(client: &Client, nest: &Nest, kind: Kind) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), &nest.namespace, &kind.api_resource())
}

/// Makes `child` what it should be.
///
/// # Errors
/// What may be different the next time. What will not is [`Outcome::Blocked`].
pub async fn apply(client: &Client, nest: &Nest, child: &Child) -> Result<Outcome> {
    let api = objects(client, nest, child.kind);
    let failed = |verb, source| Error::Child {
        verb,
        kind: child.kind,
        name: child.name.clone(),
        source,
    };
    let found = api
        .get_metadata_opt(&child.name)
        .await
        .map_err(|source| failed("look at", source))?;
    if let Some(problem) = found
        .as_ref()
        .and_then(|found| foreign(nest, child.kind, found))
    {
        return Ok(Outcome::Blocked(problem));
    }
    let params = PatchParams::apply(CONTROLLER).force().validation_strict();
    match api
        .patch(&child.name, &params, &Patch::Apply(&child.object))
        .await
    {
        Ok(applied) => {
            let before = found.and_then(|found| found.metadata.resource_version);
            METRICS.applied(child.kind, before != applied.metadata.resource_version);
            Ok(Outcome::Applied(Box::new(applied)))
        }
        // The API server's sentence names the field. It does not quote Secrets: those are never applied.
        Err(kube::Error::Api(status)) if status.is_invalid() => Ok(Outcome::Blocked(Problem {
            reason: Reason::InvalidObject,
            message: status.message.chars().take(512).collect(),
        })),
        Err(source) => Err(failed("apply", source)),
    }
}

/// What is wrong with taking `found` for an object of `nest`.
///
/// An object of a nest that was deleted and had left it behind (`deletionPolicy: Retain`) has no owner, and our labels.
pub fn foreign(
    nest: &Nest,
    kind: Kind,
    found: &PartialObjectMeta<DynamicObject>,
) -> Option<Problem> {
    let owner = found
        .metadata
        .owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true));
    let whose = match owner {
        Some(owner) if owner.uid == nest.uid => return None,
        Some(owner) if owner.kind == BirbNest::kind(&()) && owner.name == nest.name => {
            return Some(Problem {
                reason: Reason::WaitingForDependencies,
                message: format!(
                    "{} {} of an earlier nest of this name is still being deleted",
                    kind.as_str(),
                    found.name_any()
                ),
            });
        }
        Some(owner) => format!("belongs to {} {}", owner.kind, owner.name),
        None if is_labelled(nest, &found.metadata) => return None,
        None => "was not made by birb-nest".to_owned(),
    };
    Some(Problem {
        reason: Reason::NameConflict,
        message: format!(
            "{} {} in namespace {} {whose}; rename or delete it, or give the nest another name",
            kind.as_str(),
            found.name_any(),
            nest.namespace,
        ),
    })
}

fn is_labelled(nest: &Nest, metadata: &ObjectMeta) -> bool {
    let label = |name: &str| metadata.labels.as_ref().and_then(|labels| labels.get(name));
    label(MANAGED_BY_LABEL).is_some_and(|value| value == CONTROLLER)
        && label(INSTANCE_LABEL).is_some_and(|value| *value == nest.name)
}

/// Lets [`AUTOSCALER`] say how many workers there are, which has to happen before the main manager stops saying it.
///
/// # Errors
/// As of any request.
pub async fn hand_over_replicas(client: &Client, nest: &Nest, child: &Child) -> Result<()> {
    objects(client, nest, child.kind)
        .patch(
            &child.name,
            &PatchParams::apply(AUTOSCALER).force(),
            &Patch::Apply(&child.object),
        )
        .await
        .map(|_| ())
        .map_err(|source| Error::Child {
            verb: "hand over the replicas of",
            kind: child.kind,
            name: child.name.clone(),
            source,
        })
}

/// Deletes exactly this object, and what it owns after it. That it is gone already is fine.
///
/// # Errors
/// As of any request.
pub async fn delete(client: &Client, nest: &Nest, kind: Kind, metadata: &ObjectMeta) -> Result<()> {
    let name = metadata.name.clone().unwrap_or_default();
    let params = DeleteParams::background().preconditions(Preconditions {
        uid: metadata.uid.clone(),
        resource_version: None,
    });
    match objects(client, nest, kind).delete(&name, &params).await {
        Ok(_) => {
            tracing::info!("deleted {} {}/{name}", kind.as_str(), nest.namespace);
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(source) => Err(Error::Child {
            verb: "delete",
            kind,
            name,
            source,
        }),
    }
}
