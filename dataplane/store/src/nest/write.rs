//! Writing: lease, publish, tell Redis.

use std::time::Duration;

use birb_nest_core::{Content, Document, Key, Precondition, State, Version};
use tokio::time::timeout;

use super::{Inner, Lookup, Nest, NestError};
use crate::{
    jetstream::{PublishError, Record},
    metrics::METRICS,
    redis::Token,
    trace::TraceParent,
};

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

/// An acknowledged write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// As reads will return it.
    pub document: Document,
    /// Whether Redis knows.
    pub told: Told,
}

/// A write that the log has acknowledged and Redis does not know of yet.
pub(super) struct Published {
    /// The lease that was taken for it.
    pub token: Token,
    pub version: Version,
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
        let record = Record::Change {
            written_at: self.0.clock.now(),
            expires_at: new.ttl.map(|ttl| self.0.clock.now().after(ttl)),
            state: State::Present(new.content),
        };
        let written = self.write(key, record, "set", condition, trace).await?;
        Ok(written.expect("only a delete may have nothing to write"))
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
        if condition.is_none() {
            match self.find(key).await {
                Ok(Lookup::Absent) => return Ok(Deletion::Absent),
                // Whether there is a value cannot be known now: a tombstone is right either way.
                Ok(Lookup::Found { .. }) | Err(_) => {}
            }
        }
        let record = Record::Change {
            written_at: self.0.clock.now(),
            expires_at: None,
            state: State::Deleted,
        };
        let written = self.write(key, record, "delete", condition, trace).await?;
        Ok(written.map_or(Deletion::Absent, |written| {
            Deletion::Deleted(written.document.version, written.told)
        }))
    }

    async fn write(
        &self,
        key: &Key,
        record: Record,
        operation: &'static str,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Option<Written>, NestError> {
        let published = if condition.is_none() {
            self.publish(key, &record, trace).await.map(Some)
        } else {
            self.publish_if(key, &record, condition, trace).await
        };
        let Some(Published { token, version }) = published? else {
            return Ok(None);
        };
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
            operation,
            match told {
                Told::Yes => "installed",
                Told::Pending => "pending",
            },
        );
        Ok(Some(Written { document, told }))
    }

    async fn publish(
        &self,
        key: &Key,
        record: &Record,
        trace: Option<&TraceParent>,
    ) -> Result<Published, NestError> {
        let nest = &*self.0;
        let session = nest
            .log
            .session()
            .ok_or_else(|| NestError::Unavailable("the log is not connected".to_owned()))?;
        let token = nest.lease_for_write(key).await;
        let version = session
            .publish(nest.shard_of(key), key, record, None, trace)
            .await
            .map_err(not_acknowledged)?;
        Ok(Published { token, version })
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
        match timeout(cache.timeout(), telling).await {
            Ok(true) => Told::Yes,
            Ok(false) | Err(_) => {
                cache.repair_later(key.clone(), document.version);
                Told::Pending
            }
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
    METRICS.error("log_publish");
    tracing::debug!(%error, "write was not acknowledged");
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
