//! Whether what was seen could have been.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::history::{History, Kind, Lost, Operation, Outcome, certain, save};

/// What the judge counted.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    /// Operations that were answered, or may have happened.
    pub n_operations: usize,
    /// Those whose outcome nobody knows.
    pub n_unknown: usize,
    /// Answers that said they may be behind.
    pub n_labelled: usize,
    /// How old the value of a labelled answer was, at most: since the oldest write that it did not show was acknowledged.
    pub worst_staleness: Duration,
}

impl Counts {
    /// A read does not show what was acknowledged before it: only labelled answers may do that.
    fn behind(&mut self, key: &str, read: &Operation, missed: &Operation) -> Result<()> {
        ensure!(
            read.labelled || missed.labelled,
            "a read of {key} is older than what was acknowledged before it: {read:?} does not show {missed:?}"
        );
        let age = Duration::from_nanos(read.call - missed.end);
        self.worst_staleness = self.worst_staleness.max(age);
        Ok(())
    }
}

/// Judges a round. What was acknowledged while `lost` may be missing, and nothing else: not what came before, and not what the
/// shards' next lives acknowledged.
///
/// # Errors
/// A sentence about the operation that could not have been.
pub fn judge(history: &History, lost: Option<Lost>, dir: &Path, name: &str) -> Result<Counts> {
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
        read_your_writes(key, operations, lost, &mut counts)?;
        nothing_deleted_is_back(key, operations, lost, &mut counts)?;
        let last = operations.last().context("a key has operations")?;
        ensure!(
            !last.labelled,
            "a read of {key} is not sure of itself after all was healed: {last:?}"
        );
    }
    linearizable(&certain(lost, &operations), dir, name)?;
    Ok(counts)
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

/// Promise 2: no read is older than what was acknowledged before it began, unless it or the write is labelled. Judges by
/// writes that `lost` spares.
fn read_your_writes(
    key: &str,
    operations: &[&Operation],
    lost: Option<Lost>,
    counts: &mut Counts,
) -> Result<()> {
    let of = |is: fn(&Operation) -> bool| operations.iter().copied().filter(move |&it| is(it));
    let writes: Vec<&Operation> = of(|it| it.kind.is_write() && it.outcome == Outcome::Ok)
        .filter(|write| lost.is_none_or(|lost| lost.spares(write)))
        .collect();
    let deletes: Vec<&Operation> =
        of(|it| it.kind == Kind::Delete && it.outcome != Outcome::Absent).collect();
    for read in of(|it| it.kind.is_read()) {
        let before = writes.iter().filter(|write| write.end < read.call);
        let missed = before.filter(|write| match read.outcome {
            Outcome::Ok => write.version > read.version,
            // Unless a delete can have come after it.
            _ => !deletes.iter().any(|delete| {
                delete.call < read.end
                    && (delete.outcome == Outcome::Unknown || delete.end > write.call)
            }),
        });
        for missed in missed {
            counts.behind(key, read, missed)?;
        }
    }
    Ok(())
}

/// Promises 2 and 3: what somebody saw before a delete is not read once that was acknowledged. Judges by deletes that `lost`
/// spares.
fn nothing_deleted_is_back(
    key: &str,
    operations: &[&Operation],
    lost: Option<Lost>,
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
        .filter(|it| it.kind == Kind::Delete && it.outcome == Outcome::Ok)
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
            counts.behind(key, read, missed)?;
        }
    }
    Ok(())
}

fn linearizable(operations: &[Operation], dir: &Path, name: &str) -> Result<()> {
    let (path, picture) = (
        dir.join(format!("{name}.jsonl")),
        dir.join(format!("{name}.html")),
    );
    save(operations.iter().filter(|it| it.kind != Kind::Plain), &path)?;
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
        read_your_writes("k", &operations, None, &mut Counts::default())?;
        nothing_deleted_is_back("k", &operations, None, &mut Counts::default())
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

    #[test]
    fn what_was_deleted_and_is_read_again_is_found() {
        let write = operation(Kind::Set, 0, 1, 5);
        let mut delete = operation(Kind::Delete, 2, 3, 0);
        delete.outcome = Outcome::Ok;
        let read = |call| operation(Kind::Plain, call, call + 1, 5);
        assert!(check(&[write.clone(), delete.clone(), read(2)]).is_ok());
        assert!(check(&[write.clone(), delete.clone(), read(4)]).is_err());
        // It may have been deleted before it was written.
        delete.call = 0;
        assert!(check(&[write.clone(), delete.clone(), read(4)]).is_ok());
        // Somebody saw it before the delete, though nobody was told that it is written.
        let mut lost = write;
        lost.outcome = Outcome::Unknown;
        lost.version = 0;
        delete.call = 3;
        delete.end = 4;
        assert!(check(&[lost, read(1), delete, read(5)]).is_err());
    }

    #[test]
    fn only_what_was_kept_must_be_there() {
        let writes = [operation(Kind::Set, 0, 1, 5), operation(Kind::Set, 2, 3, 6)];
        let read = operation(Kind::Read, 8, 9, 5);
        let operations = [&writes[0], &writes[1], &read];
        let judged = |from, to| {
            let lost = Some(Lost { from, to });
            read_your_writes("k", &operations, lost, &mut Counts::default())
        };
        assert!(judged(2, 4).is_ok());
        assert!(judged(4, 5).is_err(), "acknowledged before the copy");
        assert!(judged(1, 2).is_err(), "acknowledged by the next life");
    }

    #[test]
    fn a_label_excuses_nothing_but_its_own_write() {
        let writes = [4, 5, 6].map(|version| operation(Kind::Set, version, version + 1, version));
        let mut labelled = writes.clone();
        labelled[2].labelled = true;
        let read = operation(Kind::Plain, 8, 9, 5);
        assert!(check(&[&labelled[..], &[read]].concat()).is_ok());
        let read = operation(Kind::Plain, 8, 9, 4);
        assert!(check(&[&labelled[..], &[read]].concat()).is_err());
    }

    #[test]
    fn what_may_be_lost_is_open() {
        let operations = [
            operation(Kind::Set, 0, 1, 5),
            operation(Kind::Set, 2, 8, 6),
            operation(Kind::Read, 3, 8, 6),
            operation(Kind::Read, 6, 7, 6),
        ];
        let certain = certain(Some(Lost { from: 5, to: 6 }), &operations);
        let kinds: Vec<_> = certain
            .iter()
            .map(|it| (it.kind, it.outcome, it.version))
            .collect();
        let (ok, open) = (Outcome::Ok, Outcome::Unknown);
        assert_eq!(
            kinds,
            [
                (Kind::Set, ok, 5),
                (Kind::Set, open, 0),
                (Kind::Read, ok, 6)
            ]
        );
    }
}
