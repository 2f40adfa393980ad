//! Writing: lease, publish, tell Redis.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

use birb_nest_core::{Content, Document, Key, Precondition, State, Timestamp, Version, Warning};
use tokio::time::timeout;

use super::{Inner, Lookup, Nest, NestError, ask::AT_ONCE};
use crate::{
    jetstream::{PublishError, Record},
    metrics::METRICS,
    redis::Token,
    sabotage::{Mistake, is_or_was},
    trace::TraceParent,
};

static FULL: LazyLock<Warning> = LazyLock::new(Warning::default);

/// What a client wants to store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEntry {
    /// The value and what belongs to it.
    pub content: Content,
    /// How long it lives from now on; `None` until it is deleted.
    pub ttl: Option<Duration>,
}

/// Whether Redis knows of an acknowledged write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Redis holds nothing older.
    Yes,
    /// Redis could not be told: until it is repaired, reads may still return what was there before.
    Pending,
}

impl Told {
    /// Whether Redis knows of this write and the other.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        if self == Self::Yes { other } else { self }
    }
}

/// An acknowledged write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// As reads will return it.
    pub document: Document,
    /// Whether Redis knows.
    pub told: Told,
}

/// What a write does to its key.
pub(super) enum Change {
    /// This value takes the place of whatever is there.
    Set(Record),
    /// This tombstone takes the place of a value.
    Delete(Record),
    /// The value that is there lives until then.
    Touch {
        written_at: Timestamp,
        expires_at: Option<Timestamp>,
    },
}

/// A write that the log has acknowledged and Redis does not know of yet.
pub(super) struct Published {
    /// The lease that was taken for it.
    pub token: Token,
    pub version: Version,
    pub record: Record,
}

/// How a delete ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// The key has no value from this version on.
    Deleted(Version, Told),
    /// It had none.
    Absent,
}

