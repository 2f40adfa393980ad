//! The part of a pass that makes objects of kinds which may not be served.

use crate::{
    error::{Error, Result},
    pass::Pass,
    render::{self, Child, Kind},
};

/// Makes what collects the nest's metrics, where the API server knows such objects. Those kinds that it does not know are
/// looked for again after `--retry`.
///
/// # Errors
/// What may go better the next time.
pub async fn ensure(pass: &mut Pass<'_>) -> Result<Vec<Child>> {
    let children = render::monitoring(&pass.nest);
    for child in &children {
        match pass.apply(child).await {
            Ok(_) => {}
            Err(error) if is_unknown(&error, child.kind) => {
                pass.findings.kinds_missing.push(child.kind);
                pass.look_again(pass.context.config.retry);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(children)
}

/// An apply makes what is not there; so what is not found is the kind. Of a whole group that is not there, the API server says
/// so in plain text, which gives no reason.
fn is_unknown(error: &Error, of: Kind) -> bool {
    match error {
        Error::Child {
            kind,
            source: kube::Error::Api(status),
            ..
        } => *kind == of && status.code == 404,
        _ => false,
    }
}
