//! The log: one JetStream stream per shard, to which every write is published and from which workers read.
//!
//! A [`Log`] keeps one [`Session`] at a time: a connection whose server and streams were checked, and the base of each
//! shard's present life. When the connection is lost the session is closed, with everything that was queued in it, and
//! another is dialled and checked before anybody publishes through it.

mod connect;
mod dead_letters;
pub mod record;
mod streams;
mod tail;

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{
    self, ErrorCode,
    context::{ContextBuilder, PublishErrorKind},
    message::PublishMessage,
    stream::{DirectGetErrorKind, LastRawMessageErrorKind, Stream},
};
use birb_nest_core::{Backoff, Base, Entry, Key, Shard, ShardCount, Version};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use self::{
    record::Record,
    tail::{Tail, TailError, TailMessage},
};
use crate::{
    config::LogConfig,
    metrics::METRICS,
    refusal::{OpenError, chain},
};

/// Why a message was not, or perhaps not, written to the log.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Certainly not written: it was never handed to the server, or the server refused it.
    #[error("the log does not take writes: {0}")]
    NotWritten(String),
    /// The shard's stream is full: not written, and will not be until workers have drained it.
    #[error("the log of shard {0} is full")]
    Full(Shard),
    /// It may have been written, now or in a moment.
    #[error("the log did not say whether it took the write: {0}")]
    Unknown(String),
}

/// The log did not answer a question, which is not the same as having nothing.
#[derive(Debug, thiserror::Error)]
#[error("the log cannot be asked: {0}")]
pub struct ReadError(String);

/// A handle on the log; cheap to clone.
#[derive(Clone)]
pub struct Log {
    config: Arc<LogConfig>,
    session: watch::Receiver<Option<Arc<Session>>>,
    // Ends the supervisor with the last handle.
    _supervisor: Arc<DropGuard>,
}

/// One checked connection, good until it is closed.
pub struct Session {
    config: Arc<LogConfig>,
    context: jetstream::Context,
    lives: Vec<Life>,
    max_payload: usize,
    closed: CancellationToken,
}

/// A shard's stream in its present life.
struct Life {
    base: Base,
    subject_prefix: String,
    stream: Stream,
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

impl Log {
    /// Connects and keeps a session from then on.
    ///
    /// `min_payload` is the largest message this process writes; a server that takes less is refused.
    ///
    /// # Errors
    /// Only when the server or its streams are refused; one that cannot be reached yet is waited for in the background.
    pub async fn open(config: LogConfig, min_payload: usize) -> Result<Self, OpenError> {
        let config = Arc::new(config);
        let first = match Session::open(&config, min_payload).await {
            Ok(session) => Some(Arc::new(session)),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "starting without the log");
                None
            }
        };
        let (sender, session) = watch::channel(first);
        let stop = CancellationToken::new();
        tokio::spawn(supervise(config.clone(), min_payload, sender, stop.clone()));
        Ok(Self {
            config,
            session,
            _supervisor: Arc::new(stop.drop_guard()),
        })
    }

    /// The present session; `None` while there is no trusted connection.
    #[must_use]
    pub fn session(&self) -> Option<Arc<Session>> {
        let session = self.session.borrow().clone();
        session.filter(|session| !session.closed.is_cancelled())
    }

    /// Waits until there is a session.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn wait_for_session(&self) -> Arc<Session> {
        let mut receiver = self.session.clone();
        loop {
            receiver.mark_unchanged();
            if let Some(session) = self.session() {
                return session;
            }
            if receiver.changed().await.is_err() {
                // The supervisor ends with the last handle, and this is one.
                std::future::pending::<()>().await;
            }
        }
    }

    /// How many shards there are.
    #[must_use]
    pub fn shards(&self) -> ShardCount {
        self.config.nats_shards
    }
}

