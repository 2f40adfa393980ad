//! Reading: Redis, the log, PostgreSQL, in this order.

use birb_nest_core::{Base, Document, Entry, Key, Shard, Version};
use futures::{StreamExt, stream};

use super::{Inner, Lookup, Nest, NestError, Source};
use crate::{
    jetstream::Session,
    metrics::METRICS,
    postgres::Row,
    redis::{Fill, Lease, Stored, Token},
};

/// Keys of one request that are looked up at the same time.
const AT_ONCE: usize = 32;
/// How often a lookup starts over because a shard began another life meanwhile.
const ATTEMPTS: usize = 3;

/// An end of a lookup, and what Redis may learn from it.
struct Answer {
    entry: Option<Entry>,
    source: Source,
    unconfirmed: bool,
}

impl Nest {
    /// The value of `key`, or that it has none. Never older than any write acknowledged before the call, but for what
    /// docs/ARCHITECTURE.md labels.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when no store that must be asked could be.
    pub async fn get(&self, key: &Key) -> Result<Lookup, NestError> {
        let result = self.find(key).await;
        count(&result);
        result
    }

    /// As [`Nest::get`], for uses of our own: not counted as a read.
    pub(super) async fn find(&self, key: &Key) -> Result<Lookup, NestError> {
        let stored = self.0.cache.get(key).await.unwrap_or(None);
        match stored.and_then(|stored| self.0.judge_hit(stored)) {
            Some(hit) => Ok(hit),
            None => self.join_lookup(key).await,
        }
    }

    /// As [`Nest::get`] for each of `keys`, in their order; one that fails does not stop the others.
    pub async fn get_many(&self, keys: &[Key]) -> Vec<Result<Lookup, NestError>> {
        let stored = match self.0.cache.get_many(keys).await {
            Ok(stored) => stored,
            Err(_) => vec![None; keys.len()],
        };
        let results: Vec<_> = stream::iter(keys.iter().cloned().zip(stored))
            .map(|(key, stored)| {
                let nest = self.clone();
                async move {
                    match stored.and_then(|stored| nest.0.judge_hit(stored)) {
                        Some(hit) => Ok(hit),
                        None => nest.join_lookup(&key).await,
                    }
                }
            })
            .buffered(AT_ONCE)
            .collect()
            .await;
        results.iter().for_each(count);
        results
    }

    /// Asks past Redis; shares the answer with other readers of the key.
    async fn join_lookup(&self, key: &Key) -> Result<Lookup, NestError> {
        let (nest, looked_up) = (self.clone(), key.clone());
        let look_up = move || {
            let (nest, key) = (nest.clone(), looked_up.clone());
            async move { nest.0.look_up(&key).await }
        };
        self.0.flights.join(key, look_up).await.unwrap_or_else(|| {
            Err(NestError::Unavailable(
                "the lookup ended without an answer".to_owned(),
            ))
        })
    }
}

impl Inner {
    /// What a value in Redis says; `None` when it says nothing about the key.
    fn judge_hit(&self, stored: Stored) -> Option<Lookup> {
        match stored {
            Stored::Leased => None,
            Stored::Absent => Some(Lookup::Absent),
            Stored::Document(document) => Some(self.judge(document, Source::Redis, false)),
        }
    }

    fn judge(&self, document: Document, source: Source, unconfirmed: bool) -> Lookup {
        if document.body.is_none()
            || birb_nest_core::entry::is_expired(document.expires_at, self.clock.now())
        {
            Lookup::Absent
        } else {
            Lookup::Found {
                document,
                source,
                unconfirmed,
            }
        }
    }

    async fn look_up(&self, key: &Key) -> Result<Lookup, NestError> {
        // The token comes before the log is asked: what Redis learns under it cannot be older than a write that
        // tells Redis meanwhile, since that breaks it. Without the log nothing may be filled.
        let token = Token::random();
        let mut leased = false;
        if self.log.session().is_some() {
            match self.cache.lease_for_read(key, &token).await {
                Ok(Lease::Taken) => leased = true,
                Ok(Lease::Found(stored)) => {
                    if let Some(hit) = self.judge_hit(stored) {
                        return Ok(hit);
                    }
                }
                Err(_) => {}
            }
        }
        let answer = self.ask_log_then_database(key).await?;
        let document = answer.entry.map(|entry| Document::render(key, &entry));
        if leased && !answer.unconfirmed {
            let fill = document.as_ref().map_or(Fill::Absent, Fill::Document);
            // A failure leaves the token, and in a few seconds nothing.
            if let Ok(true) = self.cache.fill(key, &token, fill, self.clock.now()).await {
                METRICS.rehydrated(if document.is_some() {
                    answer.source.as_str()
                } else {
                    "none"
                });
            }
        }
        match document.map(|document| self.judge(document, answer.source, answer.unconfirmed)) {
            Some(found @ Lookup::Found { .. }) => Ok(found),
            Some(Lookup::Absent) | None if answer.unconfirmed => Err(NestError::Unavailable(
                "a server is down that may hold a newer write of this key".to_owned(),
            )),
            Some(Lookup::Absent) | None => Ok(Lookup::Absent),
        }
    }

