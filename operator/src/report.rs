//! The end of a pass: the status, and an event if readiness is another.

use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use kube::{
    Resource,
    api::{Patch, PatchParams},
    runtime::events::{Event, EventType},
};
use serde_json::json;

use crate::{
    api::{BirbNest, BirbNestStatus, ConditionType, Reason},
    error::{Error, Result},
    metrics::METRICS,
    pass::Pass,
    render::CONTROLLER,
    status::status,
};

/// Writes the status if it is another one; returns the reason of `Ready`.
///
/// # Errors
/// As of any request.
pub async fn report(pass: &mut Pass<'_>) -> Result<String> {
    let new = status(pass.stored, &pass.nest, &pass.findings, Timestamp::now());
    let reason = readiness(&new)
        .map_or("", |(_, reason, _)| reason)
        .to_owned();
    if pass.stored.status.as_ref() == Some(&new) {
        give_turns(pass, &new);
        return Ok(reason);
    }
    pass.context.may_write()?;
    let body = json!({
        "apiVersion": BirbNest::api_version(&()),
        "kind": BirbNest::kind(&()),
        // A nest that took its place meanwhile is not spoken of.
        "metadata": { "name": pass.nest.name, "namespace": pass.nest.namespace, "uid": pass.nest.uid },
        "status": new,
    });
    pass.of::<BirbNest>()
        .patch_status(
            &pass.nest.name,
            &PatchParams::apply(CONTROLLER).force(),
            &Patch::Apply(&body),
        )
        .await
        .map_err(|source| Error::Nest {
            what: "write the status",
            source,
        })?;
    give_turns(pass, &new);
    tell(pass, &new).await;
    Ok(reason)
}

/// Lets the next nest move to another release if this one has.
fn give_turns(pass: &mut Pass<'_>, new: &BirbNestStatus) {
    let upgrades = &pass.context.upgrades;
    if let Some(within) = upgrades.reported(pass.stored, new, Instant::now()) {
        pass.look_again(within);
    }
}

fn readiness(status: &BirbNestStatus) -> Option<(&str, &str, &str)> {
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == ConditionType::Ready.as_str())?;
    Some((&ready.status, &ready.reason, &ready.message))
}

async fn tell(pass: &Pass<'_>, new: &BirbNestStatus) {
    let before = pass.stored.status.as_ref().and_then(readiness);
    let Some((status, reason, message)) = readiness(new) else {
        return;
    };
    if before.map(|(status, reason, _)| (status, reason)) == Some((status, reason)) {
        return;
    }
    let name = format!("{}/{}", pass.nest.namespace, pass.nest.name);
    tracing::info!(
        nest.name = pass.nest.name,
        nest.namespace = pass.nest.namespace,
        "nest {name} is {}: {reason}: {message}",
        if status == "True" {
            "ready"
        } else {
            "not ready"
        },
    );
    let was_ready = before.is_some_and(|(status, ..)| status == "True");
    let is_warning = !pass.findings.problems.is_empty()
        || (was_ready && status != "True" && reason != Reason::SetupRunning.as_str())
        || [Reason::MigrationFailed, Reason::ServerUnreachable]
            .iter()
            .any(|bad| bad.as_str() == reason);
    let event = Event {
        type_: if is_warning {
            EventType::Warning
        } else {
            EventType::Normal
        },
        reason: reason.to_owned(),
        note: Some(message.chars().take(1024).collect()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    if pass.context.may_write().is_err() {
        return;
    }
    let published = pass
        .context
        .recorder
        .publish(&event, &pass.stored.object_ref(&()))
        .await;
    METRICS.event(published.is_ok());
    if let Err(error) = published {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "an event of nest {name} was not taken"
        );
    }
}
