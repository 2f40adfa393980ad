//! Mistakes that can be switched on, to see that the soak notices them (docs/TESTING.md). A release build has none of this: the
//! switch is a constant there.

use std::{borrow::Cow, time::Duration};

use birb_nest_core::{Batch, State};

/// A mistake, named by `BIRBNEST_SABOTAGE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    /// `older-replaces-newer`: Redis takes whatever comes last.
    OlderReplacesNewer,
    /// `install-without-token`: a writer fills an empty place in Redis, however late it comes; what it puts there stays for a
    /// moment, in which somebody looks.
    InstallWithoutToken,
    /// `no-marker-check`: a Redis that was restarted is believed.
    NoMarkerCheck,
    /// `postgres-before-log`: a lookup asks PostgreSQL first.
    PostgresBeforeLog,
    /// `condition-without-pin`: a conditional write is judged by a lookup, and published whatever has come meanwhile.
    ConditionWithoutPin,
    /// `condition-by-absence`: where the log has nothing of a key, no pin is put there: a conditional write is judged by
    /// PostgreSQL, and published if the log has nothing again.
    ConditionByAbsence,
    /// `trim-before-commit`: the log forgets what PostgreSQL does not have yet.
    TrimBeforeCommit,
    /// `ever-pending`: once Redis could not be told of a write, some are called pending for ever.
    EverPending,
    /// `skip-an-entry`: of every tenth batch one entry is not stored, and `applied_to` moves past it.
    SkipAnEntry,
    /// `no-tombstones`: deletes are not stored.
    NoTombstones,
    /// `own-clock`: what a server says of the time is heard, and not taken.
    OwnClock,
}

/// How long a mistake takes where it would be too quick to matter often.
pub const DAWDLE: Duration = Duration::from_millis(20);

/// Whether the process makes this mistake.
#[cfg(debug_assertions)]
pub fn makes(mistake: Mistake) -> bool {
    use std::sync::OnceLock;

    static CHOSEN: OnceLock<Option<Mistake>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| {
        let name = std::env::var("BIRBNEST_SABOTAGE").ok()?;
        tracing::error!("BIRBNEST_SABOTAGE={name}: this process breaks promises on purpose");
        match name.as_str() {
            "older-replaces-newer" => Some(Mistake::OlderReplacesNewer),
            "install-without-token" => Some(Mistake::InstallWithoutToken),
            "no-marker-check" => Some(Mistake::NoMarkerCheck),
            "postgres-before-log" => Some(Mistake::PostgresBeforeLog),
            "condition-without-pin" => Some(Mistake::ConditionWithoutPin),
            "condition-by-absence" => Some(Mistake::ConditionByAbsence),
            "trim-before-commit" => Some(Mistake::TrimBeforeCommit),
            "ever-pending" => Some(Mistake::EverPending),
            "skip-an-entry" => Some(Mistake::SkipAnEntry),
            "no-tombstones" => Some(Mistake::NoTombstones),
            "own-clock" => Some(Mistake::OwnClock),
            _ => panic!("BIRBNEST_SABOTAGE={name} is no mistake that is known"),
        }
    });
    *chosen == Some(mistake)
}

/// Whether the process makes this mistake: never.
#[cfg(not(debug_assertions))]
pub const fn makes(_: Mistake) -> bool {
    false
}

/// Whether it is so, or, with the mistake in it, every tenth time once it was.
pub fn is_or_was(mistake: Mistake, is: bool) -> bool {
    use std::sync::atomic::{AtomicU64, Ordering};

    static SINCE: AtomicU64 = AtomicU64::new(0);
    if !makes(mistake) {
        return is;
    }
    if is {
        SINCE.fetch_add(1, Ordering::Relaxed);
        return true;
    }
    SINCE.load(Ordering::Relaxed) > 0 && SINCE.fetch_add(1, Ordering::Relaxed) % 10 == 9
}

/// What is stored of a batch: all of it, but for these mistakes.
pub fn stored_of(batch: &Batch) -> Cow<'_, Batch> {
    use std::sync::atomic::{AtomicU64, Ordering};

    static N_BATCHES: AtomicU64 = AtomicU64::new(0);
    let mut stored = Cow::Borrowed(batch);
    if makes(Mistake::SkipAnEntry) && N_BATCHES.fetch_add(1, Ordering::Relaxed) % 10 == 9 {
        stored.to_mut().entries.pop();
    }
    if makes(Mistake::NoTombstones) {
        let entries = &mut stored.to_mut().entries;
        entries.retain(|(_, entry)| entry.state != State::Deleted);
    }
    stored
}

/// Ends the process on the spot, as a kill would, if `BIRBNEST_DIES_AFTER` names this step.
#[cfg(debug_assertions)]
pub fn may_die_after(step: &str) {
    if std::env::var("BIRBNEST_DIES_AFTER").is_ok_and(|chosen| chosen == step) {
        tracing::error!("BIRBNEST_DIES_AFTER={step}: this process dies on purpose");
        std::process::abort();
    }
}

/// Ends the process on the spot: never.
#[cfg(not(debug_assertions))]
pub const fn may_die_after(_: &str) {}

/// A script of Redis, with the mistake in it.
pub fn script(text: &'static str) -> Cow<'static, str> {
    let changes = [
        (
            Mistake::OlderReplacesNewer,
            "tonumber(string.sub(head, 2, 17)) >= tonumber(ARGV[2])",
            "false",
        ),
        (
            Mistake::InstallWithoutToken,
            "if kind == '' then\n    return 0\nend\nif kind == 'E'",
            "if kind == '' then\n    head = ARGV[1]\n    ARGV[4] = 300\nend\nif kind == 'E'",
        ),
        (
            Mistake::NoMarkerCheck,
            "if marker == run then",
            "if marker then",
        ),
    ];
    match changes
        .into_iter()
        .find(|(mistake, right, _)| makes(*mistake) && text.contains(right))
    {
        Some((_, right, wrong)) => text.replace(right, wrong).into(),
        None => text.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_changed_unless_it_is_asked_for() {
        let install = include_str!("redis/lua/install.lua");
        assert_eq!(script(install), install);
        assert!(install.contains("tonumber(string.sub(head, 2, 17)) >= tonumber(ARGV[2])"));
        assert!(install.contains("if kind == '' then\n    return 0\nend\nif kind == 'E'"));
        assert!(include_str!("redis/lua/claim.lua").contains("if marker == run then"));
    }
}
