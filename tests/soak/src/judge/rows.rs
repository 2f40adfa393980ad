//! What is stored, judged by what was acknowledged and seen.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, ensure};

use super::{
    Counts, nothing_deleted_is_back, nothing_is_read_that_nobody_wrote, one_value_per_version,
    read_your_writes,
};
use crate::{
    calm::Trouble,
    history::{CLOCKS, Kind, Lost, Operation, Outcome},
    stores::{Row, Rows},
};

/// In milliseconds.
const LATE: i64 = CLOCKS.as_millis() as i64;

/// What PostgreSQL has once all is stored must be what a read at `now` may show: nothing older than what was acknowledged,
/// nothing that was deleted, nothing that nobody wrote. Labels, which are about Redis and about reads, excuse nothing; nor does
/// that a value has expired: its row stays for longer than a round, and has to be the right one and end when it was to end.
///
/// # Errors
/// A sentence about a row.
pub fn rows_are_what_was_acknowledged(
    operations: &[Operation],
    lost: Option<Lost>,
    trouble: &Trouble,
    (rows, now): (&Rows, u64),
) -> Result<()> {
    let expiring = |it: &&Operation| it.kind.is_write() && it.ttl > 0;
    let values: HashSet<i64> = operations
        .iter()
        .filter(expiring)
        .map(|it| it.value)
        .collect();
    let keys: HashSet<&str> = operations
        .iter()
        .filter(expiring)
        .map(|it| it.key.as_str())
        .collect();
    // What other reads showed is another question, and that something had expired is no news here.
    let counts = |it: &&Operation| {
        let found_nothing = it.kind == Kind::Read && it.outcome == Outcome::Absent;
        it.kind != Kind::Plain && !(found_nothing && keys.contains(it.key.as_str()))
    };
    let mut by_key: BTreeMap<&str, Vec<Operation>> = BTreeMap::new();
    for operation in operations.iter().filter(counts) {
        by_key.entry(&operation.key).or_default().push(Operation {
            label: None,
            ttl: 0,
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
            .and_then(|()| ends_if_it_was_to(row, &values))
            .with_context(|| {
                format!("what was acknowledged is not in PostgreSQL: it has {row:?} of {key}")
            })?;
    }
    Ok(())
}

/// A value has a time to live in its row if it was written with one.
fn ends_if_it_was_to(row: Option<&Row>, expiring: &HashSet<i64>) -> Result<()> {
    if let Some(row) = row
        && let Some((_, value)) = row.stored()
    {
        let must = expiring.contains(&value);
        ensure!(
            row.left.is_some() == must,
            "it has another time to live than it was written with"
        );
    }
    Ok(())
}

/// A read that shows what the row says, as if nothing ever expired.
fn as_read(key: &str, row: Option<&Row>, now: u64) -> Operation {
    let found = row.and_then(Row::stored);
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
        is_batched: false,
    }
}

/// PostgreSQL had of each key what its last read past Redis, made afterwards, showed.
///
/// # Errors
/// A sentence about a row.
pub fn rows_are_what_was_seen(operations: &[Operation], rows: &Rows) -> Result<()> {
    let mut last: BTreeMap<&str, &Operation> = BTreeMap::new();
    for operation in operations.iter().filter(|it| it.kind == Kind::Read) {
        last.insert(&operation.key, operation);
    }
    let ends = operations.iter().filter_map(Operation::expiry);
    let ends: HashMap<i64, Operation> = ends.map(|end| (end.value, end)).collect();
    for (key, last) in last {
        let row = rows.get(key);
        let end = row.and_then(Row::stored).and_then(|(_, it)| ends.get(&it));
        ensure!(
            shows(last, row, end),
            "what is read is not in PostgreSQL: it has {row:?} of {key}, not {last:?}"
        );
    }
    Ok(())
}

/// Whether it is what the row says, whose value has this `end`, if it has one. It may have come between the two.
fn shows(read: &Operation, row: Option<&Row>, end: Option<&Operation>) -> bool {
    let Some(row) = row else {
        return read.outcome != Outcome::Ok;
    };
    if read.outcome == Outcome::Ok {
        // Processes and PostgreSQL need not have quite the same idea of now.
        let is_long_over = row.left.is_some_and(|left| left < -LATE);
        row.stored() == read.shown() && !is_long_over
    } else {
        row.is_deleted || row.is_expired() || end.is_some_and(|end| end.call <= read.end)
    }
}
