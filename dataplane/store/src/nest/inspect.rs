//! What each store has of a key, for people who look for a mistake. Changes nothing: no lease, no fill, no metric of reads.

use birb_nest_core::{Base, Entry, Key, Shard};

use super::Nest;
use crate::{jetstream::Pending, postgres::Row, redis::Stored};

/// What each store has of a key, or why it could not be asked. Not one moment.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// The key's shard.
    pub shard: Shard,
    /// What Redis has; `None` for nothing.
    pub redis: Result<Option<Stored>, String>,
    /// What the log has.
    pub log: Result<Logged, String>,
    /// What PostgreSQL has.
    pub postgres: Result<Row, String>,
}

/// What the log has of a key.
#[derive(Debug, Clone)]
pub struct Logged {
    /// The subject of its messages.
    pub subject: String,
    /// The base of the life that was asked.
    pub base: Base,
    /// The sequence of its message, a pin included; 0 if there is none.
    pub sequence: u64,
    /// Whether the shard takes no writes at present.
    pub is_fenced: bool,
    /// Its message.
    pub message: Message,
}

/// A message of the log.
#[derive(Debug, Clone)]
pub enum Message {
    /// None of the key.
    Nothing,
    /// One that only holds the key's place.
    Pin,
    /// A write.
    Entry(Entry),
    /// One that this release cannot read, and why.
    Held(String),
}

impl Nest {
    /// Looks `key` up in each store.
    pub async fn inspect(&self, key: &Key) -> Inspection {
        let shard = self.0.shard_of(key);
        let (redis, log, postgres) = tokio::join!(
            self.0.cache.get(key),
            self.inspect_log(key, shard),
            self.0.database.lookup(key, shard),
        );
        Inspection {
            shard,
            redis: redis.map_err(|error| error.to_string()),
            log,
            postgres: postgres.map_err(|error| error.to_string()),
        }
    }

    async fn inspect_log(&self, key: &Key, shard: Shard) -> Result<Logged, String> {
        let session = self.0.log.session().ok_or("the log is not connected")?;
        let (pending, place) = session
            .last(shard, key)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Logged {
            subject: session.subject(shard, key),
            base: place.base,
            sequence: place.sequence,
            is_fenced: session.is_fenced(shard),
            message: match pending {
                Pending::Nothing if place.sequence == 0 => Message::Nothing,
                Pending::Nothing => Message::Pin,
                Pending::Entry(entry) => Message::Entry(entry),
                Pending::Held(_, why) => Message::Held(why),
            },
        })
    }
}
