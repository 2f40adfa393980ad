//! Who says how many pods a Deployment has. Three may: the operator's main manager, with all else that it says of a Deployment;
//! its manager [`AUTOSCALER`], which says nothing else; and whoever scales it from outside, such as a HorizontalPodAutoscaler.
//!
//! **Invariant:** whoever stops saying it lets [`AUTOSCALER`] say the number there is first. A field that its last manager
//! drops falls back to its default, which is 1.

use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;

use crate::{
    apply::{self, AUTOSCALER, says_replicas},
    error::Result,
    pass::Pass,
    render::{self, CONTROLLER, Child, Kind, Names},
    resolve::{ApiReplicas, Nest, Scaling},
};

/// How many API replicas the main manager says there are, of which there are none yet if `is_new`.
pub fn of_api(nest: &Nest, is_new: bool) -> Option<i32> {
    match &nest.api_replicas {
        _ if nest.is_suspended => is_new.then_some(0),
        ApiReplicas::Fixed(replicas) => Some(*replicas),
        // So that they begin with the right number.
        ApiReplicas::Autoscaled(bounds) => is_new.then_some(bounds.min_replicas),
    }
}

/// How many workers the main manager says there are, of which there are none yet if `is_new`.
pub fn of_workers(pass: &Pass<'_>, is_new: bool) -> Option<i32> {
    match &pass.nest.scaling {
        _ if pass.nest.is_suspended => is_new.then_some(0),
        Scaling::Fixed(replicas) => Some(*replicas),
        // From the next pass on the other manager says it.
        Scaling::Lag { policy, .. } if is_new => {
            let wanted = pass.context.scaling.wanted(&pass.nest.uid);
            Some(wanted.unwrap_or_else(|| policy.clamp(0)))
        }
        Scaling::Lag { .. } | Scaling::External => None,
    }
}

/// Called before the main manager says that `live` has `said` pods, or says nothing of that.
///
/// # Errors
/// As of any request.
pub async fn hand_over(pass: &Pass<'_>, live: &Deployment, said: Option<i32>) -> Result<()> {
    if said.is_some() || pass.is_paused() || !says_replicas(live, CONTROLLER) {
        return Ok(());
    }
    match number(live) {
        Some(replicas) => say(pass, live, replicas).await,
        None => Ok(()),
    }
}

/// Gives pods to Deployments that somebody else scales and who cannot begin with none: a HorizontalPodAutoscaler leaves a
/// Deployment without pods alone. So it is after a suspension.
///
/// # Errors
/// As of any request.
pub async fn wake(pass: &Pass<'_>) -> Result<()> {
    if pass.nest.is_suspended || pass.is_paused() {
        return Ok(());
    }
    let names = Names(&pass.nest.name);
    // Not where a person said so.
    let is_ours = |live: &Deployment| {
        [AUTOSCALER, CONTROLLER]
            .iter()
            .any(|it| says_replicas(live, it))
    };
    let has_none = |live: &Deployment| number(live) == Some(0) && is_ours(live);
    if let ApiReplicas::Autoscaled(bounds) = &pass.nest.api_replicas
        && let Some(live) = pass.deployment(&names.api()).await?.filter(has_none)
    {
        say(pass, &live, bounds.min_replicas).await?;
    }
    if pass.nest.scaling == Scaling::External
        && was_suspended(pass)
        && let Some(live) = pass.deployment(&names.worker()).await?.filter(has_none)
    {
        say(pass, &live, 1).await?;
    }
    Ok(())
}

fn was_suspended(pass: &Pass<'_>) -> bool {
    let status = pass.stored.status.as_ref();
    status.is_some_and(|status| status.suspension.is_some())
}

/// Makes it `replicas` pods, whoever said another number.
///
/// # Errors
/// As of any request.
pub async fn force(pass: &Pass<'_>, live: &Deployment, replicas: i32) -> Result<()> {
    if number(live) == Some(replicas) && says_replicas(live, AUTOSCALER) {
        return Ok(());
    }
    say(pass, live, replicas).await
}

async fn say(pass: &Pass<'_>, live: &Deployment, replicas: i32) -> Result<()> {
    let child = render::replicas_of(&pass.nest, live.name_any(), replicas);
    apply::say_replicas(pass.context, &pass.nest, &child).await
}

fn number(live: &Deployment) -> Option<i32> {
    live.spec.as_ref()?.replicas
}

/// Removes a HorizontalPodAutoscaler that the API is not to have any more, before another number is said.
///
/// # Errors
/// As of any request.
pub async fn stop_autoscaler(pass: &Pass<'_>) -> Result<()> {
    let (kind, name) = (Kind::HorizontalPodAutoscaler, Names(&pass.nest.name).api());
    if pass.is_paused() || render::autoscaler(&pass.nest).is_some() {
        return Ok(());
    }
    let found = pass.context.owned.get(&pass.nest, kind, &name);
    match found {
        Some(found) if apply::foreign(&pass.nest, kind, &found.metadata).is_none() => {
            apply::delete(pass.context, &pass.nest, kind, &found.metadata).await
        }
        _ => Ok(()),
    }
}

/// What stands beside Deployments because of how many pods they have, or are to have: an autoscaler, and budgets that let pods
/// be evicted one by one where there are several, whoever said how many.
///
/// # Errors
/// What may go better the next time.
pub async fn surround(pass: &mut Pass<'_>) -> Result<Vec<Child>> {
    let desired = |rollout: Option<&crate::observe::Rollout>| rollout.map_or(0, |it| it.desired);
    let api = desired(pass.findings.api.as_ref());
    let workers = desired(pass.findings.worker.as_ref());
    let mut children = render::budgets(&pass.nest, api, workers);
    children.extend(render::autoscaler(&pass.nest));
    for child in &children {
        pass.apply(child).await?;
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn the_main_manager_says_how_many_apis_there_are_unless_another_does() {
        for (spec, new, later) in [
            ("{}", Some(2), Some(2)),
            ("{api: {replicas: 0}}", Some(0), Some(0)),
            (
                "{api: {autoscaling: {minReplicas: 3, maxReplicas: 9}}}",
                Some(3),
                None,
            ),
            ("{suspend: true}", Some(0), None),
            (
                "{suspend: true, api: {autoscaling: {maxReplicas: 9}}}",
                Some(0),
                None,
            ),
        ] {
            let nest = testing::nest(spec);
            assert_eq!(
                (of_api(&nest, true), of_api(&nest, false)),
                (new, later),
                "{spec}"
            );
        }
    }
}
