//! Whether what was seen could have been.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    calm::{Span, Trouble},
    faults::Attack,
    history::{History, Kind, Label, Lost, Operation, Outcome, certain, save},
};

/// What the judge counted.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    /// Operations that were answered, or may have happened.
    pub n_operations: usize,
    /// Those that were done, and which of them together with others.
    pub n_done: BTreeMap<(Kind, bool), usize>,
    /// Those whose outcome nobody knows.
    pub n_unknown: usize,
    /// Requests that failed and changed nothing.
    pub n_failed: usize,
    /// Reads of what earlier rounds left behind.
    pub n_looks: usize,
    /// Answers that said they may be behind.
    pub n_labelled: BTreeMap<Label, usize>,
    /// Operations and failures while nothing was wrong.
    pub n_calm: usize,
    /// Answers with a label, and failures, that no fault explains, and that a process which was late does.
    pub n_late: usize,
    /// Conditional writes that failed because others kept writing their key.
    pub n_overtaken: usize,
    /// How old the value of a labelled answer was, at most: since the oldest write that it did not show was acknowledged.
    pub worst_staleness: Duration,
}

/// What was done while the history came about.
#[derive(Debug, Clone)]
pub struct Circumstances {
    /// What was done in the round.
    pub attack: Attack,
    /// When it, or something else, was wrong.
    pub trouble: Trouble,
    /// What the log lost by it.
    pub lost: Option<Lost>,
    /// From when on it was done until it was undone.
    pub on: Span,
}

impl Counts {
    /// Adds those of another round.
    pub fn add(&mut self, other: &Self) {
        self.n_operations += other.n_operations;
        for (kind, n) in &other.n_done {
            *self.n_done.entry(*kind).or_default() += n;
        }
        self.n_unknown += other.n_unknown;
        self.n_failed += other.n_failed;
        self.n_looks += other.n_looks;
        for (label, n) in &other.n_labelled {
            *self.n_labelled.entry(*label).or_default() += n;
        }
        self.n_calm += other.n_calm;
        self.n_late += other.n_late;
        self.n_overtaken += other.n_overtaken;
        self.worst_staleness = self.worst_staleness.max(other.worst_staleness);
    }

    /// A read does not show what was acknowledged before it: only labelled answers may do that, and only as long as what is
    /// wrong explains it.
    fn behind(
        &mut self,
        key: &str,
        read: &Operation,
        missed: &Operation,
        trouble: &Trouble,
    ) -> Result<()> {
        ensure!(
            read.label == Some(Label::Unconfirmed)
                || (missed.label == Some(Label::Pending) && missed.kind != Kind::Read),
            "a read of {key} is older than what was acknowledged before it: {read:?} does not show {missed:?}"
        );
        ensure!(
            trouble.explains(missed.end, read.call),
            "a read of {key} is behind for longer than anything was wrong: {read:?} does not show {missed:?}"
        );
        let age = Duration::from_nanos(read.call - missed.end);
        self.worst_staleness = self.worst_staleness.max(age);
        Ok(())
    }
}

/// Judges a round. What was acknowledged while it was `lost` may be missing, and nothing else: not what came before, and not
/// what the shards' next lives acknowledged.
///
/// # Errors
/// A sentence about the operation that could not have been, or must not have been.
pub fn judge(
    history: &History,
    circumstances: &Circumstances,
    dir: &Path,
    name: &str,
) -> Result<Counts> {
    let (operations, lost) = (history.operations(), circumstances.lost);
    let trouble = &circumstances.trouble;
    let mut counts = Counts {
        n_operations: operations.len(),
        ..Counts::default()
    };
    let mut by_key: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in &operations {
        counts.n_unknown += usize::from(operation.outcome == Outcome::Unknown);
        if operation.outcome == Outcome::Ok {
            let kind = (operation.kind, operation.is_batched);
            *counts.n_done.entry(kind).or_default() += 1;
        }
        by_key.entry(&operation.key).or_default().push(operation);
    }
    for (key, operations) in &by_key {
        one_value_per_version(key, operations)?;
        nothing_is_read_that_nobody_wrote(key, operations)?;
        read_your_writes(key, operations, lost, trouble, &mut counts)?;
        nothing_deleted_is_back(key, operations, lost, trouble, &mut counts)?;
        nothing_expired_is_back(key, operations)?;
    }
    // When something ends is known even if it was lost.
    let ends: Vec<Operation> = operations.iter().filter_map(Operation::expiry).collect();
    linearizable(&certain(lost, &operations), &ends, dir, name)?;
    exceptions_have_reasons(history, circumstances, &mut counts)?;
    is_enough(&operations)?;
    was_noticed(&circumstances.attack, circumstances.on, history)?;
    for (key, operations) in &by_key {
        let last = operations.last().context("a key has operations")?;
        ensure!(
            last.label.is_none(),
            "a read of {key} is not sure of itself after all was healed: {last:?}"
        );
    }
    Ok(counts)
}

