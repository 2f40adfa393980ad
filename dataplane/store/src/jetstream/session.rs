//! One checked connection to the log: publishing, looking up, reading, trimming.

use std::sync::{Arc, atomic::Ordering};

use async_nats::jetstream::{
    self, ErrorCode,
    context::PublishErrorKind,
    message::PublishMessage,
    stream::{DirectGetErrorKind, LastRawMessageErrorKind},
};
use birb_nest_core::{Base, Entry, Key, Shard, Version};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{
    AppliedTo, BareSession, Opening, PublishError, ReadError, Record, Tail, TailError,
    life::{self, Gate, Lives, Seen},
    streams,
};
use crate::{
    config::LogConfig,
    refusal::{OpenError, chain},
    trace::TraceParent,
};

/// The header of W3C Trace Context, in HTTP as in the log.
const TRACE_PARENT: &str = "traceparent";

/// One checked connection, good until it is closed.
pub struct Session {
    pub(super) config: Arc<LogConfig>,
    pub(super) context: jetstream::Context,
    pub(super) lives: Lives,
    pub(super) seen: Arc<Seen>,
    /// Where each shard's log ended when this session was opened.
    found: Vec<Version>,
    pub(super) max_payload: usize,
    pub(super) closed: CancellationToken,
}

/// What the log has of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pending {
    /// Nothing, or a pin.
    Nothing,
    /// Its newest change that is still in the log, applied or not.
    Entry(Entry),
    /// A change of this version that this release cannot read, and why: nothing older may pass for the key's value.
    Held(Version, String),
}

/// Where a key stands in its shard's log: at the message of that sequence in that life. Nobody else's message is there
/// twice: a stream counts on when a life ends, and the base tells the lives apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The base of the life.
    pub base: Base,
    /// The sequence of the key's message, a pin included; 0 if there is none.
    pub sequence: u64,
}

/// What is in a shard's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Messages kept, applied ones included that were not trimmed yet.
    pub n_messages: u64,
    /// Bytes kept.
    pub n_bytes: u64,
    /// The version of the newest message ever stored.
    pub last: Version,
}

impl Depth {
    /// How many of its messages may come behind `applied_to`. None of a log that is empty, wherever it ends: what is not in it any
    /// more is stored, or lost.
    #[must_use]
    pub fn behind(&self, applied_to: Version) -> u64 {
        let versions = self.last.get().saturating_sub(applied_to.get());
        versions.min(self.n_messages)
    }
}

impl Session {
    /// Dials the server, checks it and every shard's stream, and fences those that lost their tail.
    pub(super) async fn open(opening: &Opening) -> Result<Arc<Self>, OpenError> {
        let (config, min_payload) = (&opening.config, opening.min_payload);
        let bare = BareSession::open(config).await?;
        let max_payload = bare.dialed.client.server_info().max_payload;
        if max_payload < min_payload {
            return Err(OpenError::refused(
                &bare.server,
                format!(
                    "its max_payload is {max_payload} bytes, but API_MAX_VALUE_BYTES needs {min_payload}; raise the one or lower the other"
                ),
            ));
        }
        // Asked before the streams are: whatever is stored or acknowledged by now is before their ends.
        let (floors, are_complete) = opening.floors().await;
        let mut lives = Vec::with_capacity(usize::from(config.nats_shards.get()));
        for shard in config.nats_shards.iter() {
            let life = bare.find(shard).await?.ok_or_else(|| {
                OpenError::unreachable(
                    &bare.server,
                    format!(
                        "stream {} is missing: run `birb-nest setup`",
                        streams::name(config, shard)
                    ),
                )
            })?;
            lives.push(life);
        }
        bare.tell_time(&opening.clock).await?;
        let ends = lives.iter().map(life::Life::end).collect();
        let session = Arc::new(Self {
            found: ends,
            config: config.clone(),
            context: bare.context,
            lives: Lives::new(lives),
            seen: opening.seen.clone(),
            max_payload,
            closed: bare.dialed.closed,
        });
        session.check_tails(&floors).await;
        let unasked = (!are_complete).then(|| opening.applied_to.clone());
        let (kept, closes) = (
            Arc::downgrade(&session),
            session.closed.clone().drop_guard(),
        );
        tokio::spawn(async move {
            life::keep(kept, unasked).await;
            // However it ends: a session that nobody looks after is of no use.
            drop(closes);
        });
        Ok(session)
    }

