//! Writes to the API server: forced server-side apply by one field manager, never over an object that is somebody
//! else's, and never by a process that may not lead any more.

use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions},
    core::ObjectMeta,
};
use serde_json::Value;

use crate::{
    api::{BirbNest, Reason},
    context::Context,
    error::{Error, Result},
    findings::Problem,
    metrics::METRICS,
    render::{CONTROLLER, Child, INSTANCE_LABEL, Kind, MANAGED_BY_LABEL},
    resolve::Nest,
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

/// Makes `child` what it should be. If it was left so, and nobody has touched it since, that takes no request.
///
/// # Errors
/// What may be different the next time. What will not is [`Outcome::Blocked`].
pub async fn apply(context: &Context, nest: &Nest, child: &Child) -> Result<Outcome> {
    let known = context.owned.get(nest, child.kind, &child.name);
    if let Some(known) = known
        && context
            .memo
            .stands(&nest.uid, child, known.metadata.resource_version.as_deref())
    {
        return Ok(Outcome::Applied(Box::new(known.as_ref().clone())));
    }
    let api = objects(&context.client, nest, child.kind);
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
    let mut object = child.object.clone();
    if let Some(found) = &found {
        if let Some(problem) = foreign(nest, child.kind, &found.metadata) {
            return Ok(Outcome::Blocked(problem));
        }
        // Another object that took its place in between is a conflict.
        object["metadata"]["uid"] = found.metadata.uid.clone().map_or(Value::Null, Value::from);
    }
    context.may_write()?;
    let params = PatchParams::apply(CONTROLLER).force().validation_strict();
    match api
        .patch(&child.name, &params, &Patch::Apply(&object))
        .await
    {
        Ok(applied) => {
            let before = found.and_then(|found| found.metadata.resource_version);
            let after = &applied.metadata.resource_version;
            METRICS.applied(child.kind, before != *after);
            let was_drift =
                context
                    .memo
                    .note(&nest.uid, child, before.as_deref(), after.as_deref());
            if was_drift {
                METRICS.drift_repaired(child.kind);
                tracing::info!(
                    "put back {} {}/{}, which somebody had changed or deleted",
                    child.kind.as_str(),
                    nest.namespace,
                    child.name
                );
            }
            Ok(Outcome::Applied(Box::new(applied)))
        }
        Err(source) => {
            let error = failed("apply", source);
            match refusal(&error) {
                Some(message) => Ok(Outcome::Blocked(Problem {
                    reason: Reason::InvalidObject,
                    message,
                })),
                None => Err(error),
            }
        }
    }
}

/// Why the API server would refuse `child`, if it would. What was left as it should be is not asked about.
///
/// # Errors
/// As of any request.
pub async fn try_out(context: &Context, nest: &Nest, child: &Child) -> Result<Option<String>> {
    let known = context.owned.get(nest, child.kind, &child.name);
    let version = known.and_then(|known| known.metadata.resource_version.clone());
    if context.memo.stands(&nest.uid, child, version.as_deref()) {
        return Ok(None);
    }
    context.may_write()?;
    let params = PatchParams::apply(CONTROLLER)
        .force()
        .dry_run()
        .validation_strict();
    let tried = objects(&context.client, nest, child.kind)
        .patch(&child.name, &params, &Patch::Apply(&child.object))
        .await;
    let Err(source) = tried else { return Ok(None) };
    let error = Error::Child {
        verb: "try out",
        kind: child.kind,
        name: child.name.clone(),
        source,
    };
    match refusal(&error) {
        Some(words) => Ok(Some(words)),
        None => Err(error),
    }
}

/// The API server's sentence if it refuses the object itself: it is invalid, a quota is used up, an admission webhook or
/// policy is against it. It names the field; and it does not quote Secrets, which are never applied.
pub fn refusal(error: &Error) -> Option<String> {
    if error.is_namespace_ending() {
        return None;
    }
    let Error::Child {
        kind, name, source, ..
    } = error
    else {
        return None;
    };
    let kube::Error::Api(status) = source else {
        return None;
    };
    let sentence: String = status.message.chars().take(512).collect();
    matches!(status.code, 400 | 403 | 422).then(|| {
        format!(
            "the API server refuses {} {name}: {sentence}",
            kind.as_str()
        )
    })
}

/// What is wrong with taking an object with this `metadata` for one of `nest`.
///
/// An object of a nest that was deleted and had left it behind (`deletionPolicy: Retain`) has no owner, and our labels.
pub fn foreign(nest: &Nest, kind: Kind, metadata: &ObjectMeta) -> Option<Problem> {
    let name = metadata.name.as_deref().unwrap_or_default();
    let owner = metadata
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
                    "{} {name} of an earlier nest of this name is still being deleted",
                    kind.as_str(),
                ),
            });
        }
        Some(owner) => format!("belongs to {} {}", owner.kind, owner.name),
        None if is_labelled(nest, metadata) => return None,
        None => "was not made by birb-nest".to_owned(),
    };
    Some(Problem {
        reason: Reason::NameConflict,
        message: format!(
            "{} {name} in namespace {} {whose}; rename or delete it, or give the nest another name",
            kind.as_str(),
            nest.namespace,
        ),
    })
}

