//! What clients asked and what they were answered.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::Serialize;

use crate::calm::nanoseconds;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A write, whatever is there.
    Set,
    /// A write if there is nothing.
    Create,
    /// A write if the version is the expected one.
    Swap,
    /// A delete.
    Delete,
    /// A delete if the version is the expected one.
    Remove,
    /// Another time to live, namely none, for the value that is there: a new version of it.
    Touch,
    /// A read past Redis.
    Read,
    /// A read as most are; judged by promise 2 alone.
    Plain,
    /// Nobody asks for it: a value's time to live is over.
    Expire,
}

impl Kind {
    /// Whether it changes nothing.
    #[must_use]
    pub const fn is_read(self) -> bool {
        matches!(self, Self::Read | Self::Plain)
    }

    /// Whether it gives the key a value.
    #[must_use]
    pub const fn is_write(self) -> bool {
        matches!(self, Self::Set | Self::Create | Self::Swap)
    }

    /// Whether it takes the key's value away.
    #[must_use]
    pub const fn takes_away(self) -> bool {
        matches!(self, Self::Delete | Self::Remove)
    }

    /// Whether the key has a value once it is done, under a version that it names.
    #[must_use]
    pub const fn leaves_value(self) -> bool {
        self.is_write() || matches!(self, Self::Touch)
    }

    /// Whether it names a version that the key has to have.
    #[must_use]
    pub const fn expects(self) -> bool {
        matches!(self, Self::Swap | Self::Remove)
    }

    /// Whether it happens only if the key is as the client thinks.
    #[must_use]
    pub const fn is_conditional(self) -> bool {
        matches!(self, Self::Create | Self::Swap | Self::Remove)
    }

    /// Whether it looks first at what is there, and begins anew if that has changed.
    #[must_use]
    pub const fn begins_anew(self) -> bool {
        self.is_conditional() || matches!(self, Self::Touch)
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Done, or found.
    Ok,
    /// The condition did not hold.
    Mismatch,
    /// There is no value.
    Absent,
    /// Perhaps it happened, perhaps it will.
    Unknown,
}

/// What an answer says of itself: `Birb-Cache`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Label {
    /// A write, or a read past Redis, of which Redis does not know: reads may return what was there before.
    Pending,
    /// A read that only one of log and PostgreSQL could be asked for.
    Unconfirmed,
}

/// One operation. Times are nanoseconds since the run began.
#[derive(Debug, Clone, Serialize)]
pub struct Operation {
    /// Who asked.
    pub client: usize,
    /// Which API.
    pub api: usize,
    /// Of which key.
    pub key: String,
    /// What.
    pub kind: Kind,
    /// The value to be written; each is written once in a run.
    pub value: i64,
    /// How many seconds it is to live; 0 for ever.
    pub ttl: u64,
    /// The version that has to be there.
    pub expected: u64,
    /// When it was asked.
    pub call: u64,
    /// When it was answered.
    #[serde(rename = "return")]
    pub end: u64,
    /// How it ended.
    pub outcome: Outcome,
    /// The version that was written, or is there; 0 for none.
    pub version: u64,
    /// The value that was read, or touched.
    pub found: i64,
    /// The answer said that it, or what is read next, may be behind.
    pub label: Option<Label>,
    /// It was asked together with others.
    pub is_batched: bool,
}

/// A request that was refused, or had no answer, and certainly changed nothing.
#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    /// Who asked.
    pub client: usize,
    /// Which API.
    pub api: usize,
    /// Of which key.
    pub key: String,
    /// What.
    pub kind: Kind,
    /// When it was asked.
    pub call: u64,
    /// When it had failed.
    pub end: u64,
    /// What there was instead of an answer.
    pub why: String,
}

/// How wrong the idea of now of two processes together may be: each learns it from answers that take their time.
pub const CLOCKS: Duration = Duration::from_millis(500);

impl Operation {
    /// The version and the value that a read shows.
    #[must_use]
    pub fn shown(&self) -> Option<(u64, i64)> {
        let is_there = self.kind.is_read() && self.outcome == Outcome::Ok;
        is_there.then_some((self.version, self.found))
    }

