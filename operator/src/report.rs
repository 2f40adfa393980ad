//! The end of a pass: the status, and an event if what it comes to is another.

use std::time::Instant;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Condition, jiff::Timestamp};
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
    let reason = condition(&new, ConditionType::Ready)
        .map_or_else(String::new, |ready| ready.reason.clone());
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

fn condition(status: &BirbNestStatus, type_: ConditionType) -> Option<&Condition> {
    let mut conditions = status.conditions.iter();
    conditions.find(|condition| condition.type_ == type_.as_str())
}

/// The condition that `status` comes to: `Ready`, or what degrades a nest that is ready. Not that pods were lost: they come
/// and go.
fn headline(status: &BirbNestStatus) -> Option<&Condition> {
    let ready = condition(status, ConditionType::Ready)?;
    let degraded = condition(status, ConditionType::Degraded).filter(|degraded| {
        ready.status == "True"
            && degraded.status == "True"
            && degraded.reason != Reason::PodsNotReady.as_str()
    });
    Some(degraded.unwrap_or(ready))
}

async fn tell(pass: &Pass<'_>, new: &BirbNestStatus) {
    let old = pass.stored.status.as_ref();
    let Some(now) = headline(new) else {
        return;
    };
    let same = |old: &&Condition| {
        (&old.type_, &old.status, &old.reason) == (&now.type_, &now.status, &now.reason)
    };
    if old.and_then(headline).is_some_and(|old| same(&old)) {
        return;
    }
    let (reason, message) = (now.reason.as_str(), now.message.as_str());
    let is_degraded = now.type_ == ConditionType::Degraded.as_str();
    let is_ready = !is_degraded && now.status == "True";
    let name = format!("{}/{}", pass.nest.namespace, pass.nest.name);
    tracing::info!(
        nest.name = pass.nest.name,
        nest.namespace = pass.nest.namespace,
        "nest {name} is {}: {reason}: {message}",
        match (is_degraded, is_ready) {
            (true, _) => "degraded",
            (false, true) => "ready",
            (false, false) => "not ready",
        },
    );
    let was_ready = old
        .and_then(|old| condition(old, ConditionType::Ready))
        .is_some_and(|ready| ready.status == "True");
    let is_warning = !pass.findings.problems.is_empty()
        || is_degraded
        || (was_ready && !is_ready && reason != Reason::SetupRunning.as_str())
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