    async fn ask_log_then_database(&self, key: &Key) -> Result<Answer, NestError> {
        let shard = self.shard_of(key);
        for _ in 0..ATTEMPTS {
            let session = self.log.session();
            let answered = match &session {
                None => None,
                Some(session) => session.last(shard, key).await.map_or_else(
                    |error| {
                        METRICS.error("log_read");
                        tracing::debug!(%error, "log was not read");
                        None
                    },
                    Some,
                ),
            };
            // Only what the log said itself counts: a session that did not answer is as good as none.
            let log = session
                .zip(answered)
                .map(|(session, (pending, asked))| (session, pending, asked));
            if let Some((session, Some(entry), _)) = &log
                && !may_be_behind(session, shard, entry.version)
            {
                return Ok(Answer::from_log(entry.clone()));
            }
            let row = match self.database.lookup(key, shard).await {
                Ok(row) => row,
                Err(error) => {
                    return match log {
                        // Perhaps PostgreSQL would know better.
                        Some((_, Some(entry), _)) => Ok(Answer {
                            unconfirmed: true,
                            ..Answer::from_log(entry)
                        }),
                        _ => {
                            self.missed.note(key);
                            Err(NestError::Unavailable(error.to_string()))
                        }
                    };
                }
            };
            let Some((session, pending, asked)) = log else {
                return unconfirmed(row);
            };
            session.settle(shard, row.applied_to);
            if asked == row.base || drained(&session, shard, asked, row.base) {
                return newest(&session, pending, row).await;
            }
            // The shard lives under another base than the one this lookup asked the log under: it may have looked for
            // pending messages where none can be any more.
            session.refresh(shard).await;
        }
        Err(NestError::Unavailable(format!(
            "the log of shard {shard} is being replaced"
        )))
    }
}

impl Answer {
    const fn from_log(entry: Entry) -> Self {
        Self {
            entry: Some(entry),
            source: Source::Log,
            unconfirmed: false,
        }
    }
}

/// PostgreSQL's word alone.
fn unconfirmed(row: Row) -> Result<Answer, NestError> {
    if row.dead.is_some() {
        return Err(NestError::Unavailable(
            "the log is down, and it holds a newer write of this key".to_owned(),
        ));
    }
    Ok(Answer {
        entry: row.entry,
        source: Source::Postgres,
        unconfirmed: true,
    })
}

/// The newest of what the log and PostgreSQL have; a write that PostgreSQL refused is as valid as any.
async fn newest(session: &Session, pending: Option<Entry>, row: Row) -> Result<Answer, NestError> {
    let stored = row
        .entry
        .as_ref()
        .map_or(Version::ZERO, |entry| entry.version);
    let known = row.dead.map_or(stored, |dead| dead.version.max(stored));
    if let Some(entry) = pending.filter(|entry| entry.version > known) {
        return Ok(Answer::from_log(entry));
    }
    let Some(dead) = row.dead else {
        return Ok(Answer {
            entry: row.entry,
            source: Source::Postgres,
            unconfirmed: false,
        });
    };
    let entry = session.dead_letter(dead.sequence).await.ok().flatten();
    entry
        .filter(|entry| entry.version == dead.version)
        .map(Answer::from_log)
        .ok_or_else(|| NestError::Unavailable("a dead letter could not be read".to_owned()))
}

/// Whether the log may have an older version of a key than PostgreSQL: it lost its tail, or may have.
fn may_be_behind(session: &Session, shard: Shard, version: Version) -> bool {
    session.is_fenced(shard) || session.is_doubtful(shard, version)
}

/// Whether the life `asked` is over for good, as PostgreSQL knows of a later one: its log was fenced, and is stored to
/// its end, before that is recorded.
fn drained(session: &Session, shard: Shard, asked: Base, recorded: Base) -> bool {
    recorded > asked && session.base(shard) == asked && session.is_fenced(shard)
}

fn count(result: &Result<Lookup, NestError>) {
    match result {
        Ok(Lookup::Found { source, .. }) => METRICS.read(source.as_str(), true),
        Ok(Lookup::Absent) => METRICS.read("none", false),
        Err(_) => METRICS.error("read"),
    }
}
