//! Asking past Redis: the log, then PostgreSQL, for one key or for many at once.

use std::sync::Arc;

use birb_nest_core::{Base, Document, Entry, Key, Shard, Version};
use futures::{StreamExt, stream};

use super::{Inner, NestError, Source};
use crate::{
    jetstream::{Pending, Place, Session},
    metrics::METRICS,
    postgres::{LookupError, Row},
    sabotage::{self, Mistake, makes},
};

/// Keys of one call that the log is asked for at the same time.
pub(super) const AT_ONCE: usize = 32;
/// How often a lookup starts over because a shard began another life meanwhile.
const ATTEMPTS: usize = 3;

/// An end of a lookup, and what Redis may learn from it.
pub(super) struct Answer {
    /// Rendered, tombstones and expired entries included; `None` when there never was a value.
    pub document: Option<Document>,
    pub source: Source,
    pub unconfirmed: bool,
    /// Whatever else is known of the key under a lesser version is outdated.
    pub outdates: Version,
}

/// What the log itself said of a key: a session that did not answer is as good as none.
pub(super) struct Logged {
    pub session: Arc<Session>,
    pending: Pending,
    /// Where the key stands, under the base by which it was asked for.
    pub place: Place,
}

impl Inner {
    /// What log and PostgreSQL have of `key`.
    pub(super) async fn ask(&self, key: &Key) -> Result<Answer, NestError> {
        let shard = self.shard_of(key);
        for _ in 0..ATTEMPTS {
            let early = if makes(Mistake::PostgresBeforeLog) {
                let row = self.database.lookup(key, shard).await;
                tokio::time::sleep(sabotage::DAWDLE).await;
                row.ok()
            } else {
                None
            };
            let logged = self.ask_log(key, shard).await;
            if let Some(answer) = logged
                .as_ref()
                .and_then(|logged| logged.suffices(key, shard))
            {
                return Ok(answer);
            }
            let row = match early {
                Some(row) => Ok(row),
                None => self.database.lookup(key, shard).await,
            };
            let row = match row {
                Ok(row) => row,
                Err(error) => return self.without_row(key, logged, &error),
            };
            match conclude(key, shard, logged, row).await {
                Some(concluded) => return concluded,
                None => self.refresh(shard).await,
            }
        }
        Err(NestError::Unavailable(format!(
            "the log of shard {shard} is being replaced"
        )))
    }

    /// As [`Inner::ask`] for each of `keys`, in their order, with one question to PostgreSQL for all that it must be
    /// asked for.
    pub(super) async fn ask_many(&self, keys: &[Key]) -> Vec<Result<Answer, NestError>> {
        let logged: Vec<Option<Logged>> = stream::iter(keys.to_vec())
            .map(|key| async move { self.ask_log(&key, self.shard_of(&key)).await })
            .buffered(AT_ONCE)
            .collect()
            .await;
        let (mut answers, mut open) = (Vec::with_capacity(keys.len()), Vec::new());
        for (place, (key, logged)) in keys.iter().zip(logged).enumerate() {
            let shard = self.shard_of(key);
            let sufficient = logged
                .as_ref()
                .and_then(|logged| logged.suffices(key, shard));
            if sufficient.is_none() {
                open.push((place, logged));
            }
            answers.push(sufficient.map(Ok));
        }
        let places: Vec<(Key, Shard)> = open
            .iter()
            .map(|(place, _)| (keys[*place].clone(), self.shard_of(&keys[*place])))
            .collect();
        match self.database.lookup_many(&places).await {
            Ok(rows) => {
                for ((place, logged), row) in open.into_iter().zip(rows) {
                    let (key, shard) = (&keys[place], self.shard_of(&keys[place]));
                    answers[place] = Some(match conclude(key, shard, logged, row).await {
                        Some(concluded) => concluded,
                        // Its shard begins another life: not for many at once.
                        None => self.ask(key).await,
                    });
                }
            }
            Err(error) => {
                for (place, logged) in open {
                    answers[place] = Some(self.without_row(&keys[place], logged, &error));
                }
            }
        }
        answers
            .into_iter()
            .map(|answer| answer.expect("the log sufficed, or the key is open"))
            .collect()
    }

    pub(super) async fn ask_log(&self, key: &Key, shard: Shard) -> Option<Logged> {
        let session = self.log.session()?;
        match session.last(shard, key).await {
            Ok((pending, place)) => Some(Logged {
                session,
                pending,
                place,
            }),
            Err(error) => {
                METRICS.error("log_read");
                tracing::debug!(%error, "log was not read");
                None
            }
        }
    }

    async fn refresh(&self, shard: Shard) {
        if let Some(session) = self.log.session() {
            session.refresh(shard).await;
        }
    }

    /// The log's word alone, since PostgreSQL, which might know better, does not answer.
    fn without_row(
        &self,
        key: &Key,
        logged: Option<Logged>,
        error: &LookupError,
    ) -> Result<Answer, NestError> {
        match logged.map(|logged| logged.pending) {
            Some(Pending::Entry(entry)) => Ok(Answer {
                unconfirmed: true,
                ..Answer::from_log(key, &entry)
            }),
            Some(Pending::Held(_, why)) => Err(held(&why)),
            Some(Pending::Nothing) | None => {
                self.wanted.note(std::slice::from_ref(key));
                Err(NestError::Unavailable(error.to_string()))
            }
        }
    }
}

