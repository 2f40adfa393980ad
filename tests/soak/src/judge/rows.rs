//! What is stored, judged by what was acknowledged and seen.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::{
    Counts, nothing_deleted_is_back, nothing_is_read_that_nobody_wrote, one_value_per_version,
    read_your_writes,
};
use crate::{
    calm::Trouble,
    history::{Kind, Lost, Operation, Outcome},
    stores::{Row, Rows},
};

/// What PostgreSQL has once all is stored must be what a read at `now` may show: nothing older than what was acknowledged,
/// nothing that was deleted, nothing that nobody wrote. Labels, which are about Redis and about reads, excuse nothing.
///
/// # Errors
/// A sentence about a row.
pub fn rows_are_what_was_acknowledged(
    operations: &[Operation],
    lost: Option<Lost>,
    trouble: &Trouble,
    (rows, now): (&Rows, u64),
) -> Result<()> {
    let mut by_key: BTreeMap<&str, Vec<Operation>> = BTreeMap::new();
    // What other reads showed is another question.
    for operation in operations.iter().filter(|it| it.kind != Kind::Plain) {
        by_key.entry(&operation.key).or_default().push(Operation {
            label: None,
            ..operation.clone()
        });
    }
    for (key, operations) in by_key {
        let row = rows.get(key);
        let as_read = as_read(key, row, now);
        let mut operations: Vec<&Operation> = operations.iter().collect();
        operations.push(&as_read);
        let counts = &mut Counts::default();
        one_value_per_version(key, &operations)
            .and_then(|()| nothing_is_read_that_nobody_wrote(key, &operations))
            .and_then(|()| read_your_writes(key, &operations, lost, trouble, counts))
            .and_then(|()| nothing_deleted_is_back(key, &operations, lost, trouble, counts))
            .with_context(|| {
                format!("what was acknowledged is not in PostgreSQL: it has {row:?} of {key}")
            })?;
    }
    Ok(())
}

/// A read that shows what the row says.
fn as_read(key: &str, row: Option<&Row>, now: u64) -> Operation {
    let found = row.and_then(Row::found);
    let (version, value) = found.unwrap_or_default();
    Operation {
        client: usize::MAX,
        api: 0,
        key: key.to_owned(),
        kind: Kind::Plain,
        value: 0,
        ttl: 0,
        expected: 0,
        call: now,
        end: now,
        outcome: found.map_or(Outcome::Absent, |_| Outcome::Ok),
        version,
        found: value,
        label: None,
    }
}

/// PostgreSQL has of each key what its last read past Redis showed.
///
/// # Errors
/// A sentence about a row.
pub fn rows_are_what_was_seen(operations: &[Operation], rows: &Rows) -> Result<()> {
    let mut last: BTreeMap<&str, &Operation> = BTreeMap::new();
    for operation in operations.iter().filter(|it| it.kind == Kind::Read) {
        last.insert(&operation.key, operation);
    }
    for (key, last) in last {
        let row = rows.get(key);
        ensure!(
            shows(last, row),
            "what is read is not in PostgreSQL: it has {row:?} of {key}, not {last:?}"
        );
    }
    Ok(())
}

/// Whether it is what the row says. What has a time to live may have expired between the two.
fn shows(read: &Operation, row: Option<&Row>) -> bool {
    match (read.outcome, row) {
        (Outcome::Ok, Some(row)) => {
            !row.is_deleted
                && row.version == read.version
                && row.value.as_ref().and_then(serde_json::Value::as_i64) == Some(read.found)
        }
        (Outcome::Ok, None) => false,
        (_, row) => row.is_none_or(|row| row.is_deleted || row.expires),
    }
}
