//! The use cases: read, write, delete. The only place that knows in which order the stores are asked.
//!
//! - A **write** takes a lease in Redis, publishes to the log and waits until that is on disk, then tells Redis.
//! - A **read** asks Redis, then the log, then PostgreSQL, and fills Redis with what it found. The log comes before
//!   PostgreSQL because a message leaves the log only after its commit: asked the other way round, a write could move
//!   from one to the other in between and be seen in neither.
//! - A write under a **condition** asks the log, then PostgreSQL, and publishes only if the key has not moved since.

mod ask;
mod condition;
mod debts;
mod durable;
mod flight;
mod inspect;
mod letters;
mod many;
mod prefix;
mod read;
mod rehydrate;
mod wanted;
mod warm;
mod write;

use std::sync::Arc;

use birb_nest_core::{Document, Key, Shard, Version};
use tokio::sync::{Mutex, Semaphore};

use self::{flight::Flights, wanted::Wanted};
use crate::{clock::Clock, jetstream::Log, postgres::Database, redis::Cache};

pub use self::{
    durable::Progress,
    inspect::{Inspection, Logged, Message},
    letters::GivenUp,
    many::Put,
    prefix::{Page, Swept},
    rehydrate::Asked,
    write::{Deletion, NewEntry, Told, Written},
};

/// The stores, and the use cases over them. Cheap to clone.
#[derive(Clone)]
pub struct Nest(Arc<Inner>);

struct Inner {
    log: Log,
    cache: Cache,
    database: Database,
    clock: Arc<Clock>,
    flights: Flights<Result<Lookup, NestError>>,
    /// A permit per lookup past Redis: they go on when those who asked have left.
    lookups: Semaphore,
    lately: Mutex<durable::Lately>,
    wanted: Wanted,
}

/// Lookups past Redis at the same time; what is beyond is refused. As many as requests by default.
const MOST_LOOKUPS: usize = 4096;

/// Where an answer came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A hit.
    Redis,
    /// A write that is still in the log.
    Log,
    /// A row.
    Postgres,
}

/// What a read found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// The key has a value.
    Found {
        /// Rendered; live when the read judged it.
        document: Document,
        /// Who had it.
        source: Source,
        /// One server had to be believed where two should agree: NATS is down, or PostgreSQL is and the log may have lost
        /// its tail. There may be a newer write.
        unconfirmed: bool,
    },
    /// The key has no value: never written, deleted, or expired.
    Absent,
}

/// Why a use case has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NestError {
    /// Nothing happened: the write is certainly not written, the read has nothing it could stand by.
    #[error("{0}")]
    Unavailable(String),
    /// As [`NestError::Unavailable`], but no server is away: the newest write of the key is a dead letter that is gone
    /// from its stream, so it stays like this until the key is written again.
    #[error("{0}")]
    Gone(String),
    /// The log is full: nothing was written, and workers must drain it first.
    #[error("the log is full: workers have to store what is in it first")]
    Full,
    /// The condition does not hold: nothing was written. What the key has for a version, if it has a value.
    #[error("the key's version is not the one that was asked for")]
    Mismatch(Option<Version>),
    /// The write may or may not have happened.
    #[error("{0}")]
    UnknownOutcome(String),
}

impl NestError {
    /// This error of one of several writes, when `n` others have happened: to say that nothing did would be wrong.
    fn partly(self, n: usize) -> Self {
        match self {
            Self::Unavailable(why) if n > 0 => {
                Self::UnknownOutcome(format!("{n} others were done before: {why}"))
            }
            Self::Full if n > 0 => {
                Self::UnknownOutcome(format!("{n} others were done before: {}", Self::Full))
            }
            other => other,
        }
    }

    /// The one of two errors that says less of what has happened.
    fn after(self, earlier: Option<Self>) -> Self {
        match earlier {
            Some(unknown @ Self::UnknownOutcome(_)) => unknown,
            _ => self,
        }
    }
}

impl Nest {
    /// The use cases over these stores.
    #[must_use]
    pub fn new(log: Log, cache: Cache, database: Database, clock: Arc<Clock>) -> Self {
        Self(Arc::new(Inner {
            log,
            cache,
            database,
            clock,
            flights: Flights::default(),
            lookups: Semaphore::new(MOST_LOOKUPS),
            lately: Mutex::default(),
            wanted: Wanted::default(),
        }))
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.0.log
    }

    /// Redis.
    #[must_use]
    pub fn cache(&self) -> &Cache {
        &self.0.cache
    }

    /// PostgreSQL.
    #[must_use]
    pub fn database(&self) -> &Database {
        &self.0.database
    }

    /// Looks after Redis: has it warmed, and pays what it is owed. Every process does. Never ends.
    pub async fn tend_redis(&self) {
        tokio::join!(self.ask_for_rehydration(), self.pay_redis_debts());
    }

    /// Waits until a background task of a store has ended, and names it: a defect, after which this process is of no use.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn failed(&self) -> &'static str {
        tokio::select! {
            name = self.0.log.failed() => name,
            name = self.0.cache.failed() => name,
            name = self.0.database.failed() => name,
        }
    }

    /// The clock that decides what has expired.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.0.clock
    }
}

impl Inner {
    fn shard_of(&self, key: &Key) -> Shard {
        self.log.shards().shard_of(key)
    }
}

impl Source {
    /// Its name in headers and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Log => "log",
            Self::Postgres => "postgres",
        }
    }
}
