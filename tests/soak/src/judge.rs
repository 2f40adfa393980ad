//! Whether what was seen could have been.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::history::{History, Kind, Operation, Outcome};

/// What the judge counted.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    /// Operations that were answered, or may have happened.
    pub n_operations: usize,
    /// Those whose outcome nobody knows.
    pub n_unknown: usize,
    /// Answers that said they may be behind.
    pub n_labelled: usize,
    /// How old the value of a labelled answer was, at most: since the newest write that it did not show was acknowledged.
    pub worst_staleness: Duration,
}

/// Judges a round. With `copied_at`, NATS was put back to what it had then: what it acknowledged later may be lost, and
/// nothing else; what is in the history behind that cannot be judged as if it had gone on.
///
/// # Errors
/// A sentence about the operation that could not have been.
pub fn judge(history: &History, copied_at: Option<u64>, dir: &Path, name: &str) -> Result<Counts> {
    let operations = history.operations();
    let mut counts = Counts {
        n_operations: operations.len(),
        ..Counts::default()
    };
    let mut by_key: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in &operations {
        counts.n_unknown += usize::from(operation.outcome == Outcome::Unknown);
        counts.n_labelled += usize::from(operation.labelled);
        by_key.entry(&operation.key).or_default().push(operation);
    }
    for (key, operations) in &by_key {
        one_value_per_version(key, operations)?;
        match copied_at {
            None => read_your_writes(key, operations, &mut counts)?,
            Some(copied_at) => nothing_older_is_lost(key, operations, copied_at)?,
        }
    }
    if copied_at.is_none() {
        linearizable(history, dir, name)?;
    }
    Ok(counts)
}

/// The last read shows what was acknowledged before the copy, or something newer.
fn nothing_older_is_lost(key: &str, operations: &[&Operation], copied_at: u64) -> Result<()> {
    let last = operations
        .iter()
        .rfind(|operation| operation.kind == Kind::Read)
        .context("the key was read in the end")?;
    let kept = operations
        .iter()
        .filter(|operation| matches!(operation.kind, Kind::Set | Kind::Create | Kind::Swap))
        .filter(|write| write.outcome == Outcome::Ok && write.end < copied_at)
        .max_by_key(|write| write.version);
    let Some(kept) = kept else { return Ok(()) };
    let deleted = operations.iter().any(|delete| {
        delete.kind == Kind::Delete && delete.outcome != Outcome::Absent && delete.end > kept.call
    });
    ensure!(
        last.version >= kept.version || (last.outcome == Outcome::Absent && deleted),
        "{key} has lost more than what was acknowledged after the copy: {last:?} does not show {kept:?}"
    );
    Ok(())
}

fn one_value_per_version(key: &str, operations: &[&Operation]) -> Result<()> {
    let mut values: HashMap<u64, i64> = HashMap::new();
    for operation in operations {
        if operation.outcome != Outcome::Ok || operation.version == 0 {
            continue;
        }
        let value = match operation.kind {
            Kind::Read | Kind::Plain => operation.found,
            _ => operation.value,
        };
        let known = *values.entry(operation.version).or_insert(value);
        ensure!(
            known == value,
            "version {} of {key} names two values, {known} and {value}",
            operation.version
        );
    }
    Ok(())
}

/// Promise 2: no read is older than what was acknowledged before it began, unless it or the write is labelled.
fn read_your_writes(key: &str, operations: &[&Operation], counts: &mut Counts) -> Result<()> {
    let is_read = |operation: &&&Operation| matches!(operation.kind, Kind::Read | Kind::Plain);
    let writes: Vec<&Operation> = operations
        .iter()
        .copied()
        .filter(|operation| {
            matches!(operation.kind, Kind::Set | Kind::Create | Kind::Swap)
                && operation.outcome == Outcome::Ok
        })
        .collect();
    let deletes: Vec<&Operation> = operations
        .iter()
        .copied()
        .filter(|operation| operation.kind == Kind::Delete)
        .filter(|operation| operation.outcome != Outcome::Absent)
        .collect();
    for read in operations.iter().filter(is_read) {
        let before = writes.iter().filter(|write| write.end < read.call);
        let missed = before.filter(|write| match read.outcome {
            Outcome::Ok => write.version > read.version,
            // Unless a delete can have come after it.
            _ => !deletes.iter().any(|delete| {
                delete.call < read.end
                    && (delete.outcome == Outcome::Unknown || delete.end > write.call)
            }),
        });
        let Some(missed) = missed.max_by_key(|write| write.version) else {
            continue;
        };
        if read.labelled || missed.labelled {
            let age = Duration::from_nanos(read.call - missed.end);
            counts.worst_staleness = counts.worst_staleness.max(age);
            continue;
        }
        bail!(
            "a read of {key} is older than what was acknowledged before it: {read:?} does not show {missed:?}"
        );
    }
    Ok(())
}

fn linearizable(history: &History, dir: &Path, name: &str) -> Result<()> {
    let (path, picture) = (
        dir.join(format!("{name}.jsonl")),
        dir.join(format!("{name}.html")),
    );
    history.save(&path, false)?;
    let checked = Command::new(checker()?)
        .args([&path, &picture])
        .output()
        .context("failed to run the checker")?;
    match checked.status.code() {
        Some(0) => Ok(()),
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

fn checker() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join("birb-nest-porcupine"))
        .find(|file| file.is_file())
        .context(
            "birb-nest-porcupine is missing: `scripts/init.sh --tests` builds it into .dev/bin",
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(kind: Kind, call: u64, end: u64, version: u64) -> Operation {
        Operation {
            client: 0,
            key: "k".to_owned(),
            kind,
            value: version as i64,
            expected: 0,
            call,
            end,
            outcome: if version == 0 {
                Outcome::Absent
            } else {
                Outcome::Ok
            },
            version,
            found: version as i64,
            labelled: false,
        }
    }

    fn check(operations: &[Operation]) -> Result<()> {
        let operations: Vec<&Operation> = operations.iter().collect();
        one_value_per_version("k", &operations)?;
        read_your_writes("k", &operations, &mut Counts::default())
    }

    #[test]
    fn a_read_that_is_behind_is_found() {
        let (old, new) = (operation(Kind::Set, 0, 1, 5), operation(Kind::Set, 2, 3, 6));
        let read = |call, version| operation(Kind::Plain, call, call + 1, version);
        assert!(check(&[old.clone(), new.clone(), read(4, 6)]).is_ok());
        assert!(check(&[old.clone(), new.clone(), read(2, 5)]).is_ok());
        assert!(check(&[old.clone(), new.clone(), read(4, 5)]).is_err());
        assert!(check(&[old.clone(), new.clone(), read(4, 0)]).is_err());
        let mut delete = operation(Kind::Delete, 3, 4, 0);
        delete.outcome = Outcome::Ok;
        assert!(check(&[old.clone(), new.clone(), delete.clone(), read(5, 0)]).is_ok());
        (delete.call, delete.end) = (0, 1);
        assert!(check(&[old.clone(), new.clone(), delete, read(5, 0)]).is_err());
        let mut other = read(4, 6);
        other.found = 7;
        assert!(check(&[new, other]).is_err());
        let mut labelled = read(4, 5);
        labelled.labelled = true;
        assert!(check(&[old, operation(Kind::Set, 2, 3, 6), labelled]).is_ok());
    }
}
