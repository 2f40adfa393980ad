//! Writes to the API server: forced server-side apply by one field manager, never over an object that is somebody
//! else's, and never by a process that may not lead any more.

use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, Preconditions},
    core::{ObjectMeta, Status},
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
                Some(refusal) => Ok(Outcome::Blocked(refusal.into())),
                None => Err(error),
            }
        }
    }
}

/// Why the API server would refuse `child`, if it would. What was left as it should be is not asked about.
///
/// # Errors
/// As of any request.
pub async fn try_out(context: &Context, nest: &Nest, child: &Child) -> Result<Option<Refusal>> {
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
        Some(refusal) => Ok(Some(refusal)),
        None => Err(error),
    }
}

/// Why an object may not be.
#[derive(Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For the person who must mend it.
    pub message: String,
    /// It lies in the object alone, so in what the nest says.
    pub is_of_the_object: bool,
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        Self {
            reason: Reason::InvalidObject,
            message: refusal.message,
            is_of_the_nest: refusal.is_of_the_object,
        }
    }
}

/// The API server's sentence if it refuses the object itself: it is invalid, a quota is used up, an admission webhook or
/// policy is against it. It names the field; and it does not quote Secrets, which are never applied.
pub fn refusal(error: &Error) -> Option<Refusal> {
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
    matches!(status.code, 400 | 403 | 422).then(|| Refusal {
        message: format!(
            "the API server refuses {} {name}: {sentence}",
            kind.as_str()
        ),
        is_of_the_object: is_of_the_object(status),
    })
}

/// Whether it is the object that the API server finds fault with, by rules that are the same for everybody. The code alone
/// does not say: policies and webhooks, which others may change, refuse with those codes, too.
fn is_of_the_object(status: &Status) -> bool {
    let mut causes = status.details.iter().flat_map(|details| &details.causes);
    let is_of_a_webhook = status.message.starts_with("admission webhook");
    match status.code {
        400 => !is_of_a_webhook,
        422 => !is_of_a_webhook && causes.any(|cause| !cause.field.is_empty()),
        _ => false,
    }
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
            return Some(Problem::new(
                Reason::WaitingForDependencies,
                format!(
                    "{} {name} of an earlier nest of this name is still being deleted",
                    kind.as_str()
                ),
            ));
        }
        Some(owner) => format!("belongs to {} {}", owner.kind, owner.name),
        None if is_labelled(nest, metadata) => return None,
        None => "was not made by birb-nest".to_owned(),
    };
    Some(Problem::new(
        Reason::NameConflict,
        format!(
            "{} {name} in namespace {} {whose}; rename or delete it, or give the nest another name",
            kind.as_str(),
            nest.namespace,
        ),
    ))
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(code: u16, message: &str, field: &str) -> Option<Refusal> {
        let causes = json!([{ "message": message, "field": field }]);
        let status = json!({ "code": code, "message": message, "details": { "causes": causes } });
        refusal(&Error::Child {
            verb: "apply",
            kind: Kind::Deployment,
            name: "cache-api".to_owned(),
            source: kube::Error::Api(serde_json::from_value(status).unwrap()),
        })
    }

    #[test]
    fn what_only_the_nest_can_mend_is_told_from_what_others_forbid() {
        let is_of_the_object = |code, message, field| {
            let refusal = refused(code, message, field).unwrap();
            assert!(refusal.message.ends_with(message), "{}", refusal.message);
            refusal.is_of_the_object
        };
        let invalid = "Deployment.apps \"cache-api\" is invalid: spec.template.spec.containers[0].resources.requests";
        let field = "spec.template.spec.containers[0].resources.requests";
        assert!(is_of_the_object(422, invalid, field));
        assert!(is_of_the_object(
            400,
            "strict decoding error: unknown field \"spec.a\"",
            ""
        ));

        let policy = "deployments.apps \"cache-api\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request";
        assert!(!is_of_the_object(422, policy, ""));
        let webhook = "admission webhook \"w.example.com\" denied the request: spec.replicas";
        assert!(!is_of_the_object(422, webhook, "spec.replicas"));
        assert!(!is_of_the_object(400, webhook, ""));
        let quota = "deployments.apps \"cache-api\" is forbidden: exceeded quota: none";
        assert!(!is_of_the_object(403, quota, ""));
    }

    #[test]
    fn what_may_go_better_the_next_time_is_no_refusal() {
        for code in [404, 409, 429, 500, 503] {
            assert_eq!(refused(code, "it", "spec"), None, "{code}");
        }
    }
}
