//! The lives of shards: which base a shard's stream has now, whether it is fenced, and how that changes while a
//! session stands.

use std::sync::{
    Arc, PoisonError, RwLock, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};
use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use birb_nest_core::{Base, Key, Shard, ShardCount, Version};
use futures::StreamExt;

use super::{AppliedTo, ReadError, Session, streams};
use crate::{
    metrics::METRICS,
    refusal::{OpenError, chain},
    sabotage::may_die_after,
};

/// How often a closed or doubtful shard is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Whether a shard's stream takes writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// It does.
    Open,
    /// It lost its tail: workers store what is left of it, and open the next life.
    Fenced,
    /// The nest is being resharded: workers store what is in it, and `setup` opens the next life.
    Resharding,
}

/// A shard's stream in one life.
pub(super) struct Life {
    pub base: Base,
    pub gate: Gate,
    pub subject_prefix: String,
    pub stream: Stream,
}

impl Life {
    /// The version of the newest message when this was learned.
    pub fn end(&self) -> Version {
        self.base
            .version(self.stream.cached_info().state.last_sequence)
            .unwrap_or(Version::MAX)
    }

    pub fn subject(&self, key: &Key) -> String {
        let token = key.to_token();
        let mut subject = String::with_capacity(self.subject_prefix.len() + token.len());
        subject.push_str(&self.subject_prefix);
        subject.push_str(&token);
        subject
    }

    /// Whether its server is in no cluster: then no replica can lag. In a cluster `setup` may give the stream replicas at
    /// any time, and nobody tells.
    pub fn is_alone(&self) -> bool {
        let cluster = self.stream.cached_info().cluster.as_ref();
        cluster.is_none_or(|cluster| cluster.name.is_none())
    }

    /// Drops the messages up to and with this sequence.
    pub async fn purge(&self, through: u64) -> Result<(), ReadError> {
        // A purge keeps the message with the sequence it names; servers before nats-server#8241 keep nothing for 1.
        if through == 0 {
            return Ok(());
        }
        match self.stream.purge().sequence(through + 1).await {
            Ok(_) => Ok(()),
            Err(error) => Err(ReadError(chain(&error))),
        }
    }
}

/// The present life of every shard.
pub(super) struct Lives {
    lives: Vec<RwLock<Arc<Life>>>,
    /// Somebody found that a shard is not what it is thought to be.
    pub doubtful: AtomicBool,
}

impl Lives {
    pub fn new(lives: Vec<Life>) -> Self {
        Self {
            lives: lives
                .into_iter()
                .map(|life| RwLock::new(Arc::new(life)))
                .collect(),
            doubtful: AtomicBool::new(false),
        }
    }

    pub fn of(&self, shard: Shard) -> Arc<Life> {
        self.lives[shard.index()]
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, shard: Shard, life: Life) {
        *self.lives[shard.index()]
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(life);
    }

    /// How many shards are in this state.
    pub fn n(&self, gate: Gate) -> usize {
        let such = self
            .lives
            .iter()
            .filter(|life| life.read().unwrap_or_else(PoisonError::into_inner).gate == gate);
        such.count()
    }
}

/// The highest version of each shard that this process knows to have been in its log, in any session: it was
/// acknowledged, read or delivered to it, or PostgreSQL had stored it.
pub(super) struct Seen(Vec<AtomicU64>);

impl Seen {
    pub fn new(shards: ShardCount) -> Self {
        Self(shards.iter().map(|_| AtomicU64::new(0)).collect())
    }

    pub fn get(&self, shard: Shard) -> u64 {
        self.0[shard.index()].load(Ordering::Acquire)
    }

    pub fn note(&self, shard: Shard, version: Version) {
        self.0[shard.index()].fetch_max(version.get(), Ordering::AcqRel);
    }
}