impl Nest {
    /// Creates or replaces the value of `key` if `condition` holds. When this returns, the write is on the log's disk.
    /// `trace` travels with it.
    ///
    /// # Errors
    /// [`NestError`] tells what is certainly not written from what may be.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the outcome unknown; Redis is told later, by the worker that stores the write.
    pub async fn put(
        &self,
        key: &Key,
        new: NewEntry,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Written, NestError> {
        let change = Change::Set(Record::Change {
            written_at: self.0.clock.now(),
            expires_at: new.ttl.map(|ttl| self.0.clock.now().after(ttl)),
            state: State::Present(new.content),
        });
        let written = self.write(key, &change, condition, trace).await?;
        Ok(written.expect("a value is written wherever the condition holds"))
    }

    /// Takes the value of `key` away if `condition` holds. Writes nothing when the key is known to have none.
    ///
    /// # Errors
    /// As [`Nest::put`].
    ///
    /// # Cancel safety
    /// As [`Nest::put`].
    pub async fn delete(
        &self,
        key: &Key,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Deletion, NestError> {
        if condition.is_none() && self.are_absent(std::slice::from_ref(key)).await == [true] {
            return Ok(Deletion::Absent);
        }
        self.take_away(key, condition, trace).await
    }

    /// Which of `keys` certainly have no value, in their order. Redis is believed if it has one, and not if it has none: it
    /// may not know yet of a write that was answered as pending, and to say "not found" then would leave that standing.
    pub(super) async fn are_absent(&self, keys: &[Key]) -> Vec<bool> {
        let nest = &*self.0;
        let stored = match nest.cache.get_heads(keys).await {
            Ok(stored) => stored,
            Err(_) => vec![None; keys.len()],
        };
        let is_open: Vec<bool> = stored
            .into_iter()
            .map(|stored| {
                let hit = stored.and_then(|stored| nest.judge_hit(stored));
                !matches!(hit, Some(Lookup::Found { .. }))
            })
            .collect();
        let open: Vec<Key> = keys
            .iter()
            .zip(&is_open)
            .filter(|(_, is_open)| **is_open)
            .map(|(key, _)| key.clone())
            .collect();
        let mut absent = Vec::with_capacity(open.len());
        // Their answers have the values, too: not those of all keys at once.
        for few in open.chunks(AT_ONCE) {
            let answers = nest.ask_many(few).await.into_iter();
            absent.extend(answers.map(|answer| match answer {
                Ok(answer) if !answer.unconfirmed => {
                    matches!(nest.judge_answer(answer), Ok(Lookup::Absent))
                }
                _ => false,
            }));
        }
        let mut absent = absent.into_iter();
        is_open
            .into_iter()
            .map(|is_open| is_open && absent.next().expect("each open key was asked for"))
            .collect()
    }

    /// As [`Nest::delete`] for a key that has a value or of which nothing can be known now: a tombstone is right either
    /// way.
    pub(super) async fn take_away(
        &self,
        key: &Key,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Deletion, NestError> {
        let change = Change::Delete(self.tombstone());
        let written = self.write(key, &change, condition, trace).await?;
        Ok(written.map_or(Deletion::Absent, |written| {
            Deletion::Deleted(written.document.version, written.told)
        }))
    }

    /// Gives the value of `key` another time to live from now on, without end if there is none, if `condition` holds:
    /// a new version with the same content. `None` when the key has no value.
    ///
    /// # Errors
    /// As [`Nest::put`].
    ///
    /// # Cancel safety
    /// As [`Nest::put`].
    pub async fn touch(
        &self,
        key: &Key,
        ttl: Option<Duration>,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Option<Written>, NestError> {
        let now = self.0.clock.now();
        let change = Change::Touch {
            written_at: now,
            expires_at: ttl.map(|ttl| now.after(ttl)),
        };
        self.write(key, &change, condition, trace).await
    }

    async fn write(
        &self,
        key: &Key,
        change: &Change,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Option<Written>, NestError> {
        let published = match change.blindly() {
            Some(record) if condition.is_none() => {
                self.publish(key, record.clone(), trace).await.map(Some)
            }
            _ => self.publish_if(key, change, condition, trace).await,
        };
        let Some(published) = published? else {
            return Ok(None);
        };
        Ok(Some(self.end(key, published, change.name()).await))
    }

    /// What takes a value away.
    pub(super) fn tombstone(&self) -> Record {
        Record::Change {
            written_at: self.0.clock.now(),
            expires_at: None,
            state: State::Deleted,
        }
    }

    /// The end of a write of `key` that is in the log: Redis is told, now or later. `name` is the one of the metric.
    pub(super) async fn end(&self, key: &Key, published: Published, name: &'static str) -> Written {
        let Published {
            token,
            version,
            record,
        } = published;
        // Should this future be dropped from here on, Redis is told all the same.
        let owed = Owed {
            nest: self,
            told: Some((key.clone(), version)),
        };
        let entry = record.into_entry(version).expect("a change is an entry");
        let document = Document::render(key, &entry);
        let told = self.tell(key, &token, &document).await;
        owed.done();
        METRICS.wrote(
            name,
            match told {
                Told::Yes => "installed",
                Told::Pending => "pending",
            },
        );
        Written { document, told }
    }

    async fn publish(
        &self,
        key: &Key,
        record: Record,
        trace: Option<&TraceParent>,
    ) -> Result<Published, NestError> {
        let nest = &*self.0;
        let session = nest
            .log
            .session()
            .ok_or_else(|| NestError::Unavailable("the log is not connected".to_owned()))?;
        let token = nest.lease_for_write(key).await;
        let version = session
            .publish(nest.shard_of(key), key, &record, None, trace)
            .await
            .map_err(not_acknowledged)?;
        Ok(Published {
            token,
            version,
            record,
        })
    }

    /// Makes sure that Redis holds nothing older than `document`, within one deadline, or has that repaired later.
    async fn tell(&self, key: &Key, token: &Token, document: &Document) -> Told {
        let cache = &self.0.cache;
        let telling = async {
            // Half of the time is for the second attempt: to delete what is older is enough, and takes less.
            let installing = cache.install(key, token, document, self.0.clock.now());
            if let Ok(Ok(())) = timeout(cache.timeout() / 2, installing).await {
                return true;
            }
            let versions = [(key.clone(), document.version)];
            cache.forget(&versions).await.is_ok()
        };
        let is_told = timeout(cache.timeout(), telling).await == Ok(true);
        if !is_told {
            cache.repair_later(key.clone(), document.version);
        }
        if is_or_was(Mistake::EverPending, !is_told) {
            Told::Pending
        } else {
            Told::Yes
        }
    }
}

impl Change {
    /// What is written over `current`, the value that the key has; `None` when there is nothing to write.
    pub(super) fn to(&self, current: Option<&Document>) -> Option<Record> {
        match self {
            Self::Set(record) => Some(record.clone()),
            Self::Delete(record) => current.map(|_| record.clone()),
            Self::Touch {
                written_at,
                expires_at,
            } => current.map(|document| Record::Change {
                written_at: *written_at,
                expires_at: *expires_at,
                state: State::Present(document.content().expect("this process rendered it")),
            }),
        }
    }

    /// What is written if it does not matter what is there.
    const fn blindly(&self) -> Option<&Record> {
        match self {
            Self::Set(record) | Self::Delete(record) => Some(record),
            Self::Touch { .. } => None,
        }
    }

    /// Its name in metrics.
    const fn name(&self) -> &'static str {
        match self {
            Self::Set(_) => "set",
            Self::Delete(_) => "delete",
            Self::Touch { .. } => "touch",
        }
    }
}

impl Inner {
    /// Takes the lease for a write that is published next. Without one the new value is not kept when Redis has nothing
    /// of the key; nothing else depends on it. A lease that was not confirmed may still come, after newer writes: the
    /// token that is returned stands nowhere then.
    pub(super) async fn lease_for_write(&self, key: &Key) -> Token {
        let token = Token::random();
        match self.cache.lease_for_write(key, &token).await {
            Ok(()) => token,
            Err(_) => Token::random(),
        }
    }
}

/// Counts a write that was refused, or whose outcome is unknown.
pub(super) fn not_acknowledged(error: PublishError) -> NestError {
    METRICS.error(match error {
        PublishError::NotWritten(_) => "log_publish",
        PublishError::Moved => "log_moved",
        PublishError::Full(_) => "log_full",
        PublishError::Unknown(_) => "log_unknown",
    });
    tracing::debug!(%error, "write was not acknowledged");
    if let PublishError::Full(shard) = error
        && let Some(n_refused) = FULL.note(Instant::now())
    {
        tracing::warn!(%shard, n_refused, "refusing writes: the log of a shard is full");
    }
    match error {
        PublishError::NotWritten(_) | PublishError::Moved => {
            NestError::Unavailable(error.to_string())
        }
        PublishError::Full(_) => NestError::Full,
        PublishError::Unknown(_) => NestError::UnknownOutcome(error.to_string()),
    }
}

/// An acknowledged write that Redis has not been told of. Dropped before [`Owed::done`], it is repaired later.
struct Owed<'a> {
    nest: &'a Nest,
    told: Option<(Key, Version)>,
}

impl Owed<'_> {
    fn done(mut self) {
        self.told = None;
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if let Some((key, version)) = self.told.take() {
            self.nest.0.cache.repair_later(key, version);
        }
    }
}
