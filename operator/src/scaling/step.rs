//! The part of a pass that has the backlog followed and sets the number of workers.

use kube::runtime::reflector::ObjectRef;

use super::Followed;
use crate::{
    apply::{self, AUTOSCALER, says_replicas},
    error::Result,
    observe::Rollout,
    pass::Pass,
    render::{self, Inputs, Names},
    resolve::Scaling,
};

/// In mode Lag, lets the manager that says nothing else say how many workers there are. It does not matter whether anything
/// else of the nest can be brought further: old workers have a backlog too.
///
/// # Errors
/// As of any request.
pub async fn step(pass: &mut Pass<'_>, inputs: &Inputs) -> Result<()> {
    let scaling = &pass.context.scaling;
    let (Scaling::Lag { policy, poll }, false) = (&pass.nest.scaling, pass.is_paused()) else {
        scaling.forget(&pass.nest.uid);
        return Ok(());
    };
    let worker = Names(&pass.nest.name).worker();
    let Some(live) = pass.deployment(&worker).await? else {
        return Ok(());
    };
    let rollout = Rollout::of(&live);
    let followed = Followed {
        nest: ObjectRef::from_obj(pass.stored),
        access: render::log_access(&pass.nest, inputs),
        policy: policy.clone(),
        poll: *poll,
        live: rollout.desired,
        ready: rollout.ready,
    };
    let wanted = scaling.register(&pass.nest.uid, followed);
    if rollout.desired != wanted || !says_replicas(&live, AUTOSCALER) {
        let child = render::worker_replicas(&pass.nest, wanted);
        apply::say_replicas(pass.context, &pass.nest, &child).await?;
    }
    pass.findings.scaling = scaling.view(&pass.nest.uid);
    Ok(())
}

/// How many workers the main manager says there are, of which there are none yet if `is_new`.
pub fn said_by_main(pass: &Pass<'_>, is_new: bool) -> Option<i32> {
    match &pass.nest.scaling {
        Scaling::Fixed(replicas) => Some(*replicas),
        // So that they begin with the right number; from the next pass on the other manager says it.
        Scaling::Lag { policy, .. } if is_new => {
            let wanted = pass.context.scaling.wanted(&pass.nest.uid);
            Some(wanted.unwrap_or_else(|| policy.clamp(0)))
        }
        Scaling::Lag { .. } | Scaling::External => None,
    }
}
