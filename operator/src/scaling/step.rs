//! The part of a pass that has the backlog followed and sets the number of workers.

use std::time::Duration;

use kube::runtime::reflector::ObjectRef;

use super::{Followed, decide::Policy};
use crate::{
    api::SuspensionStage,
    apply::{self, AUTOSCALER, says_replicas},
    error::Result,
    observe::Rollout,
    pass::Pass,
    render::{self, Inputs, Names},
    resolve::Scaling,
};

/// How often the backlog of a nest that is put to sleep is read, where nobody said.
const DRAIN_POLL: Duration = Duration::from_secs(2);

/// In mode Lag, lets the manager that says nothing else say how many workers there are. It does not matter whether anything
/// else of the nest can be brought further: old workers have a backlog too. In every mode, has the backlog read of a nest that
/// is put to sleep.
///
/// # Errors
/// As of any request.
pub async fn step(pass: &mut Pass<'_>, inputs: &Inputs) -> Result<()> {
    let scaling = &pass.context.scaling;
    let suspension = pass.findings.suspension.as_ref();
    let is_draining = suspension.is_some_and(|it| it.stage == SuspensionStage::Draining);
    let is_asleep = suspension.is_some() && !is_draining;
    let follows_lag = matches!(pass.nest.scaling, Scaling::Lag { .. });
    if pass.is_paused() || is_asleep || !(follows_lag || is_draining) {
        scaling.forget(&pass.nest.uid);
        return Ok(());
    }
    let worker = Names(&pass.nest.name).worker();
    let Some(live) = pass.deployment(&worker).await? else {
        return Ok(());
    };
    let rollout = Rollout::of(&live);
    let (policy, poll) = match &pass.nest.scaling {
        Scaling::Lag { policy, poll } => (policy.clone(), *poll),
        // Only to see when nothing waits any more.
        _ => (
            Policy::standing(rollout.desired, pass.nest.shards),
            DRAIN_POLL,
        ),
    };
    let followed = Followed {
        nest: ObjectRef::from_obj(pass.stored),
        access: render::log_access(&pass.nest, inputs),
        policy,
        poll,
        live: rollout.desired,
        ready: rollout.ready,
    };
    let wanted = scaling.register(&pass.nest.uid, followed);
    if follows_lag && (rollout.desired != wanted || !says_replicas(&live, AUTOSCALER)) {
        let child = render::replicas_of(&pass.nest, worker, wanted);
        apply::say_replicas(pass.context, &pass.nest, &child).await?;
    }
    pass.findings.scaling = scaling.view(&pass.nest.uid);
    Ok(())
}