async fn supervise(
    config: Arc<LogConfig>,
    min_payload: usize,
    sender: watch::Sender<Option<Arc<Session>>>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        let present = sender.borrow().clone();
        METRICS.dependency_up("nats", present.is_some());
        if let Some(session) = present {
            tokio::select! {
                () = session.closed.cancelled() => {}
                () = stop.cancelled() => return,
            }
            tracing::warn!("lost the log: {}", connect::server_name(&config));
            sender.send_replace(None);
            continue;
        }
        tokio::select! {
            opened = Session::open(&config, min_payload) => match opened {
                Ok(session) => {
                    backoff.succeed();
                    tracing::info!("log is ready: {}", connect::server_name(&config));
                    sender.send_replace(Some(Arc::new(session)));
                    continue;
                }
                Err(error) if backoff.n_failures() == 0 || error.is_refusal() => {
                    tracing::warn!(%error, "log is not ready");
                }
                Err(error) => tracing::debug!(%error, "log is still not ready"),
            },
            () = stop.cancelled() => return,
        }
        let wait = backoff.fail(rand::random());
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}

impl Session {
    /// Dials the server and checks it and every shard's stream.
    async fn open(config: &Arc<LogConfig>, min_payload: usize) -> Result<Self, OpenError> {
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
        let mut lives = Vec::with_capacity(usize::from(config.nats_shards.get()));
        for shard in config.nats_shards.iter() {
            let (stream, base) = bare.find(shard).await?.ok_or_else(|| {
                OpenError::unreachable(
                    &bare.server,
                    format!(
                        "stream {} is missing: run `birb-nest setup`",
                        streams::name(config, shard)
                    ),
                )
            })?;
            lives.push(Life {
                base,
                subject_prefix: streams::subject_prefix(config, shard, base),
                stream,
            });
        }
        Ok(Self {
            config: config.clone(),
            context: bare.context,
            lives,
            max_payload,
            closed: bare.dialed.closed,
        })
    }

    fn life(&self, shard: Shard) -> &Life {
        &self.lives[shard.index()]
    }

    /// The base of `shard`'s present life, as this session saw it when it was opened.
    #[must_use]
    pub fn base(&self, shard: Shard) -> Base {
        self.life(shard).base
    }

