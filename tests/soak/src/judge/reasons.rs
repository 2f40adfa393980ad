//! Whether labels and failures have a reason, and faults an effect.

use std::{fmt::Debug, time::Duration};

use anyhow::{Result, bail, ensure};

use super::{Circumstances, Counts};
use crate::{
    calm::{Span, nanoseconds},
    faults::Attack,
    history::{Failure, History, Kind, Operation, Outcome},
    late::LONG,
};

/// So many labels and failures of a round may have no other reason than that a process was a little late, or shortly before. On
/// a busy machine somebody often is; what comes of it must stay rare nevertheless.
const MOST_LATE: usize = 3;
/// So often a conditional write begins anew when others are quicker, before it gives up (`ATTEMPTS` in
/// `dataplane/store/src/nest/condition.rs`).
const ATTEMPTS: usize = 12;

/// A label, a failure or an unknown outcome that no fault explains.
pub(super) struct Odd {
    api: usize,
    kind: Kind,
    key: String,
    call: u64,
    end: u64,
    what: String,
}

/// Every label, failure and unknown outcome has a reason: a fault that can be one, of that kind and at that time. The others
/// are counted by theirs: others kept writing the key; or somebody was late, seen by somebody else than the nest.
///
/// # Errors
/// One has no reason that was seen, or for too many of them nobody was as late as their deadline.
pub(super) fn exceptions_have_reasons(
    history: &History,
    circumstances: &Circumstances,
    counts: &mut Counts,
) -> Result<()> {
    let (operations, looks) = (history.operations(), history.looks());
    counts.n_looks = looks.len();
    for label in operations.iter().chain(&looks).filter_map(|it| it.label) {
        *counts.n_labelled.entry(label).or_default() += 1;
    }
    let trouble = &circumstances.trouble;
    // What took long, and nothing was wrong that could have been the reason.
    let slow: Vec<Span> = operations
        .iter()
        .chain(&looks)
        .map(|it| (it.call, it.end))
        .chain(history.failures().iter().map(|it| (it.call, it.end)))
        .filter(|(call, end)| end - call >= nanoseconds(LONG) && trouble.spares(*call, *end))
        .map(|(from, to)| Span { from, to })
        .collect();
    let mut late = Vec::new();
    let odd = labels_without_reason(&operations, circumstances)
        .into_iter()
        .chain(labels_without_reason(&looks, circumstances))
        .chain(failures_without_reason(history, circumstances, counts));
    for it in odd {
        if it.kind.begins_anew() && it.is_overtaken(&operations) {
            counts.n_overtaken += 1;
        } else if trouble.was_late(it.api, it.call, it.end)
            || slow.iter().any(|slow| !slow.spares(it.call, it.end))
        {
            println!("soak: somebody was late: {}", it.what);
            counts.n_late += 1;
            if !trouble.was_too_late(it.api, it.call, it.end) {
                late.push(it.what);
            }
        } else {
            bail!("{}, and nobody was late ({trouble:?})", it.what);
        }
    }
    ensure!(
        late.len() <= MOST_LATE,
        "{} ({} such, and somebody was a little late; {trouble:?})",
        late[0],
        late.len(),
    );
    Ok(())
}

impl Odd {
    fn of(operation: &Operation, why: &str) -> Self {
        Self {
            api: operation.api,
            kind: operation.kind,
            key: operation.key.clone(),
            call: operation.call,
            end: operation.end,
            what: told(why, operation),
        }
    }

    /// Whether others changed its key as often as it can have begun anew.
    fn is_overtaken(&self, operations: &[Operation]) -> bool {
        let overtakes = |it: &&Operation| {
            it.key == self.key
                && !it.kind.is_read()
                && matches!(it.outcome, Outcome::Ok | Outcome::Unknown)
                && self.call <= it.end
                && it.call <= self.end
        };
        operations.iter().filter(overtakes).count() >= ATTEMPTS
    }
}

fn told(why: &str, what: &impl Debug) -> String {
    format!("{why}: {what:?}")
}

/// Answers that have a label, and nothing is wrong that can be the reason.
pub(super) fn labels_without_reason(
    operations: &[Operation],
    circumstances: &Circumstances,
) -> Vec<Odd> {
    let (attack, trouble) = (circumstances.attack, &circumstances.trouble);
    let mut odd = Vec::new();
    for operation in operations {
        let Some(label) = operation.label else {
            continue;
        };
        if trouble.spares(operation.call, operation.end) {
            let why = "an answer has a label and nothing was wrong";
            odd.push(Odd::of(operation, why));
        } else if !attack.allows(label) && trouble.is_awake(operation.call, operation.end) {
            let why = format!("{attack:?} is no reason for a label");
            odd.push(Odd::of(operation, &why));
        }
    }
    odd
}

/// Requests that failed, or whose outcome is unknown, and nothing is wrong that can be the reason: promise 5.
pub(super) fn failures_without_reason(
    history: &History,
    circumstances: &Circumstances,
    counts: &mut Counts,
) -> Vec<Odd> {
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
            odd.push(Odd::of(&it, &why));
        }
    }
    for it in history.failures() {
        counts.n_failed += 1;
        if let Some(why) = without_reason(it.call, it.end, it.api, it.kind) {
            let what = told(&why, &it);
            let Failure { api, kind, key, .. } = it;
            odd.push(Odd {
                api,
                kind,
                key,
                call: it.call,
                end: it.end,
                what,
            });
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
        let n_deletes = done.clone().filter(|it| it.kind.takes_away()).count();
        let n = done.count();
        if n < LEAST || n_writes < LEAST / 5 || n_deletes == 0 {
            bail!(
                "too little was done to judge anything: {n} operations, {n_writes} of them writes, {n_deletes} deletes, by API {api}"
            );
        }
    }
    Ok(())
}
