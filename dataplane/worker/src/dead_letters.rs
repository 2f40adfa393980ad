//! Writes that PostgreSQL refuses for good: found by bisection, put aside, tried again.
//!
//! One such write must not hold up the others, and must not be lost. It goes to the dead-letter stream first, then its
//! row in `dead_keys` and the shard's place are committed together; from then on the dead letter is the state of its
//! key, for every lookup, until it can be stored or a newer write replaces it.

use std::time::Duration;

use anyhow::{anyhow, bail};
use birb_nest_core::{Backoff, Base, Batch, Entry, Key};
use birb_nest_store::postgres::{Applied, ApplyError, DeadKey, DueKey};

use crate::{metrics::METRICS, owner::Owner};

/// More refused writes in one batch mean that something else is wrong: a trigger, a constraint, a migration by hand.
/// Then the log waits for a person.
const MOST_REFUSED: usize = 8;
/// The longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A write, and PostgreSQL's reason to refuse it.
struct Refused<'a> {
    key: &'a Key,
    entry: &'a Entry,
    sqlstate: String,
    why: String,
}

impl Owner<'_> {
    /// Stores a batch that was refused as a whole: halves it until only the refused writes are left, and buries those.
    pub async fn store_what_can_be(
        &mut self,
        base: Base,
        batch: &Batch,
    ) -> anyhow::Result<Applied> {
        let mut refused = Vec::new();
        let mut n_changed = 0;
        let mut parts = vec![batch.entries.as_slice()];
        while let Some(part) = parts.pop() {
            match self.session.apply_ahead(base, part).await {
                Ok(applied) => n_changed += applied.n_changed,
                Err(error) if !error.is_permanent() => return Err(error.into()),
                Err(ApplyError::Failed { why, sqlstate, .. }) if let [(key, entry)] = part => {
                    let sqlstate = sqlstate.unwrap_or_default();
                    refused.push(Refused {
                        key,
                        entry,
                        sqlstate,
                        why,
                    });
                    if refused.len() > MOST_REFUSED {
                        bail!(
                            "PostgreSQL refuses more than {MOST_REFUSED} of {} writes of shard {}: {}; nothing is dead-lettered, the log waits",
                            batch.entries.len(),
                            self.shard,
                            refused[0].why
                        );
                    }
                }
                Err(_) => {
                    let (left, right) = part.split_at(part.len() / 2);
                    parts.push(right);
                    parts.push(left);
                }
            }
        }
        self.bury(base, batch, &refused).await?;
        Ok(Applied { n_changed })
    }

    async fn bury(
        &mut self,
        base: Base,
        batch: &Batch,
        refused: &[Refused<'_>],
    ) -> anyhow::Result<()> {
        let shard = self.shard;
        let mut dead = Vec::with_capacity(refused.len());
        for Refused {
            key,
            entry,
            sqlstate,
            why,
        } in refused
        {
            let sequence = self.log.bury(shard, key, entry, sqlstate, why).await?;
            tracing::error!(
                %shard, version = %entry.version, sqlstate, why, sequence,
                "PostgreSQL refuses a write for good: it is a dead letter now"
            );
            dead.push(DeadKey {
                key: (*key).clone(),
                version: entry.version,
                sequence,
                sqlstate: sqlstate.clone(),
                reason: why.clone(),
            });
        }
        let retry = self.wait_after(1);
        self.session.bury(base, batch.through, &dead, retry).await?;
        METRICS.dead_lettered(dead.len());
        Ok(())
    }

    /// Tries again what is due, and counts what is left.
    pub async fn retry_dead_letters(&mut self, base: Base) -> anyhow::Result<()> {
        for due in self
            .session
            .due_dead_keys()
            .await
            .map_err(anyhow::Error::msg)?
        {
            self.retry(base, &due).await?;
        }
        let (waiting, parked) = self
            .session
            .count_dead_keys()
            .await
            .map_err(anyhow::Error::msg)?;
        METRICS.dead_letters(self.shard, waiting, parked);
        Ok(())
    }

    async fn retry(&mut self, base: Base, due: &DueKey) -> anyhow::Result<()> {
        let shard = self.shard;
        let Some(entry) = self
            .log
            .dead_letter(due.sequence)
            .await?
            .filter(|entry| entry.version == due.version)
        else {
            tracing::error!(%shard, sequence = due.sequence, "a dead letter is gone from its stream; its key is parked");
            let reason = "its message is gone from the dead-letter stream";
            return self
                .session
                .refused_again(due, "", reason, None)
                .await
                .map_err(anyhow::Error::msg);
        };
        match self
            .session
            .apply_ahead(base, &[(due.key.clone(), entry)])
            .await
        {
            Ok(_) => {
                self.log.exhume(due.sequence).await;
                tracing::info!(%shard, version = %due.version, n_attempts = due.n_attempts + 1, "a dead letter is stored");
                Ok(())
            }
            Err(error) if !error.is_permanent() => Err(error.into()),
            Err(ApplyError::Failed { why, sqlstate, .. }) => {
                let retry = self.wait_after(due.n_attempts + 1);
                let parked = retry.is_none();
                tracing::warn!(%shard, version = %due.version, n_attempts = due.n_attempts + 1, parked, why, "a dead letter is refused again");
                let sqlstate = sqlstate.unwrap_or_default();
                let noted = self
                    .session
                    .refused_again(due, &sqlstate, &why, retry)
                    .await;
                noted.map_err(|why| anyhow!(why))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How long to wait after `n_attempts` failed ones; `None` when they were enough.
    fn wait_after(&self, n_attempts: u32) -> Option<Duration> {
        if n_attempts > self.log.max_retries() {
            return None;
        }
        let mut backoff = Backoff::new(self.context.config.worker_dead_letter_retry, LONGEST_WAIT);
        let mut wait = backoff.fail(rand::random());
        for _ in 1..n_attempts {
            wait = backoff.fail(rand::random());
        }
        Some(wait)
    }
}
