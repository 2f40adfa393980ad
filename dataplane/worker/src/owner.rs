//! One owned shard, from the claim to the release.
//!
//! ```text
//! claim the lock -> read (base, applied_to, told_to) -> tail the log behind told_to
//!   -> collect a batch -> one transaction -> tell Redis -> acknowledge -> (now and then) trim
//! ```
//! **Invariant:** a batch is written only through the session that holds the shard's lock. When the session ends, so
//! does the ownership, and with it everything this task could still write. Any failure ends the ownership: the next
//! one starts from what PostgreSQL says.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use birb_nest_core::{Batch, Coalescer, Key, Shard, Version};
use birb_nest_store::{
    Clock, PostgresConfig,
    jetstream::{Log, Session, Stored, Tail, TailMessage},
    metrics::METRICS as STORE_METRICS,
    postgres::ShardSession,
    redis::Cache,
    sabotage::{Mistake, makes, may_die_after, stored_of},
};
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{config::WorkerConfig, dead_letters::Refusals, metrics::METRICS, trim::Trim};

/// What all owners of a process share.
pub struct Context {
    pub config: WorkerConfig,
    pub postgres: PostgresConfig,
    pub log: Log,
    pub cache: Cache,
    pub clock: Arc<Clock>,
    pub refusals: Refusals,
    /// The furthest place of each shard that an owner of this process knew.
    pub furthest: Mutex<HashMap<Shard, Version>>,
    /// Batches that this worker has stored.
    pub n_stored: AtomicU64,
    /// The messages that were in them.
    pub n_messages_stored: AtomicU64,
    /// Names this worker in `pg_stat_activity`.
    pub name: String,
}

/// How an ownership ended without failing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Another worker has the shard.
    Taken,
    /// It was asked for, between two batches.
    Released,
}

/// Owns `shard` until `release`.
///
/// # Errors
/// Whatever ended it early. The shard is free then, and nothing that was not acknowledged is lost.
pub async fn own(
    context: &Context,
    shard: Shard,
    release: CancellationToken,
) -> anyhow::Result<Ended> {
    let Some(log) = context.log.session() else {
        bail!("the log is not connected");
    };
    let claimed = ShardSession::claim(&context.postgres, shard, &context.name);
    let Some(session) = claimed
        .await
        .map_err(|why| anyhow!("failed to claim shard {shard}: {why}"))?
    else {
        return Ok(Ended::Taken);
    };
    let mut owner = Owner {
        context,
        shard,
        log,
        session,
        applied_to: Version::ZERO,
        told_to: Version::ZERO,
        trim: Trim::new(
            context.config.log_trim_lag,
            context.config.log_trim_interval,
        ),
    };
    let shown = Shown(shard);
    let result = owner.work(&release).await;
    drop(shown);
    owner.session.release().await;
    result.map(|()| Ended::Released)
}

pub struct Owner<'a> {
    pub context: &'a Context,
    pub shard: Shard,
    pub log: Arc<Session>,
    pub session: ShardSession,
    /// Where the shard stands, as this owner last wrote or read it.
    applied_to: Version,
    /// Up to where Redis was told of what is stored, or is owed it.
    told_to: Version,
    trim: Trim,
}

