//! Whether labels and failures have a reason, and faults an effect.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{Circumstances, Counts};
use crate::{
    calm::{Span, nanoseconds},
    faults::Attack,
    history::{Failure, History, Kind, Operation, Outcome},
};

/// Answers that have a label, and nothing is wrong that can be the reason.
pub(super) fn labels_without_reason(
    operations: &[Operation],
    circumstances: &Circumstances,
) -> Vec<String> {
    let (attack, trouble) = (circumstances.attack, &circumstances.trouble);
    let mut odd = Vec::new();
    for operation in operations {
        let Some(label) = operation.label else {
            continue;
        };
        if trouble.spares(operation.call, operation.end) {
            odd.push(format!(
                "an answer has a label and nothing was wrong: {operation:?}"
            ));
        } else if !attack.allows(label) && trouble.is_awake(operation.call, operation.end) {
            odd.push(format!(
                "{attack:?} is no reason for a label: {operation:?}"
            ));
        }
    }
    odd
}

/// Requests that failed, or whose outcome is unknown, and nothing is wrong that can be the reason: promise 5.
pub(super) fn failures_without_reason(
    history: &History,
    circumstances: &Circumstances,
    counts: &mut Counts,
) -> Vec<String> {
    let (attack, trouble) = (circumstances.attack, &circumstances.trouble);
    let without_reason = |call, end, api, kind| {
        if trouble.spares(call, end) {
            Some("a request failed and nothing was wrong".to_owned())
        } else if !attack.may_fail(api, kind) && trouble.is_awake(call, end) {
            Some(format!("{attack:?} is no reason for a failure"))
        } else {
            None
        }
    };
    let mut odd = Vec::new();
    for it in history.operations() {
        counts.n_calm += usize::from(trouble.spares(it.call, it.end));
        if it.outcome == Outcome::Unknown
            && let Some(why) = without_reason(it.call, it.end, it.api, it.kind)
        {
            odd.push(format!("{why}: {it:?}"));
        }
    }
    for it in history.failures() {
        counts.n_failed += 1;
        if let Some(why) = without_reason(it.call, it.end, it.api, it.kind) {
            odd.push(format!("{why}: {it:?}"));
        }
    }
    odd
}

/// A fault that nobody noticed was none: something failed, had a label or took long while it was on, at an API that it is about.
/// Faults that need not be noticed are let be.
pub(super) fn was_noticed(attack: &Attack, on: Span, history: &History) -> Result<()> {
    let Some(hit) = attack.is_noticed_at() else {
        return Ok(());
    };
    let long = nanoseconds(attack.is_long(Duration::from_nanos(on.to - on.from)));
    let meets = |call, end| call < on.to && on.from < end;
    let is_hit = |it: &Operation| {
        let meanwhile = it.end.min(on.to).saturating_sub(it.call.max(on.from));
        hit.contains(&it.api)
            && meets(it.call, it.end)
            && (it.outcome == Outcome::Unknown || it.label.is_some() || meanwhile >= long)
    };
    let has_failed = |it: &Failure| hit.contains(&it.api) && meets(it.call, it.end);
    if !history.operations().iter().any(is_hit) && !history.failures().iter().any(has_failed) {
        bail!("nobody noticed anything of {attack:?}, from {on:?}");
    }
    Ok(())
}

/// A round goes on until there are so many answers of each API: one without them judges nothing.
const LEAST: usize = 50;

/// Whether there was something to judge, at both APIs.
///
/// # Errors
/// There was too little.
pub fn is_enough(operations: &[Operation]) -> Result<()> {
    for api in 0..2 {
        let done = operations
            .iter()
            .filter(|it| it.api == api && it.outcome == Outcome::Ok);
        let n_writes = done.clone().filter(|it| it.kind.is_write()).count();
        let n_deletes = done.clone().filter(|it| it.kind == Kind::Delete).count();
        let n = done.count();
        if n < LEAST || n_writes < LEAST / 5 || n_deletes == 0 {
            bail!(
                "too little was done to judge anything: {n} operations, {n_writes} of them writes, {n_deletes} deletes, by API {api}"
            );
        }
    }
    Ok(())
}