/// Looks at closed and doubtful shards again and again, until the session is closed or dropped. `unasked`: PostgreSQL
/// could not be asked how far it has stored when the session was opened; it is, as soon as it can be.
pub(super) async fn keep(session: Weak<Session>, mut unasked: Option<AppliedTo>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Some(session) = session.upgrade().filter(|session| !session.is_closed()) else {
            METRICS.shards_fenced(0);
            return;
        };
        if let Some(applied_to) = &unasked
            && session.recheck_tails(applied_to).await
        {
            unasked = None;
        }
        METRICS.shards_fenced(session.n_fenced());
        let n_open = session.lives.n(Gate::Open);
        if session.lives.doubtful.swap(false, Ordering::AcqRel)
            || n_open < session.lives.lives.len()
        {
            for shard in session.config.nats_shards.iter() {
                session.refresh(shard).await;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl Session {
    /// Learns the present life of `shard` from its stream, and tells whether it did. What cannot be learned now is left as
    /// it is.
    pub async fn refresh(&self, shard: Shard) -> bool {
        let learned = self.learn(shard).await;
        if let Err(error) = &learned {
            tracing::debug!(%shard, %error, "the life of a shard is not known");
        }
        learned.is_ok()
    }

    async fn learn(&self, shard: Shard) -> Result<(), OpenError> {
        let server = "NATS";
        match streams::find(&self.context, &self.config, shard, server).await? {
            Some(life) => {
                let known = self.lives.of(shard);
                if known.base != life.base || known.gate != life.gate {
                    tracing::warn!(%shard, base = %life.base, gate = ?life.gate, "the log of a shard changed its life");
                    self.lives.set(shard, life);
                }
                Ok(())
            }
            None => {
                tracing::error!(%shard, "the stream of a shard is gone: run `birb-nest setup`");
                Err(OpenError::unreachable(server, "the stream is gone"))
            }
        }
    }

    /// How many shards lost their tail and take no writes until their workers have drained them, as far as this process knows.
    #[must_use]
    pub fn n_fenced(&self) -> usize {
        self.lives.n(Gate::Fenced)
    }

    /// Whether `shard` lost its tail: nobody can publish to it until its workers have drained it.
    #[must_use]
    pub fn is_fenced(&self, shard: Shard) -> bool {
        self.lives.of(shard).gate == Gate::Fenced
    }

    /// Whether `shard` takes no writes because the nest is being resharded.
    #[must_use]
    pub fn is_resharding(&self, shard: Shard) -> bool {
        self.lives.of(shard).gate == Gate::Resharding
    }

    /// Keeps every writer, on whichever replica, from the life of `shard` under `judged`: it lost its tail. A later
    /// life is left alone, and so is a stream that is not this process's shard any more.
    pub async fn fence(&self, shard: Shard, judged: Base, why: &str) {
        if self
            .learn(shard)
            .await
            .is_err_and(|error| error.is_refusal())
        {
            return;
        }
        let life = self.lives.of(shard);
        if life.gate != Gate::Open || life.base != judged {
            return;
        }
        METRICS.error("log_lost_its_tail");
        tracing::error!(%shard, base = %life.base, why, "the log of a shard lost its tail: fencing it");
        if let Err(error) =
            streams::set_gate(&self.context, &self.config, shard, life.base, Gate::Fenced).await
        {
            tracing::error!(%shard, error, "the log of a shard could not be fenced: dialling anew, to check it and try again");
            self.closed.cancel();
            return;
        }
        self.refresh(shard).await;
    }

    /// Whether `shard`'s stream holds messages of the life under `base`.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn has_messages_of(&self, shard: Shard, base: Base) -> Result<bool, ReadError> {
        let life = self.lives.of(shard);
        let filter = format!("{}*", streams::subject_prefix(&self.config, shard, base));
        let mut subjects = life
            .stream
            .info_with_subjects(filter)
            .await
            .map_err(|error| ReadError(chain(&error)))?;
        match subjects.next().await {
            None => Ok(false),
            Some(Ok(_)) => Ok(true),
            Some(Err(error)) => Err(ReadError(chain(&error))),
        }
    }

    /// Lets writers into the life of `shard` under `base`. With `stored`, what is left of former lives goes first, up to and
    /// with that sequence: all of it must be stored.
    ///
    /// # Errors
    /// [`ReadError`]; doing it again is safe.
    pub async fn open_life(
        &self,
        shard: Shard,
        base: Base,
        stored: Option<u64>,
    ) -> Result<(), ReadError> {
        let life = self.lives.of(shard);
        if let Some(stored) = stored {
            life.purge(stored).await?;
            may_die_after("purged-life");
        }
        streams::set_gate(&self.context, &self.config, shard, base, Gate::Open)
            .await
            .map_err(ReadError)?;
        self.refresh(shard).await;
        Ok(())
    }
}
