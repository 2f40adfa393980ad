//! The worker's life: join, keep a fair share of the shards, leave.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{anyhow, bail};
use birb_nest_core::{Backoff, Shard};
use birb_nest_store::{
    Clock, LogConfig, Nest, PostgresConfig, RedisConfig,
    jetstream::{Log, Session, TailError},
    postgres::{Database, Membership, OwnedShard, Roster},
    redis::Cache,
};
use prometheus::Registry;
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin,
    config::WorkerConfig,
    dead_letters::Refusals,
    failures::Failures,
    janitor,
    metrics::METRICS,
    owner::{self, Context, Ended},
    rehydrate,
    share::fair_share,
    stalls::Stalls,
};

/// Works until `shutdown`, then finishes the batches in hand and gives its shards back.
///
/// The servers may be down at start: the process then waits for them and is not ready.
///
/// # Errors
/// An [`birb_nest_store::OpenError`] when a server is refused; else what keeps the admin port from being served.
pub async fn run(
    config: WorkerConfig,
    postgres: PostgresConfig,
    redis: RedisConfig,
    log: LogConfig,
    registry: Registry,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let clock = Arc::new(Clock::new());
    let (cache, database) = tokio::try_join!(
        Cache::open(redis, clock.clone()),
        Database::open(&postgres, "worker", clock.clone(), log.nats_shards),
    )?;
    let log = Log::open(log, 0, database.progress(), clock.clone()).await?;
    let nest = Nest::new(log.clone(), cache.clone(), database.clone(), clock.clone());
    let admin = admin::listen(&config, registry, log.clone(), database, shutdown.clone())?;
    let stall_timeout = config.worker_stall_timeout;
    let context = Arc::new(Context {
        name: format!("{:08x}", rand::random::<u32>()),
        config,
        postgres,
        log,
        cache,
        clock,
        refusals: Refusals::default(),
        furthest: Mutex::default(),
        n_stored: AtomicU64::new(0),
        n_messages_stored: AtomicU64::new(0),
    });
    let mut share = Share {
        n_shards: usize::from(context.log.shards().get()),
        context: context.clone(),
        owned: HashMap::new(),
        tasks: JoinSet::new(),
        failures: Failures::new(),
        stalls: Stalls::new(stall_timeout),
    };
    let sharing = async {
        share.keep(&shutdown).await;
        share.give_back_all().await;
    };
    let working = async {
        tokio::join!(
            sharing,
            rehydrate::run(&context, &nest, shutdown.clone()),
            janitor::run(&context, shutdown.clone()),
        )
    };
    let work = async {
        tokio::pin!(working);
        tokio::select! {
            ((), (), ()) = &mut working => Ok(()),
            error = nest.database().resharded() => {
                shutdown.cancel();
                working.await;
                Err(error)
            }
        }
    };
    tokio::select! {
        served = admin => return served,
        task = nest.failed() => bail!("the {task} ended: this process cannot go on"),
        () = nest.tend_redis() => bail!("nobody tends Redis any more: this process cannot go on"),
        outdated = work => outdated?,
    }
    tracing::info!("worker is done");
    Ok(())
}

/// The shards of this process.
struct Share {
    context: Arc<Context>,
    n_shards: usize,
    owned: HashMap<Shard, Owned>,
    tasks: JoinSet<anyhow::Result<Ended>>,
    failures: Failures,
    stalls: Stalls,
}

/// A shard that this process owns, or is claiming.
struct Owned {
    task: Id,
    since: Instant,
    /// Cancelling it releases the shard after the batch in hand.
    release: CancellationToken,
}

impl Share {
    /// Counts, takes and gives back, until `shutdown`.
    async fn keep(&mut self, shutdown: &CancellationToken) {
        let mut membership: Option<Membership> = None;
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        loop {
            let rebalanced = tokio::select! {
                rebalanced = self.rebalance(&mut membership) => rebalanced,
                () = shutdown.cancelled() => return,
            };
            let wait = match rebalanced {
                Ok(()) => {
                    backoff.succeed();
                    self.context.config.worker_rebalance_interval
                }
                Err(why) => {
                    // The owners have sessions of their own, and notice themselves whether these still stand.
                    membership = None;
                    if backoff.n_failures() == 0 {
                        tracing::warn!(why, "cannot count the workers");
                    }
                    backoff.fail(rand::random())
                }
            };
            let wakes = tokio::time::sleep(wait);
            tokio::pin!(wakes);
            loop {
                tokio::select! {
                    () = &mut wakes => break,
                    () = shutdown.cancelled() => return,
                    Some(ended) = self.tasks.join_next_with_id() => self.note(ended),
                }
            }
        }
    }

    async fn rebalance(&mut self, membership: &mut Option<Membership>) -> Result<(), String> {
        let Some(log) = self.context.log.session() else {
            // Who cannot read the log must not be counted on.
            *membership = None;
            return Ok(());
        };
        let member = match membership {
            Some(member) => member,
            None => membership
                .insert(Membership::open(&self.context.postgres, &self.context.name).await?),
        };
        let now = Instant::now();
        if !self.failures.is_resting(now) {
            member.join().await?;
        }
        let roster = member.roster(self.context.config.member_patience()).await?;
        if roster.n_others == 0 {
            self.failures.end_rest();
            member.join().await?;
        } else if self.failures.are_fruitless() {
            let rest = self.failures.begin_rest(now);
            METRICS.rested();
            tracing::error!(
                rest_ms = rest.as_millis() as u64,
                "this worker can store nothing (see above why): leaving the shards to {} others for a while",
                roster.n_others
            );
        }
        if self.failures.is_resting(now) {
            self.give_back_above(0);
            return member.leave().await;
        }
        let n_members = roster.n_others + 1;
        METRICS.members(n_members);
        self.evict_stalled(&log, member, &roster).await?;
        let share = fair_share(self.n_shards, n_members);
        self.give_back_above(share);
        self.take_up_to(share, &roster);
        Ok(())
    }