    /// Fences every shard whose log ends before what was known to have been in it when `floors` were taken.
    async fn check_tails(&self, floors: &[Version]) {
        for (shard, floor) in self.config.nats_shards.iter().zip(floors) {
            let life = self.lives.of(shard);
            let end = life.end();
            if end < *floor {
                let why = format!("it ends at {end}, and {floor} was in it");
                self.fence(shard, life.base, &why).await;
            }
            self.seen.note(shard, end);
        }
    }

    /// Whether an entry of the log may be older than what PostgreSQL has: it was there when this session was opened. Before
    /// that the log may have lost its tail; or the server was killed, could not use its index, and has again what a newer
    /// message of the key had replaced that was trimmed since.
    #[must_use]
    pub fn is_doubtful(&self, shard: Shard, version: Version) -> bool {
        version <= self.found[shard.index()]
    }

    /// PostgreSQL has stored `shard` up to `applied_to`.
    pub fn note_stored(&self, shard: Shard, applied_to: Version) {
        self.seen.note(shard, applied_to);
    }

    /// Fences every shard whose log ends before what PostgreSQL says to have stored; returns whether it could be asked.
    pub(super) async fn recheck_tails(&self, applied_to: &AppliedTo) -> bool {
        let Some(stored) = applied_to().await else {
            return false;
        };
        for (shard, stored) in self.config.nats_shards.iter().zip(stored) {
            let base = self.base(shard);
            match self.depth(shard).await {
                Ok(depth) if depth.last < stored => {
                    let why = format!("it ends at {}, and {stored} was stored", depth.last);
                    self.fence(shard, base, &why).await;
                }
                Ok(_) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// The base of `shard`'s present life.
    #[must_use]
    pub fn base(&self, shard: Shard) -> Base {
        self.lives.of(shard).base
    }

    /// The subject of `key`'s messages in `shard`'s present life.
    #[must_use]
    pub fn subject(&self, shard: Shard, key: &Key) -> String {
        self.lives.of(shard).subject(key)
    }

    /// The highest version of `shard` that this process knows to have been in its log.
    #[must_use]
    pub fn highest_seen(&self, shard: Shard) -> u64 {
        self.seen.get(shard)
    }

    /// The most bytes a shard's stream may hold.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.config.nats_stream_max_bytes as u64
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Waits until the session is closed.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Writes `record` of `key` to the log and waits for the server to have it on disk. With `expected` only if the key
    /// still stands there when the server takes it, however late that is. `trace` travels with it.
    ///
    /// # Errors
    /// [`PublishError`] tells what is certainly not written from what may be.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the outcome unknown.
    pub async fn publish(
        &self,
        shard: Shard,
        key: &Key,
        record: &Record,
        expected: Option<Place>,
        trace: Option<&TraceParent>,
    ) -> Result<Version, PublishError> {
        let deadline = self.config.nats_publish_timeout;
        let life = self.lives.of(shard);
        if expected.is_some_and(|place| place.base != life.base) {
            return Err(PublishError::Moved);
        }
        match life.gate {
            Gate::Open => {}
            Gate::Fenced => {
                return Err(PublishError::NotWritten(format!(
                    "the log of shard {shard} is being replaced"
                )));
            }
            Gate::Resharding => {
                return Err(PublishError::NotWritten(
                    "the nest is being resharded".to_owned(),
                ));
            }
        }
        let seen = self.seen.get(shard);
        let mut message = PublishMessage::build().payload(record.encode());
        if let Some(trace) = trace {
            message = message.header(TRACE_PARENT, trace.as_str());
        }
        if let Some(place) = expected {
            message = message.expected_last_subject_sequence(place.sequence);
        }
        // Until `send_publish` returns, the message waits for a permit or a place in the client's queue; dropped
        // there, it was never handed over.
        let sending = self.context.send_publish(life.subject(key), message);
        let acknowledgement = tokio::select! {
            sent = timeout(deadline, sending) => match sent {
                Ok(Ok(acknowledgement)) => acknowledgement,
                Ok(Err(error)) => return Err(PublishError::NotWritten(chain(&error))),
                Err(_) => return Err(PublishError::NotWritten(format!("no place in the queue for {deadline:?}"))),
            },
            () = self.closed.cancelled() => return Err(PublishError::NotWritten("connection lost".to_owned())),
        };
        let answer = tokio::select! {
            answer = timeout(deadline, acknowledgement) => answer,
            () = self.closed.cancelled() => return Err(PublishError::Unknown("connection lost".to_owned())),
        };
        match answer {
            Ok(Ok(ack)) if ack.sequence > 0 => {
                let version = life.base.version(ack.sequence).ok_or_else(|| {
                    PublishError::Unknown("its version does not fit 53 bits".to_owned())
                })?;
                if version.get() <= seen {
                    // A sequence that was used before: whatever has it may look newer than this write.
                    let why = format!(
                        "it acknowledged {version}, and {seen} was in it before that was sent"
                    );
                    self.fence(shard, life.base, &why).await;
                    return Err(PublishError::Unknown("the log lost its tail".to_owned()));
                }
                self.seen.note(shard, version);
                Ok(version)
            }
            // nats-server#6415: a sequence of 0 promises nothing.
            Ok(Ok(_)) => Err(PublishError::Unknown(
                "acknowledged without a sequence".to_owned(),
            )),
            Ok(Err(error)) => Err(self.judge_refusal(shard, &error)),
            Err(_) => Err(PublishError::Unknown(format!(
                "no acknowledgement within {deadline:?}"
            ))),
        }
    }

    /// Puts a pin where nothing of `key` is in the log, and returns its place: as long as the pin stands, nothing was
    /// written to the key since.
    ///
    /// # Errors
    /// As [`Session::publish`]; [`PublishError::Moved`] when there is something by now.
    pub async fn pin(
        &self,
        shard: Shard,
        key: &Key,
        nothing: Place,
    ) -> Result<Place, PublishError> {
        let version = self
            .publish(shard, key, &Record::Pin, Some(nothing), None)
            .await?;
        Ok(Place {
            base: nothing.base,
            sequence: nothing.base.sequence(version),
        })
    }

    fn judge_refusal(
        &self,
        shard: Shard,
        error: &jetstream::context::PublishError,
    ) -> PublishError {
        match error.kind() {
            // Nobody listens on the subject: the shard is fenced, or lives under another one; or JetStream is not up.
            PublishErrorKind::StreamNotFound => {
                self.lives.doubtful.store(true, Ordering::Release);
                PublishError::NotWritten("no stream takes its subject".to_owned())
            }
            PublishErrorKind::WrongLastSequence => PublishError::Moved,
            PublishErrorKind::Other => {
                let refusal = std::error::Error::source(error)
                    .and_then(|source| source.downcast_ref::<jetstream::Error>());
                match refusal.map(jetstream::Error::error_code) {
                    // How a replicated stream says that another message of the key is on its way into it.
                    Some(ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT) => PublishError::Moved,
                    Some(ErrorCode::STREAM_STORE_FAILED) if chain(error).contains("maximum") => {
                        PublishError::Full(shard)
                    }
                    _ => PublishError::Unknown(chain(error)),
                }
            }
            _ => PublishError::Unknown(chain(error)),
        }
    }

    /// What the log has of `key`, and where, under the base by which it was asked for.
    ///
    /// # Errors
    /// [`ReadError`] when the log did not answer.
    pub async fn last(&self, shard: Shard, key: &Key) -> Result<(Pending, Place), ReadError> {
        let life = self.lives.of(shard);
        let stream = &life.stream;
        let subject = life.subject(key);
        let asked = async {
            if life.is_alone() {
                match stream.direct_get_last_for_subject(subject).await {
                    Ok(message) => Ok(Some((message.sequence, message.payload))),
                    Err(error) if matches!(error.kind(), DirectGetErrorKind::NotFound) => Ok(None),
                    Err(error) => Err(ReadError(chain(&error))),
                }
            } else {
                // Any replica may answer a direct get; only the leader has every acknowledged write.
                match stream.get_last_raw_message_by_subject(&subject).await {
                    Ok(message) => Ok(Some((message.sequence, message.payload))),
                    Err(error)
                        if matches!(error.kind(), LastRawMessageErrorKind::NoMessageFound) =>
                    {
                        Ok(None)
                    }
                    Err(error) => Err(ReadError(chain(&error))),
                }
            }
        };
        let found = tokio::select! {
            found = timeout(self.config.nats_publish_timeout, asked) => {
                found.map_err(|_| ReadError("no answer in time".to_owned()))??
            }
            () = self.closed.cancelled() => return Err(ReadError("connection lost".to_owned())),
        };
        let Some((sequence, payload)) = found else {
            let nothing = Place {
                base: life.base,
                sequence: 0,
            };
            return Ok((Pending::Nothing, nothing));
        };
        let place = Place {
            base: life.base,
            sequence,
        };
        let version = life
            .base
            .version(sequence)
            .ok_or_else(|| ReadError("a version does not fit 53 bits".to_owned()))?;
        self.seen.note(shard, version);
        let pending = match Record::decode(payload) {
            Ok(record) => record
                .into_entry(version)
                .map_or(Pending::Nothing, Pending::Entry),
            Err(error) => Pending::Held(version, error.to_string()),
        };
        Ok((pending, place))
    }

    /// Reads `shard` as its owner, from directly behind the version `behind`.
    ///
    /// `n_prefetch` messages of at most `max_bytes` (or one largest message) are held ready.
    ///
    /// # Errors
    /// [`TailError::Unreachable`].
    pub async fn tail(
        self: &Arc<Self>,
        shard: Shard,
        behind: Version,
        n_prefetch: usize,
        max_bytes: usize,
    ) -> Result<Tail, TailError> {
        Tail::open(self.clone(), shard, behind, n_prefetch, max_bytes).await
    }

    /// Drops every message of `shard` up to and including `through` from the log.
    ///
    /// # Errors
    /// [`ReadError`] when the server did not do it; doing it later serves as well.
    pub async fn trim(&self, shard: Shard, through: Version) -> Result<(), ReadError> {
        let life = self.lives.of(shard);
        timeout(
            self.config.nats_publish_timeout,
            life.purge(life.base.sequence(through)),
        )
        .await
        .map_err(|_| ReadError("no answer in time".to_owned()))?
    }

    /// How often a refused write is tried again.
    #[must_use]
    pub fn max_retries(&self) -> u32 {
        self.config.nats_dlq_max_retries
    }

    /// What `shard`'s stream holds.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn depth(&self, shard: Shard) -> Result<Depth, ReadError> {
        let life = self.lives.of(shard);
        let info = timeout(self.config.nats_publish_timeout, life.stream.get_info())
            .await
            .map_err(|_| ReadError("no answer in time".to_owned()))?
            .map_err(|error| ReadError(chain(&error)))?;
        let last = life
            .base
            .version(info.state.last_sequence)
            .ok_or_else(|| ReadError("a version does not fit 53 bits".to_owned()))?;
        self.seen.note(shard, last);
        Ok(Depth {
            n_messages: info.state.messages,
            n_bytes: info.state.bytes,
            last,
        })
    }
}