impl Owner<'_> {
    async fn work(&mut self, release: &CancellationToken) -> anyhow::Result<()> {
        let mut tail = self.open_tail().await?;
        let config = &self.context.config;
        let mut coalescer = Coalescer::new(config.batch_limits());
        let mut last: Option<TailMessage> = None;
        let mut closes_at = tokio::time::Instant::now();
        let mut check = ticker(Duration::from_secs(1));
        let mut trim = ticker(config.log_trim_interval);
        loop {
            tokio::select! {
                biased;
                // What is in hand is either stored now, or read again by the next owner.
                () = release.cancelled() => {
                    if let Some(last) = last {
                        self.flush(&tail, coalescer.take(), &last).await?;
                    }
                    return Ok(());
                }
                // Before the messages: in a backlog there is always one more.
                _ = check.tick() => {
                    self.check(&tail).await?;
                    continue;
                }
                _ = trim.tick() => {
                    self.trim().await;
                    continue;
                }
                () = sleep_until(closes_at), if !coalescer.is_empty() => {}
                message = tail.next() => {
                    let mut message = message?;
                    if coalescer.is_empty() {
                        closes_at = tokio::time::Instant::now() + config.worker_batch_timeout;
                        let age = self.context.clock.now().since(message.stored_at);
                        METRICS.lag(self.shard, message.n_pending + 1, Some(age));
                    }
                    coalescer.push(message.version, message.entry.take());
                    last = Some(message);
                    if !coalescer.is_full() {
                        continue;
                    }
                }
            }
            if let Some(last) = last.take() {
                self.flush(&tail, coalescer.take(), &last).await?;
            }
        }
    }

    async fn open_tail(&mut self) -> anyhow::Result<Tail> {
        let shard = self.shard;
        let state = self.session.state().await.map_err(anyhow::Error::msg)?;
        let depth = self.judge_life(&state).await?;
        self.log.note_stored(shard, state.applied_to);
        METRICS.owned(shard, depth, depth.behind(state.applied_to));
        let config = &self.context.config;
        let told_to = state.told_to.min(state.applied_to);
        let tail = self
            .log
            .tail(
                shard,
                told_to,
                2 * config.worker_batch_size as usize,
                config.worker_batch_bytes,
            )
            .await?;
        self.notice_going_back(state.applied_to).await?;
        self.applied_to = state.applied_to;
        self.told_to = told_to;
        self.trim.stored(Instant::now(), told_to);
        tracing::info!(%shard, applied_to = %state.applied_to, log_end = %depth.last, "owning shard");
        Ok(tail)
    }

    /// Says so, loudly, when PostgreSQL has less than it had: it was put back to an earlier copy, or failed over to a
    /// standby that lagged. What is still in the log, `LOG_TRIM_LAG` of it, is stored again; Redis is emptied, since it
    /// may hold the rest.
    async fn notice_going_back(&mut self, applied_to: Version) -> anyhow::Result<()> {
        let known = self.furthest_lock().get(&self.shard).copied();
        if let Some(known) = known.filter(|known| *known > applied_to) {
            METRICS.went_back();
            tracing::error!(
                shard = %self.shard, %applied_to, %known,
                "PostgresWentBack: PostgreSQL has lost what it had stored; storing again what the log still holds"
            );
            // A debt, so that Redis is emptied once for all shards. Forgotten only then: if this fails, the next
            // ownership notices again.
            self.session
                .set_redis_debt()
                .await
                .map_err(anyhow::Error::msg)?;
        }
        self.furthest_lock().insert(self.shard, applied_to);
        Ok(())
    }

    fn furthest_lock(&self) -> std::sync::MutexGuard<'_, HashMap<Shard, Version>> {
        self.context
            .furthest
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a batch; only then may anybody forget it.
    async fn flush(&mut self, tail: &Tail, batch: Batch, last: &TailMessage) -> anyhow::Result<()> {
        // What was stored before, and comes again because Redis may not have been told, is only told to it.
        if batch.through > self.applied_to {
            if makes(Mistake::TrimBeforeCommit) {
                let _ = self.log.trim(self.shard, batch.through).await;
            }
            self.store(tail, &stored_of(&batch)).await?;
            may_die_after("committed-batch");
            self.context.n_stored.fetch_add(1, Ordering::Relaxed);
            self.context
                .n_messages_stored
                .fetch_add(batch.n_messages as u64, Ordering::Relaxed);
            self.applied_to = batch.through;
            self.furthest_lock().insert(self.shard, batch.through);
            let stored = Stored {
                base: tail.base(),
                applied_to: batch.through,
            };
            self.log.announce(self.shard, stored).await;
        }
        METRICS.lag(self.shard, last.n_pending, None);
        self.tell_redis(&batch).await?;
        may_die_after("told-redis");
        last.acknowledge_through().await;
        self.told_to = batch.through;
        // What Redis was not told of stays in the log, however crowded that is: the next owner tells it.
        self.trim.stored(Instant::now(), batch.through);
        Ok(())
    }

    async fn store(&mut self, tail: &Tail, batch: &Batch) -> anyhow::Result<()> {
        let started = Instant::now();
        let applied = match self.session.apply(tail.base(), batch, self.told_to).await {
            Err(error) if error.is_permanent() => {
                self.store_what_can_be(tail.base(), &batch.entries, batch.through)
                    .await
            }
            Ok(applied) => {
                if !batch.entries.is_empty() {
                    self.refusals_end(&applied).await;
                }
                Ok(applied)
            }
            Err(error) => Err(error.into()),
        };
        METRICS.flush(
            started.elapsed(),
            if applied.is_ok() { "stored" } else { "failed" },
        );
        let applied = applied.inspect_err(|_| STORE_METRICS.error("postgres_apply"))?;
        METRICS.batch(batch.n_messages, batch.entries.len(), applied.n_changed);
        tracing::debug!(
            shard = %self.shard,
            through = %batch.through,
            batch.n_messages,
            batch.n_entries = batch.entries.len(),
            n_changed = applied.n_changed,
            flush.duration_ms = started.elapsed().as_millis() as u64,
            "stored batch"
        );
        Ok(())
    }

    /// Deletes from Redis what is older than the batch; what cannot be told is owed.
    async fn tell_redis(&mut self, batch: &Batch) -> anyhow::Result<()> {
        let versions: Vec<(Key, Version)> = batch
            .entries
            .iter()
            .map(|(key, entry)| (key.clone(), entry.version))
            .collect();
        if let Err(error) = self.context.cache.forget(&versions).await {
            tracing::debug!(shard = %self.shard, %error, "Redis was not told of a batch");
            self.session
                .set_redis_debt()
                .await
                .map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    /// Sees whether the session and the base still stand, notes what the last batch did not, and retries what is due.
    async fn check(&mut self, tail: &Tail) -> anyhow::Result<()> {
        let shard = self.shard;
        // Another process may have fenced it; nobody tells.
        self.log.refresh(shard).await;
        let state = self.session.state().await.map_err(anyhow::Error::msg)?;
        if state.base != tail.base() || self.log.base(shard) != tail.base() {
            bail!("shard {shard} began another life");
        }
        if self.log.is_fenced(shard) {
            bail!("the log of shard {shard} is fenced");
        }
        if state.told_to < self.told_to {
            let noting = self.session.set_told_to(self.told_to).await;
            noting.map_err(anyhow::Error::msg)?;
        }
        self.retry_dead_letters(tail.base()).await
    }

    /// Drops from the log what PostgreSQL has had long enough. A failure is made good by the next trim.
    async fn trim(&mut self) {
        let shard = self.shard;
        let depth = match self.log.depth(shard).await {
            Ok(depth) => depth,
            Err(error) => {
                tracing::debug!(%shard, %error, "depth of the log is not known");
                return;
            }
        };
        METRICS.depth(shard, depth);
        let crowded = depth.n_bytes > self.log.max_bytes() / 2;
        let Some(through) = self.trim.due(Instant::now(), crowded) else {
            return;
        };
        match self.log.trim(shard, through).await {
            Ok(()) => {
                self.trim.done(through);
                tracing::debug!(%shard, %through, "trimmed the log");
            }
            Err(error) => {
                STORE_METRICS.error("log_trim");
                tracing::debug!(%shard, %error, "log was not trimmed");
            }
        }
    }
}

/// Takes the shard out of the metrics, however its ownership ends.
struct Shown(Shard);

impl Drop for Shown {
    fn drop(&mut self) {
        METRICS.released(self.0);
    }
}

fn ticker(period: Duration) -> tokio::time::Interval {
    let mut ticker = interval(period);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticker
}
