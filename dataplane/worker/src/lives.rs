//! A shard whose log lost its tail: fenced, stored to its end, and begun anew under a greater base.
//!
//! ```text
//! fence (nobody can publish) -> store what is left -> record the new base in PostgreSQL -> empty Redis
//!   -> purge the stream -> open its new subjects
//! ```
//! Whoever owns the shard does it, and may fail at any step: each is safe to repeat, and the next owner goes on. The
//! stream is never deleted.

use anyhow::bail;
use birb_nest_core::Base;
use birb_nest_store::{jetstream::Depth, postgres::ShardState};

use crate::owner::Owner;

impl Owner<'_> {
    /// Whether the shard can be read under the base that PostgreSQL records. If not, does what comes next and fails:
    /// the next ownership sees what became of it.
    pub async fn judge_life(&mut self, state: &ShardState, depth: Depth) -> anyhow::Result<()> {
        let (shard, base) = (self.shard, self.log.base(self.shard));
        let drained = depth.last <= state.applied_to || base < state.base;
        if self.log.is_fenced(shard) {
            if drained {
                self.begin_life(state, depth).await?;
                bail!("shard {shard} began another life");
            }
            if base == state.base {
                return Ok(());
            }
        }
        if base < state.base || depth.last < state.applied_to {
            let why = format!(
                "it lives under base {base} and ends at {}, PostgreSQL has base {} and stored up to {}",
                depth.last, state.base, state.applied_to
            );
            self.log.fence(shard, &why).await;
            bail!("the log of shard {shard} lost its tail: {why}");
        }
        if base > state.base {
            self.log.refresh(shard).await;
            bail!(
                "PostgresWentBack: shard {shard} lives under base {base}, PostgreSQL knows an earlier life ({}): if it was put \
                 back to an earlier copy, run `birb-nest setup`; see docs/OPERATIONS.md",
                state.base
            );
        }
        Ok(())
    }

    async fn begin_life(&mut self, state: &ShardState, depth: Depth) -> anyhow::Result<()> {
        let shard = self.shard;
        if self.log.base(shard) < state.base && self.log.has_messages_of(shard, state.base).await? {
            // It had begun its new life when somebody late fenced the old one again: nothing of it may go.
            tracing::warn!(%shard, base = %state.base, "opening the life of a shard again");
            self.log.open_life(shard, state.base, false).await?;
            return Ok(());
        }
        let above = [
            u64::try_from(self.context.clock.now().as_micros()).unwrap_or(0),
            depth.last.get() + 1,
            state.applied_to.get() + 1,
            self.log.highest_seen(shard) + 1,
        ];
        let Some(base) = above.into_iter().max().and_then(Base::new) else {
            bail!("no base is left for shard {shard}: the clock shows a time too far ahead");
        };
        self.session
            .begin_life(state.base, base)
            .await
            .map_err(anyhow::Error::msg)?;
        // Redis may hold writes that the log lost. If it cannot be told now, it is owed.
        if self.context.cache.flush().await.is_err() {
            self.session
                .set_redis_debt()
                .await
                .map_err(anyhow::Error::msg)?;
        }
        self.log.open_life(shard, base, true).await?;
        tracing::warn!(%shard, from = %state.base, to = %base, "the log of a shard is stored to its end, and begins another life");
        Ok(())
    }
}
