//! Overrides of the pods of API and workers, tried out before anything is changed for them.

use serde_json::Value;

use crate::{
    api::Reason,
    apply::{self, Refusal},
    error::Result,
    findings::Problem,
    pass::Pass,
    render::{self, Child},
};

/// Lays what the nest says of its pods over `deployments`, API and workers, and has the API server judge what that comes to.
/// Returns whether they may be applied; if not, what is wrong is among the problems, and pods that run go on as they are.
///
/// # Errors
/// As of any request.
pub async fn fit(pass: &mut Pass<'_>, deployments: &mut [Child; 2]) -> Result<bool> {
    let overrides = [
        ("api", pass.nest.api_pod.clone()),
        ("worker", pass.nest.worker_pod.clone()),
    ];
    let mut fits = true;
    for ((component, over), child) in overrides.into_iter().zip(deployments) {
        let Some(over) = over else { continue };
        if let Some(refusal) = lay(pass, child, &over).await? {
            let words = refusal.message;
            pass.findings.problems.push(Problem {
                reason: Reason::PodTemplateInvalid,
                message: format!(
                    "{component}.podTemplate: {words}; pods that run go on as they are"
                ),
                is_of_the_nest: refusal.is_of_the_object,
            });
            fits = false;
        }
    }
    Ok(fits)
}

async fn lay(pass: &Pass<'_>, child: &mut Child, over: &Value) -> Result<Option<Refusal>> {
    match render::overridden(child.clone(), over) {
        Ok(overridden) => *child = overridden,
        Err(message) => {
            let is_of_the_object = true;
            return Ok(Some(Refusal {
                message,
                is_of_the_object,
            }));
        }
    }
    if pass.is_paused() {
        return Ok(None);
    }
    apply::try_out(pass.context, &pass.nest, child).await
}
