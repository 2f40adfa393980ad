//! What is said of a nest in one condition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use crate::api::{ConditionType, Reason};

/// A condition without its times.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) holds: bool,
    pub(crate) reason: Reason,
    pub(crate) message: String,
    /// The generation it speaks of; `None` for the one that this pass is about.
    pub(crate) generation: Option<i64>,
}

pub(crate) fn yes(reason: Reason, message: impl Into<String>) -> Verdict {
    Verdict {
        holds: true,
        reason,
        message: message.into(),
        generation: None,
    }
}

pub(crate) fn no(reason: Reason, message: impl Into<String>) -> Verdict {
    Verdict {
        holds: false,
        reason,
        message: message.into(),
        generation: None,
    }
}

/// The verdict of an earlier pass. It goes on speaking of the generation that it was made for: whoever waits for a
/// condition of a new spec must not take the old one's for it.
pub(crate) fn before(old: &[Condition], type_: ConditionType) -> Option<Verdict> {
    let found = old
        .iter()
        .find(|condition| condition.type_ == type_.as_str())?;
    Some(Verdict {
        holds: found.status == "True",
        reason: Reason::parse(&found.reason)?,
        message: found.message.clone(),
        generation: found.observed_generation,
    })
}
