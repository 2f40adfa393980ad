//! The log: one JetStream stream per shard, to which every write is published and from which workers read.
//!
//! A [`Log`] keeps one [`Session`] at a time: a connection whose server and streams were checked, and the base of each
//! shard's present life. When the connection is lost the session is closed, with everything that was queued in it, and
//! another is dialled and checked before anybody publishes through it.
//!
//! Should a stream have lost its tail, its sequences would be used twice. Whoever notices *fences* it: its subjects are
//! changed to one that nobody writes to, workers store what is left, and its shard begins another life under a greater
//! base ([`life`]; docs/adr/0002-versions.md).

mod applied;
mod bare;
mod connect;
mod dead_letters;
mod life;
pub mod record;
mod rehydration;
mod session;
mod streams;
mod tail;

use std::{sync::Arc, time::Duration};

use birb_nest_core::{Backoff, Shard, ShardCount, Version};
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::applied::{Announcements, Stored};
use self::life::Seen;
pub(crate) use self::{
    bare::{BareSession, Look},
    life::Gate,
};
pub use self::{
    record::Record,
    rehydration::{Delivery, Job, Refill, Request},
    session::{Depth, Pending, Place, Session},
    tail::{Tail, TailError, TailMessage},
};
use crate::{
    clock::Clock, config::LogConfig, keeper::Keeper, metrics::METRICS, refusal::OpenError,
};

/// Why a message was not, or perhaps not, written to the log.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Certainly not written: it was never handed to the server, or the server refused it.
    #[error("the log does not take writes: {0}")]
    NotWritten(String),
    /// The key does not stand where it was expected to, another message came first: not written.
    #[error("another message of the key came first")]
    Moved,
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

/// How far PostgreSQL has stored each shard, in their order; `None` when it cannot be asked.
///
/// A log that ends before that has lost its tail.
pub type AppliedTo = Arc<dyn Fn() -> BoxFuture<'static, Option<Vec<Version>>> + Send + Sync>;

/// What a session is opened with.
#[derive(Clone)]
struct Opening {
    config: Arc<LogConfig>,
    /// The largest message this process writes.
    min_payload: usize,
    applied_to: AppliedTo,
    seen: Arc<Seen>,
    clock: Arc<Clock>,
}

impl Opening {
    /// For each shard the highest version that is known to have been in its log; and whether PostgreSQL was asked.
    async fn floors(&self) -> (Vec<Version>, bool) {
        let stored = (self.applied_to)().await;
        let shards = self.config.nats_shards;
        for (shard, stored) in shards.iter().zip(stored.iter().flatten()) {
            self.seen.note(shard, *stored);
        }
        let floors = shards
            .iter()
            .map(|shard| Version::new(self.seen.get(shard)).unwrap_or(Version::ZERO))
            .collect();
        (floors, stored.is_some())
    }
}

/// A handle on the log; cheap to clone.
#[derive(Clone)]
pub struct Log {
    config: Arc<LogConfig>,
    session: watch::Receiver<Option<Arc<Session>>>,
    keeper: Arc<Keeper>,
}

impl Log {
    /// Connects and keeps a session from then on.
    ///
    /// `min_payload` is the largest message this process writes; a server that takes less is refused. `applied_to` is
    /// asked before every session is used. `clock` learns the server's time, should it have nothing better.
    ///
    /// # Errors
    /// Only when the server or its streams are refused; one that cannot be reached yet is waited for in the background.
    pub async fn open(
        config: LogConfig,
        min_payload: usize,
        applied_to: AppliedTo,
        clock: Arc<Clock>,
    ) -> Result<Self, OpenError> {
        let config = Arc::new(config);
        let opening = Opening {
            seen: Arc::new(Seen::new(config.nats_shards)),
            config: config.clone(),
            min_payload,
            applied_to,
            clock,
        };
        let first = match Session::open(&opening).await {
            Ok(session) => Some(session),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "starting without the log");
                None
            }
        };
        let (sender, session) = watch::channel(first);
        let keeper = Keeper::default();
        keeper.spawn("log supervisor", |stop| supervise(opening, sender, stop));
        Ok(Self {
            config,
            session,
            keeper: Arc::new(keeper),
        })
    }

    /// Waits until a background task that the log cannot do without has ended, and names it: a defect.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn failed(&self) -> &'static str {
        self.keeper.failed().await
    }

    /// The present session; `None` while there is no trusted connection.
    #[must_use]
    pub fn session(&self) -> Option<Arc<Session>> {
        let session = self.session.borrow().clone();
        session.filter(|session| !session.is_closed())
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
    opening: Opening,
    sender: watch::Sender<Option<Arc<Session>>>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        let present = sender.borrow().clone();
        METRICS.dependency_up("nats", present.is_some());
        if let Some(session) = present {
            tokio::select! {
                () = session.closed() => {}
                () = stop.cancelled() => return,
            }
            tracing::warn!("lost the log: {}", connect::server_name(&opening.config));
            sender.send_replace(None);
            continue;
        }
        tokio::select! {
            opened = Session::open(&opening) => match opened {
                // A shard that lost its tail could not be fenced.
                Ok(session) if session.is_closed() => {}
                Ok(session) => {
                    backoff.succeed();
                    tracing::info!("log is ready: {}", connect::server_name(&opening.config));
                    sender.send_replace(Some(session));
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