    /// The end of what it wrote, if it wrote something that ends.
    #[must_use]
    pub fn expiry(&self) -> Option<Self> {
        let may_be = matches!(self.outcome, Outcome::Ok | Outcome::Unknown);
        if self.ttl == 0 || !self.kind.is_write() || !may_be {
            return None;
        }
        let ttl = Duration::from_secs(self.ttl);
        Some(Self {
            kind: Kind::Expire,
            call: self.call + nanoseconds(ttl - CLOCKS),
            // Who has no answer does not know when its time to live began.
            end: self.end + nanoseconds(ttl + CLOCKS),
            version: 0,
            label: None,
            ..self.clone()
        })
    }
}

/// Writes operations to a file, a line each.
///
/// # Errors
/// The file cannot be written.
pub fn save<'a>(operations: impl IntoIterator<Item = &'a Operation>, path: &Path) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for operation in operations {
        serde_json::to_writer(&mut file, operation)?;
        file.write_all(b"\n")?;
    }
    Ok(file.flush()?)
}

/// From when the log was copied until it was put back to that copy: what it acknowledged meanwhile may be lost.
#[derive(Debug, Clone, Copy)]
pub struct Lost {
    /// The copy has all that was acknowledged before.
    pub from: u64,
    /// What is asked from here on is asked of the copy.
    pub to: u64,
}

impl Lost {
    /// Whether what it did must stay.
    #[must_use]
    pub const fn spares(&self, operation: &Operation) -> bool {
        operation.end < self.from || operation.call >= self.to
    }
}

/// What must have happened: of what fell into `lost`, changes are open, and reads prove nothing. A write that left no trace
/// need not have happened to explain anything, so it is left out: each that is open doubles what has to be looked at.
#[must_use]
pub fn certain(lost: Option<Lost>, operations: &[Operation]) -> Vec<Operation> {
    let is_spared = |operation: &Operation| lost.is_none_or(|lost| lost.spares(operation));
    let mut traces: HashSet<u64> = operations
        .iter()
        // A delete has no version: whether this one left anything cannot be told.
        .filter(|it| is_spared(it) || it.kind == Kind::Remove)
        .flat_map(|it| [it.version, it.expected])
        .collect();
    // Under a version that nobody was told a value may be there by a touch.
    let found: HashSet<i64> = operations
        .iter()
        .filter(|it| it.kind == Kind::Touch || (it.kind.is_read() && is_spared(it)))
        .map(|it| it.found)
        .collect();
    // What left one may have needed what it replaced.
    let mut swaps: Vec<&Operation> = operations
        .iter()
        .filter(|it| it.kind == Kind::Swap)
        .collect();
    swaps.sort_by_key(|it| std::cmp::Reverse(it.version));
    for swap in swaps {
        if traces.contains(&swap.version) || found.contains(&swap.value) {
            traces.insert(swap.expected);
        }
    }
    let certain = |operation: &Operation| {
        if is_spared(operation) {
            return Some(operation.clone());
        }
        let left_no_trace = operation.kind.leaves_value()
            && operation.outcome == Outcome::Ok
            && !traces.contains(&operation.version)
            && !(operation.kind.is_write() && found.contains(&operation.value));
        (!operation.kind.is_read() && !left_no_trace).then(|| Operation {
            outcome: Outcome::Unknown,
            ..operation.clone()
        })
    };
    operations.iter().filter_map(certain).collect()
}

/// Everything that happened in a round. Cheap to clone.
#[derive(Clone)]
pub struct History {
    began: Instant,
    happened: Arc<Mutex<Happened>>,
}

#[derive(Default)]
struct Happened {
    operations: Vec<Operation>,
    looks: Vec<Operation>,
    failures: Vec<Failure>,
}

impl Default for History {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            happened: Arc::default(),
        }
    }
}

impl History {
    /// The time.
    #[must_use]
    pub fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Writes one down.
    pub fn add(&self, operation: Operation) {
        self.lock().operations.push(operation);
    }

    /// Writes down a read of what an earlier round left behind: whether it was right was judged when it came, not whether its
    /// label has a reason.
    pub fn look(&self, operation: Operation) {
        self.lock().looks.push(operation);
    }

    /// Writes down one that changed nothing.
    pub fn fail(&self, failure: Failure) {
        self.lock().failures.push(failure);
    }

    /// All that happened, or may have.
    #[must_use]
    pub fn operations(&self) -> Vec<Operation> {
        self.lock().operations.clone()
    }

    /// All reads of what earlier rounds left behind.
    #[must_use]
    pub fn looks(&self) -> Vec<Operation> {
        self.lock().looks.clone()
    }

    /// All that certainly did not.
    #[must_use]
    pub fn failures(&self) -> Vec<Failure> {
        self.lock().failures.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Happened> {
        self.happened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
