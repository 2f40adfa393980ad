//! A shard whose log lost its tail: fenced, stored to its end, and begun anew under a greater base.
//!
//! ```text
//! fence (nobody can publish) -> store all that is left -> record the new base in PostgreSQL -> empty Redis
//!   -> purge the stream -> open its new subjects
//! ```
//! Whoever owns the shard does it, and may fail at any step: each is safe to repeat, and the next owner goes on. The
//! stream is never deleted, and nothing is purged that was not stored before.

use anyhow::bail;
use birb_nest_core::{Base, Coalescer, Entry, Key, Version};
use birb_nest_store::{jetstream::Depth, postgres::ShardState, sabotage::may_die_after};

use crate::{metrics::METRICS, owner::Owner};

impl Owner<'_> {
    /// What the shard's log holds, if it can be read under the base that PostgreSQL records. If not, does what comes
    /// next and fails: the next ownership sees what became of it.
    ///
    /// `state` was read before: a log that ends before it has lost its tail.
    pub async fn judge_life(&mut self, state: &ShardState) -> anyhow::Result<Depth> {
        let shard = self.shard;
        self.log.refresh(shard).await;
        let base = self.log.base(shard);
        let depth = self.log.depth(shard).await?;
        if self.log.is_fenced(shard) {
            self.begin_life(state, depth).await?;
            bail!("shard {shard} began another life");
        }
        if self.log.is_resharding(shard) && base != state.base {
            bail!(
                "shard {shard} is being resharded: `birb-nest setup --reshard` opens its next life"
            );
        }
        if base < state.base || depth.last < state.applied_to {
            let why = format!(
                "it lives under base {base} and ends at {}, PostgreSQL has base {} and stored up to {}",
                depth.last, state.base, state.applied_to
            );
            self.log.fence(shard, base, &why).await;
            bail!("the log of shard {shard} lost its tail: {why}");
        }
        if base > state.base {
            bail!(
                "PostgresWentBack: shard {shard} lives under base {base}, PostgreSQL knows an earlier life ({}): if it was put \
                 back to an earlier copy, run `birb-nest setup`; see docs/OPERATIONS.md",
                state.base
            );
        }
        Ok(depth)
    }

    async fn begin_life(&mut self, state: &ShardState, depth: Depth) -> anyhow::Result<()> {
        let (shard, old) = (self.shard, self.log.base(self.shard));
        if old != state.base && self.log.has_messages_of(shard, state.base).await? {
            // It had begun its new life when somebody late fenced the old one again: nothing of it may go.
            tracing::warn!(%shard, base = %state.base, "opening the life of a shard again");
            self.log.open_life(shard, state.base, None).await?;
            return Ok(());
        }
        self.store_what_is_left(state, depth).await?;
        may_die_after("stored-fenced");
        let above = [
            u64::try_from(self.context.clock.now().as_micros()).unwrap_or(0),
            depth.last.get() + 1,
            state.applied_to.get() + 1,
            self.log.highest_seen(shard) + 1,
        ];
        // The purged stream goes on counting where it was.
        let base = above.into_iter().max().and_then(Base::new);
        let Some((base, applied_to)) =
            base.and_then(|base| Some((base, base.version(old.sequence(depth.last))?)))
        else {
            bail!("no base is left for shard {shard}: the clock shows a time too far ahead");
        };
        self.session
            .begin_life(state.base, base, applied_to)
            .await
            .map_err(anyhow::Error::msg)?;
        may_die_after("recorded-life");
        // Redis may hold writes that the log lost. If it cannot be told now, it is owed.
        if self.context.cache.flush().await.is_err() {
            self.session
                .set_redis_debt()
                .await
                .map_err(anyhow::Error::msg)?;
        }
        may_die_after("emptied-redis");
        // Nothing but what was stored may go: not what came at the last moment, and not, should this owner have been stopped
        // here for a while and lost the shard, what belongs to a later life. Sequences count on from life to life.
        let drained = old.sequence(depth.last);
        if self.log.depth(shard).await?.last != depth.last {
            bail!("more has come into the fenced log of shard {shard}");
        }
        let held = self.session.state().await.map_err(anyhow::Error::msg)?;
        if held.base != base {
            bail!("shard {shard} began another life without this owner");
        }
        self.log.open_life(shard, base, Some(drained)).await?;
        METRICS.life_begun();
        tracing::warn!(%shard, from = %state.base, to = %base, "the log of a shard is stored to its end, and begins another life");
        Ok(())
    }

    /// Stores entries of a fenced log; what PostgreSQL refuses for good becomes a dead letter here as anywhere.
    async fn store_ahead(
        &mut self,
        state: &ShardState,
        entries: &[(Key, Entry)],
    ) -> anyhow::Result<()> {
        match self.session.apply_ahead(state.base, entries).await {
            Ok(applied) => self.exhume(&applied.over).await,
            Err(error) if error.is_permanent() => {
                self.store_what_can_be(state.base, entries, state.applied_to)
                    .await?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Stores everything that a fenced stream still holds, whatever PostgreSQL has of it: sequences may have been used
    /// twice, or the stream be of an earlier life. Rows that are newer stay.
    async fn store_what_is_left(&mut self, state: &ShardState, depth: Depth) -> anyhow::Result<()> {
        if depth.n_messages == 0 {
            return Ok(());
        }
        let config = &self.context.config;
        let (n_prefetch, max_bytes) = (
            2 * config.worker_batch_size as usize,
            config.worker_batch_bytes,
        );
        let mut tail = self
            .log
            .tail(self.shard, Version::ZERO, n_prefetch, max_bytes)
            .await?;
        let mut coalescer = Coalescer::new(config.batch_limits());
        let mut n_messages = 0usize;
        loop {
            let mut message = tail.next().await?;
            n_messages += 1;
            coalescer.push(message.version, message.entry.take());
            let is_last = message.n_pending == 0;
            if is_last || coalescer.is_full() {
                self.store_ahead(state, &coalescer.take().entries).await?;
            }
            if is_last {
                tracing::info!(shard = %self.shard, n_messages, "stored what was left in a fenced log");
                return Ok(());
            }
        }
    }
}