fn one_value_per_version(key: &str, operations: &[&Operation]) -> Result<()> {
    let mut values: HashMap<u64, i64> = HashMap::new();
    for operation in operations {
        if operation.outcome != Outcome::Ok || operation.version == 0 {
            continue;
        }
        let value = value_of(operation);
        let known = *values.entry(operation.version).or_insert(value);
        ensure!(
            known == value,
            "version {} of {key} names two values, {known} and {value}",
            operation.version
        );
    }
    Ok(())
}

/// What is read was written, to this key and with this version; or nobody was told whether it was.
fn nothing_is_read_that_nobody_wrote(key: &str, operations: &[&Operation]) -> Result<()> {
    let mut writes: HashMap<i64, &Operation> = HashMap::new();
    let written = operations.iter().filter(|it| it.kind.is_write());
    writes.extend(written.map(|it| (it.value, *it)));
    let touches: Vec<&&Operation> = operations
        .iter()
        .filter(|it| it.kind == Kind::Touch)
        .collect();
    let reads = operations.iter().filter(|it| it.kind.is_read());
    for read in reads.filter(|it| it.outcome == Outcome::Ok) {
        let write = writes.get(&read.found);
        let gave_version = |it: &Operation| match it.outcome {
            Outcome::Ok => it.version == read.version && it.call < read.end,
            Outcome::Unknown => it.call < read.end,
            Outcome::Mismatch | Outcome::Absent => false,
        };
        // A value has another version for each time that it was touched.
        let was_touched = |write: &Operation| {
            let mut touches = touches.iter().filter(|it| gave_version(it));
            matches!(write.outcome, Outcome::Ok | Outcome::Unknown)
                && write.version < read.version
                && write.call < read.end
                && touches.any(|it| it.outcome == Outcome::Unknown || it.found == read.found)
        };
        let is_it = |write: &&&Operation| gave_version(write) || was_touched(write);
        ensure!(
            write.filter(is_it).is_some(),
            "a read of {key} shows what nobody wrote: {read:?}, {write:?}"
        );
    }
    Ok(())
}