    /// The most bytes a shard's stream may hold.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.config.nats_stream_max_bytes as u64
    }

    /// Gives the session up, so that a new one is dialled and checked: it is found to be out of date.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Waits until the session is closed.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    fn subject(&self, shard: Shard, key: &Key) -> String {
        let prefix = &self.life(shard).subject_prefix;
        let token = key.to_token();
        let mut subject = String::with_capacity(prefix.len() + token.len());
        subject.push_str(prefix);
        subject.push_str(&token);
        subject
    }

    /// Writes `record` of `key` to the log and waits for the server to have it on disk.
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
    ) -> Result<Version, PublishError> {
        let deadline = self.config.nats_publish_timeout;
        let message = PublishMessage::build().payload(record.encode());
        // Until `send_publish` returns, the message waits for a permit or a place in the client's queue; dropped
        // there, it was never handed over.
        let sending = self.context.send_publish(self.subject(shard, key), message);
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
                self.base(shard).version(ack.sequence).ok_or_else(|| {
                    PublishError::Unknown("its version does not fit 53 bits".to_owned())
                })
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

    fn judge_refusal(
        &self,
        shard: Shard,
        error: &jetstream::context::PublishError,
    ) -> PublishError {
        match error.kind() {
            // Nobody listens on the subject: the shard has a new life under another one, or JetStream is not up.
            PublishErrorKind::StreamNotFound => {
                self.close();
                PublishError::NotWritten("no stream takes its subject".to_owned())
            }
            PublishErrorKind::Other => {
                let refusal = std::error::Error::source(error)
                    .and_then(|source| source.downcast_ref::<jetstream::Error>());
                match refusal.map(jetstream::Error::error_code) {
                    Some(ErrorCode::STREAM_STORE_FAILED) if chain(error).contains("maximum") => {
                        PublishError::Full(shard)
                    }
                    _ => PublishError::Unknown(chain(error)),
                }
            }
            _ => PublishError::Unknown(chain(error)),
        }
    }

    /// The newest change of `key` that is still in the log, applied or not; pins count as nothing.
    ///
    /// # Errors
    /// [`ReadError`] when the log did not answer, or holds something this release cannot read.
    pub async fn last(&self, shard: Shard, key: &Key) -> Result<Option<Entry>, ReadError> {
        let stream = &self.life(shard).stream;
        let subject = self.subject(shard, key);
        let asked = async {
            if self.config.nats_replicas == 1 {
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
            return Ok(None);
        };
        let version = self
            .base(shard)
            .version(sequence)
            .ok_or_else(|| ReadError("a version does not fit 53 bits".to_owned()))?;
        let record = Record::decode(payload).map_err(|error| ReadError(error.to_string()))?;
        Ok(record.into_entry(version))
    }

    /// Reads `shard` as its owner, from directly behind `applied_to` or earlier: what was stored but not acknowledged
    /// comes again.
    ///
    /// `n_prefetch` messages of at most `max_bytes` (or one largest message) are held ready.
    ///
    /// # Errors
    /// [`TailError::Unreachable`].
    pub async fn tail(
        self: &Arc<Self>,
        shard: Shard,
        applied_to: Version,
        n_prefetch: usize,
        max_bytes: usize,
    ) -> Result<Tail, TailError> {
        Tail::open(self.clone(), shard, applied_to, n_prefetch, max_bytes).await
    }

    /// Drops every message of `shard` up to and including `through` from the log.
    ///
    /// # Errors
    /// [`ReadError`] when the server did not do it; doing it later serves as well.
    pub async fn trim(&self, shard: Shard, through: Version) -> Result<(), ReadError> {
        let life = self.life(shard);
        // A purge keeps the message with the sequence it names.
        let keep_from = life.base.sequence(through) + 1;
        match timeout(
            self.config.nats_publish_timeout,
            life.stream.purge().sequence(keep_from),
        )
        .await
        {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(ReadError(chain(&error))),
            Err(_) => Err(ReadError("no answer in time".to_owned())),
        }
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
        let life = self.life(shard);
        let info = timeout(self.config.nats_publish_timeout, life.stream.get_info())
            .await
            .map_err(|_| ReadError("no answer in time".to_owned()))?
            .map_err(|error| ReadError(chain(&error)))?;
        Ok(Depth {
            n_messages: info.state.messages,
            n_bytes: info.state.bytes,
            last: life
                .base
                .version(info.state.last_sequence)
                .ok_or_else(|| ReadError("a version does not fit 53 bits".to_owned()))?,
        })
    }
}

/// A connection to the server before its streams are known: what `setup` works with.
pub(crate) struct BareSession {
    config: Arc<LogConfig>,
    server: String,
    context: jetstream::Context,
    dialed: connect::Dialed,
}

impl BareSession {
    pub(crate) async fn open(config: &Arc<LogConfig>) -> Result<Self, OpenError> {
        let dialed = connect::dial(config).await?;
        let context = ContextBuilder::new()
            .timeout(config.nats_publish_timeout)
            .max_ack_inflight(config.nats_max_inflight as usize)
            .backpressure_on_inflight(true)
            .build(dialed.client.clone());
        Ok(Self {
            config: config.clone(),
            server: connect::server_name(config),
            context,
            dialed,
        })
    }

    async fn find(&self, shard: Shard) -> Result<Option<(Stream, Base)>, OpenError> {
        streams::find(&self.context, &self.config, shard, &self.server).await
    }

    /// The base of `shard`'s stream, if there is one.
    pub(crate) async fn base(&self, shard: Shard) -> Result<Option<Base>, OpenError> {
        Ok(self.find(shard).await?.map(|(_, base)| base))
    }

    /// Makes `shard`'s stream for the life that begins at `base`.
    pub(crate) async fn create(&self, shard: Shard, base: Base) -> Result<(), OpenError> {
        streams::create(&self.context, &self.config, shard, base, &self.server).await
    }

    /// Makes the dead-letter stream.
    pub(crate) async fn prepare_dead_letters(&self) -> Result<(), OpenError> {
        streams::prepare_dead_letters(&self.context, &self.config, &self.server).await
    }

    /// Gives `shard`'s stream, which lives under `base`, the size and replicas that are configured now.
    pub(crate) async fn update(&self, shard: Shard, base: Base) -> Result<(), OpenError> {
        match self.find(shard).await? {
            Some(found) if found.1 == base => {
                streams::update(&self.context, &self.config, shard, found, &self.server).await
            }
            _ => Ok(()),
        }
    }

    /// The server's name for messages.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }
}