fn is_labelled(nest: &Nest, metadata: &ObjectMeta) -> bool {
    let label = |name: &str| metadata.labels.as_ref().and_then(|labels| labels.get(name));
    label(MANAGED_BY_LABEL).is_some_and(|value| value == CONTROLLER)
        && label(INSTANCE_LABEL).is_some_and(|value| *value == nest.name)
}

/// Lets [`AUTOSCALER`] say how many workers there are; where the main manager said it, before that stops.
///
/// # Errors
/// As of any request.
pub async fn say_replicas(context: &Context, nest: &Nest, child: &Child) -> Result<()> {
    context.may_write()?;
    objects(&context.client, nest, child.kind)
        .patch(
            &child.name,
            &PatchParams::apply(AUTOSCALER).force(),
            &Patch::Apply(&child.object),
        )
        .await
        .map(|_| ())
        .map_err(|source| Error::Child {
            verb: "set the replicas of",
            kind: child.kind,
            name: child.name.clone(),
            source,
        })
}

/// Lays `change`, a strategic merge patch, into an object of a built-in kind. That it is gone is fine.
///
/// # Errors
/// As of any request.
pub async fn change(
    context: &Context,
    nest: &Nest,
    kind: Kind,
    name: &str,
    change: Value,
) -> Result<()> {
    context.may_write()?;
    let params = PatchParams {
        field_manager: Some(CONTROLLER.to_owned()),
        ..PatchParams::default()
    };
    match objects(&context.client, nest, kind)
        .patch(name, &params, &Patch::Strategic(change))
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(Error::Child {
            verb: "change",
            kind,
            name: name.to_owned(),
            source,
        }),
    }
}

/// Whether `manager` says how many replicas `found` has.
pub fn says_replicas(found: &Deployment, manager: &str) -> bool {
    found.managed_fields().iter().any(|entry| {
        entry.manager.as_deref() == Some(manager)
            && entry.operation.as_deref() == Some("Apply")
            && entry
                .fields_v1
                .as_ref()
                .is_some_and(|fields| fields.0.pointer("/f:spec/f:replicas").is_some())
    })
}

/// Deletes exactly this object, and what it owns after it. That it is gone already is fine.
///
/// # Errors
/// As of any request.
pub async fn delete(
    context: &Context,
    nest: &Nest,
    kind: Kind,
    metadata: &ObjectMeta,
) -> Result<()> {
    context.may_write()?;
    let name = metadata.name.clone().unwrap_or_default();
    let params = DeleteParams::background().preconditions(Preconditions {
        uid: metadata.uid.clone(),
        resource_version: None,
    });
    match objects(&context.client, nest, kind)
        .delete(&name, &params)
        .await
    {
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