/// Promise 2: no read is older than what was acknowledged, or read past Redis, before it began, unless it or the write is
/// labelled. Judges by what `lost` spares.
fn read_your_writes(
    key: &str,
    operations: &[&Operation],
    lost: Option<Lost>,
    trouble: &Trouble,
    counts: &mut Counts,
) -> Result<()> {
    let of = |is: fn(&Operation) -> bool| operations.iter().copied().filter(move |&it| is(it));
    let is_known = |it: &Operation| {
        it.outcome == Outcome::Ok
            && (it.kind.leaves_value() || (it.kind == Kind::Read && it.label.is_none()))
    };
    let is_spared = |it: &Operation| lost.is_none_or(|lost| lost.spares(it));
    let writes: Vec<&Operation> = of(is_known).filter(|it| is_spared(it)).collect();
    // When each has happened at the latest. Of what the log lost, Redis may know until the next life.
    let until = |it: &Operation| {
        if it.outcome == Outcome::Unknown || !is_spared(it) {
            trouble.settles(it.call, it.end)
        } else {
            it.end
        }
    };
    let mut deletes: Vec<(&Operation, u64)> =
        of(|it| it.kind.takes_away() && matches!(it.outcome, Outcome::Ok | Outcome::Unknown))
            .map(|delete| (delete, until(delete)))
            .collect();
    let ends: Vec<_> = ends(operations).collect();
    let mut reads: Vec<&Operation> = of(|it| it.kind.is_read()).collect();
    reads.sort_by_key(|read| read.end);
    for read in reads {
        for write in writes.iter().filter(|write| write.end < read.call) {
            if read.outcome == Outcome::Ok {
                if write.version > read.version {
                    counts.behind(key, read, write, trouble)?;
                }
                continue;
            }
            // Something that came after it has expired, or it has itself.
            let has_expired = ends.iter().any(|(by, end)| {
                end.call < read.end && (until(by) > write.call || by.value == value_of(write))
            });
            if has_expired {
                continue;
            }
            let mut reasons = deletes
                .iter_mut()
                .filter(|(delete, until)| delete.call < read.end && *until > write.call)
                // What is newer than the version that it names is not gone by it.
                .filter(|(it, _)| it.kind == Kind::Delete || write.version <= it.expected);
            match (reasons.next(), reasons.next()) {
                (None, _) => counts.behind(key, read, write, trouble)?,
                // It happens once: it has, and what is written from now on is not gone by it.
                (Some((delete, until)), None) if is_spared(delete) && is_sure(read, write) => {
                    *until = read.end.min(*until);
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Whether neither says that the one may not show the other.
fn is_sure(read: &Operation, write: &Operation) -> bool {
    read.label.is_none() && write.label.is_none()
}

/// Promises 2 and 3: what somebody saw before a delete is not read once that was acknowledged. Judges by deletes that `lost`
/// spares.
fn nothing_deleted_is_back(
    key: &str,
    operations: &[&Operation],
    lost: Option<Lost>,
    trouble: &Trouble,
    counts: &mut Counts,
) -> Result<()> {
    // When somebody first knew of a version.
    let mut known_since: HashMap<u64, u64> = HashMap::new();
    for operation in operations {
        if operation.outcome == Outcome::Ok && operation.version > 0 {
            let since = known_since.entry(operation.version).or_insert(u64::MAX);
            *since = operation.end.min(*since);
        }
    }
    let deletes: Vec<&Operation> = operations
        .iter()
        .copied()
        .filter(|it| it.kind.takes_away() && it.outcome == Outcome::Ok)
        .filter(|it| lost.is_none_or(|lost| lost.spares(it)))
        .collect();
    for read in operations
        .iter()
        .filter(|it| it.kind.is_read() && it.outcome == Outcome::Ok)
    {
        let known_since = known_since.get(&read.version).copied().unwrap_or(u64::MAX);
        for missed in deletes
            .iter()
            .filter(|delete| known_since < delete.call && delete.end < read.call)
        {
            counts.behind(key, read, missed, trouble)?;
        }
    }
    Ok(())
}

/// Promise 3: what has expired is not read. That it is not gone too early is promise 2.
fn nothing_expired_is_back(key: &str, operations: &[&Operation]) -> Result<()> {
    let ends: HashMap<i64, Operation> = ends(operations).map(|(by, end)| (by.value, end)).collect();
    for read in operations
        .iter()
        .filter(|it| it.kind.is_read() && it.outcome == Outcome::Ok)
    {
        let end = ends.get(&read.found);
        let has_expired = |end: &Operation| end.outcome == Outcome::Ok && end.end < read.call;
        ensure!(
            !end.is_some_and(has_expired),
            "a read of {key} shows what has expired: {read:?}"
        );
    }
    Ok(())
}

/// What wrote something that ends, and that end.
fn ends<'a>(operations: &'a [&Operation]) -> impl Iterator<Item = (&'a Operation, Operation)> {
    let operations = operations.iter().copied();
    operations.filter_map(|it| it.expiry().map(|end| (it, end)))
}

/// The value that it wrote, read or touched.
fn value_of(operation: &Operation) -> i64 {
    if operation.kind.is_read() || operation.kind == Kind::Touch {
        operation.found
    } else {
        operation.value
    }
}

fn linearizable(
    operations: &[Operation],
    ends: &[Operation],
    dir: &Path,
    name: &str,
) -> Result<()> {
    let (path, picture) = (
        dir.join(format!("{name}.jsonl")),
        dir.join(format!("{name}.html")),
    );
    let asked = operations
        .iter()
        .filter(|it| it.kind != Kind::Plain && is_proof(it, ends));
    save(asked.chain(ends), &path)?;
    let checked = Command::new(checker()?)
        .args([&path, &picture])
        .output()
        .context("failed to run the checker")?;
    match checked.status.code() {
        Some(0) => Ok(std::fs::remove_file(&path)?),
        Some(1) => bail!(
            "the history cannot have happened one operation after the other: {} shows where it breaks",
            picture.display()
        ),
        _ => bail!(
            "the checker has no answer: {}",
            String::from_utf8_lossy(&checked.stderr)
        ),
    }
}

/// Whether an answer says what its key was. Around the end of a value, processes whose idea of now differs by a little answer
/// differently, one after the other: only what was changed then has happened.
fn is_proof(operation: &Operation, ends: &[Operation]) -> bool {
    let has_changed =
        !operation.kind.is_read() && matches!(operation.outcome, Outcome::Ok | Outcome::Unknown);
    let mut ends = ends.iter().filter(|end| end.key == operation.key);
    has_changed || !ends.any(|end| end.call <= operation.end && operation.call <= end.end)
}

fn checker() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("birb-nest-porcupine"))
        .find(|file| file.is_file())
        .context(
            "birb-nest-porcupine is missing: `scripts/init.sh --tests` builds it into .dev/bin",
        )
}

mod reasons;
mod rows;
#[cfg(test)]
mod tests;

pub use reasons::is_enough;
pub use rows::{rows_are_what_was_acknowledged, rows_are_what_was_seen};

use reasons::{exceptions_have_reasons, was_noticed};