    /// Ends the sessions of workers that own shards and store nothing; and those that nobody uses any more and PostgreSQL was
    /// not told of, be they another worker's or this one's own: they would own their shards for ever.
    async fn evict_stalled(
        &mut self,
        log: &Session,
        member: &mut Membership,
        roster: &Roster,
    ) -> Result<(), String> {
        let of_this_nest = |owned: &&OwnedShard| {
            // The nest may have more shards by now than this worker knows.
            !owned.worker.is_empty() && usize::from(owned.index) < self.n_shards
        };
        for owned in roster.owned.iter().filter(of_this_nest) {
            let shard = Shard::from_index(owned.index);
            let was_ours = owned.worker == self.context.name;
            if was_ours && self.owned.contains_key(&shard) {
                continue;
            }
            if self.stalls.is_silent(std::time::Instant::now(), owned) {
                METRICS.evicted();
                tracing::warn!(
                    %shard,
                    worker = owned.worker,
                    "a session that owns a shard asks for nothing any more: ending it"
                );
                member.end(owned).await?;
                continue;
            }
            log.refresh(shard).await;
            let Ok(depth) = log.depth(shard).await else {
                return Ok(());
            };
            let (now, is_fenced) = (std::time::Instant::now(), log.is_fenced(shard));
            if !self.stalls.is_stalled(now, owned, depth, is_fenced) {
                continue;
            }
            METRICS.evicted();
            if was_ours {
                tracing::warn!(%shard, "a session that this worker lost still owns the shard: ending it");
                member.end(owned).await?;
            } else {
                tracing::warn!(
                    shard = owned.index,
                    worker = owned.worker,
                    applied_to = %owned.applied_to,
                    log_end = %depth.last,
                    "a worker has stored nothing for {:?}: ending its sessions",
                    self.context.config.worker_stall_timeout
                );
                return member.evict(&owned.worker).await;
            }
        }
        Ok(())
    }

    fn give_back_above(&self, share: usize) {
        let kept: Vec<_> = self
            .owned
            .iter()
            .filter(|(_, owned)| !owned.release.is_cancelled())
            .collect();
        for (shard, owned) in kept.iter().skip(share) {
            tracing::info!(%shard, share, "giving shard back");
            owned.release.cancel();
        }
    }

    fn take_up_to(&mut self, share: usize, roster: &Roster) {
        let now = Instant::now();
        // Workers start at different shards, so that they seldom reach for the same one.
        let offset = rand::random_range(0..self.n_shards);
        let shards: Vec<Shard> = self.context.log.shards().iter().collect();
        for shard in shards
            .iter()
            .cycle()
            .skip(offset)
            .take(self.n_shards)
            .copied()
        {
            if self.owned.len() >= share {
                return;
            }
            if self.failures.keep_off(shard, now)
                || roster.is_owned(shard)
                || self.owned.contains_key(&shard)
            {
                continue;
            }
            let release = CancellationToken::new();
            let (context, token) = (self.context.clone(), release.clone());
            let task = self
                .tasks
                .spawn(async move { owner::own(&context, shard, token).await });
            self.owned.insert(
                shard,
                Owned {
                    task: task.id(),
                    since: Instant::now(),
                    release,
                },
            );
        }
    }

    fn note(&mut self, ended: Result<(Id, anyhow::Result<Ended>), JoinError>) {
        let (task, result) = match ended {
            Ok(ended) => ended,
            Err(panic) => (panic.id(), Err(anyhow!(panic))),
        };
        let Some(shard) = self
            .owned
            .iter()
            .find(|(_, owned)| owned.task == task)
            .map(|(shard, _)| *shard)
        else {
            return;
        };
        let Some(owned) = self.owned.remove(&shard) else {
            return;
        };
        match result {
            Ok(ended) => {
                tracing::debug!(%shard, ?ended, "ownership ended");
                self.failures.forget(shard);
            }
            Err(error) => {
                let n_stored = self.context.n_stored.load(Ordering::Relaxed);
                let owned_for = owned.since.elapsed();
                let wait = self
                    .failures
                    .add(shard, Instant::now(), owned_for, n_stored);
                METRICS.lost(match error.downcast_ref() {
                    Some(TailError::Unreachable { .. }) => "log_unreachable",
                    Some(TailError::Unreadable { .. }) => "log_held",
                    Some(TailError::Gap { .. }) => "log_gap",
                    None => "other",
                });
                tracing::warn!(%shard, error = format!("{error:#}"), retry_ms = wait.as_millis() as u64, "lost shard");
            }
        }
    }

    async fn give_back_all(&mut self) {
        for owned in self.owned.values() {
            owned.release.cancel();
        }
        let limit = self.context.config.worker_shutdown_timeout;
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                if let Ok(Err(error)) = ended {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "a shard was not given back in order"
                    );
                }
            }
        };
        if timeout(limit, all).await.is_err() {
            tracing::warn!(
                "batches in hand were not stored within {limit:?}; the next owner reads them again"
            );
        }
    }
}