impl Answer {
    fn from_log(key: &Key, entry: &Entry) -> Self {
        Self {
            document: Some(Document::render(key, entry)),
            source: Source::Log,
            unconfirmed: false,
            outdates: entry.version,
        }
    }

    fn from_row(key: &Key, row: &Row) -> Self {
        // Without a row, there was nothing up to where the shard is stored, or it is gone.
        let nothing = Version::new(row.applied_to.get() + 1).unwrap_or(Version::MAX);
        Self {
            document: row.entry.as_ref().map(|entry| Document::render(key, entry)),
            source: Source::Postgres,
            unconfirmed: false,
            outdates: row.entry.as_ref().map_or(nothing, |entry| entry.version),
        }
    }
}

impl Logged {
    /// The answer, if PostgreSQL cannot have anything newer.
    pub(super) fn suffices(&self, key: &Key, shard: Shard) -> Option<Answer> {
        match &self.pending {
            Pending::Entry(entry) if !self.may_be_behind(shard, entry.version) => {
                Some(Answer::from_log(key, entry))
            }
            _ => None,
        }
    }

    /// Whether the log may have an older version of a key than PostgreSQL: it lost its tail, or may have.
    fn may_be_behind(&self, shard: Shard, version: Version) -> bool {
        self.session.is_fenced(shard) || self.session.is_doubtful(shard, version)
    }

    /// Whether what was asked for in the log and what the row says belong together.
    pub(super) async fn is_of_one_life_with(&self, row: &Row, shard: Shard) -> bool {
        self.session.note_stored(shard, row.applied_to);
        self.place.base == row.base || self.is_drained(shard, row.base).await
    }

    /// The version of the newest change that is still in the log; 0 if there is none.
    pub(super) const fn version(&self) -> Version {
        match &self.pending {
            Pending::Entry(entry) => entry.version,
            Pending::Held(version, _) => *version,
            Pending::Nothing => Version::ZERO,
        }
    }

    /// Whether the life that was asked is over for good, as PostgreSQL knows of a later one: its log was fenced, and is
    /// stored to its end, before that is recorded. A fence that came late, over a log that is in its later life already,
    /// looks the same but for what the log holds.
    async fn is_drained(&self, shard: Shard, recorded: Base) -> bool {
        recorded > self.place.base
            // Seen closed after PostgreSQL was asked: the later life has no writes that were acknowledged before that.
            && self.session.refresh(shard).await
            && self.session.base(shard) == self.place.base
            && self.session.is_fenced(shard)
            && matches!(
                self.session.has_messages_of(shard, recorded).await,
                Ok(false)
            )
    }
}

/// What log and row say together. `None` when the shard lives under another base than the one under which the log was
/// asked: pending messages may have been looked for where none can be any more.
pub(super) async fn conclude(
    key: &Key,
    shard: Shard,
    logged: Option<Logged>,
    row: Row,
) -> Option<Result<Answer, NestError>> {
    let Some(logged) = logged else {
        return Some(unconfirmed(key, &row));
    };
    if !logged.is_of_one_life_with(&row, shard).await {
        return None;
    }
    Some(newest(key, logged, &row).await)
}

/// PostgreSQL's word alone.
fn unconfirmed(key: &Key, row: &Row) -> Result<Answer, NestError> {
    if row.dead.is_some() {
        return Err(NestError::Unavailable(
            "the log is down, and it holds a newer write of this key".to_owned(),
        ));
    }
    Ok(Answer {
        unconfirmed: true,
        ..Answer::from_row(key, row)
    })
}

/// The newest of what the log and PostgreSQL have; a write that PostgreSQL refused is as valid as any.
async fn newest(key: &Key, logged: Logged, row: &Row) -> Result<Answer, NestError> {
    let stored = row
        .entry
        .as_ref()
        .map_or(Version::ZERO, |entry| entry.version);
    let known = row.dead.map_or(stored, |dead| dead.version.max(stored));
    match logged.pending {
        // Stored, and gone since: it was deleted or has expired, and the janitor came by. What is in the log again of such a
        // key, since its server was killed, is nothing.
        Pending::Entry(entry)
            if known == Version::ZERO
                && entry.version <= row.applied_to
                && logged.place.base == row.base => {}
        Pending::Entry(entry) if entry.version > known => return Ok(Answer::from_log(key, &entry)),
        Pending::Held(version, why) if version > known => return Err(held(&why)),
        _ => {}
    }
    let Some(dead) = row.dead else {
        return Ok(Answer::from_row(key, row));
    };
    let sequence = dead.sequence;
    match logged.session.dead_letter(sequence).await {
        Ok(Some(entry)) if entry.version == dead.version => Ok(Answer::from_log(key, &entry)),
        Ok(_) => Err(NestError::Gone(format!(
            "dead letter {sequence} is gone from its stream"
        ))),
        Err(error) => Err(NestError::Unavailable(format!(
            "dead letter {sequence} could not be read: {error}"
        ))),
    }
}

/// What is known may be older than what was acknowledged.
pub(super) fn unsure() -> NestError {
    NestError::Unavailable("a server is down that may hold a newer write of this key".to_owned())
}

/// Whatever else is known of the key is older than what cannot be read.
fn held(why: &str) -> NestError {
    METRICS.error("log_held");
    NestError::Unavailable(format!("the log holds the newest write of this key: {why}"))
}
