//! What the status says of scaling. Pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::View;
use crate::{
    api::{BirbNest, ConditionType, Reason, ScalingSpec, WorkerStatus},
    resolve::{Nest, Scaling},
    verdict::{Verdict, before, no, yes},
};

/// The lag to show. An operator that has just begun to lead has asked nobody yet: what was known before stands.
pub fn lag(old: &WorkerStatus, stored: &BirbNest, nest: &Nest, view: Option<&View>) -> Option<i64> {
    let is_awake = !stored.spec.paused && !nest.is_suspended;
    let follows = matches!(nest.scaling, Scaling::Lag { .. }) && is_awake;
    match view {
        Some(view) => view.lag.map(|lag| i64::try_from(lag).unwrap_or(i64::MAX)),
        None => old.lag.filter(|_| follows),
    }
}

/// `ScalingActive`.
pub fn active(old: &[Condition], stored: &BirbNest, nest: &Nest, view: Option<&View>) -> Verdict {
    if nest.is_suspended && !stored.spec.paused {
        return no(Reason::Suspended, "spec.suspend is true");
    }
    match nest.scaling {
        Scaling::Fixed(_) => return no(Reason::ScalingDisabled, "worker.scaling.mode is Fixed"),
        Scaling::External => return no(Reason::ScalingDisabled, "worker.scaling.mode is External"),
        Scaling::Lag { .. } if stored.spec.paused => {
            return no(Reason::Paused, "spec.paused is true");
        }
        Scaling::Lag { .. } => {}
    }
    let Some(view) = view else {
        return before(old, ConditionType::ScalingActive)
            .filter(|before| {
                ![Reason::ScalingDisabled, Reason::Paused, Reason::Suspended]
                    .contains(&before.reason)
            })
            .unwrap_or_else(|| no(Reason::LagUnknown, "the lag was not read yet"));
    };
    if let Some(trouble) = &view.trouble {
        let message = format!("the number of workers stays as it is: {trouble}");
        return no(Reason::LagUnknown, message);
    }
    if stored.spec.worker.scaling.replicas != ScalingSpec::REPLICAS {
        return yes(
            Reason::ScaleIgnored,
            "worker.scaling.replicas, which kubectl scale sets, has no effect in mode Lag; \
             minReplicas and maxReplicas have, or mode Fixed",
        );
    }
    yes(Reason::AsExpected, "")
}
