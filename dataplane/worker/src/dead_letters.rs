//! Writes that PostgreSQL refuses for good: found by bisection, put aside, tried again.
//!
//! One such write must not hold up the others, and must not be lost. It goes to the dead-letter stream first, then its
//! row in `dead_keys` and the shard's place are committed together; from then on the dead letter is the state of its
//! key, for every lookup, until it can be stored or a newer write replaces it.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{anyhow, bail};
use birb_nest_core::{Backoff, Base, Entry, Key, Shard, Version};
use birb_nest_store::{
    postgres::{Applied, ApplyError, DeadKey, DueKey},
    sabotage::may_die_after,
};

use crate::{metrics::METRICS, owner::Owner};

/// More writes in a row that are refused alike, without one that is stored, mean that something else is wrong: a trigger, a
/// constraint, a migration by hand. Then the log waits for a person.
const MOST_REFUSED: usize = 8;
/// How much of PostgreSQL's words is kept, in bytes: a message may quote the value.
const REASON_BYTES: usize = 500;
/// The longest wait between two tries.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Which writes of each shard were refused with which SQLSTATE since one was stored, over all batches and owners of this
/// process: one that is tried again is no other one.
#[derive(Default)]
pub struct Refusals(Mutex<HashMap<Shard, HashMap<String, BTreeSet<Version>>>>);

impl Refusals {
    /// Notes a refusal, and returns how many are alike.
    fn one_more(&self, shard: Shard, sqlstate: &str, version: Version) -> usize {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_shard = counts.entry(shard).or_default();
        let alike = of_shard.entry(sqlstate.to_owned()).or_default();
        if alike.len() <= MOST_REFUSED {
            alike.insert(version);
        }
        alike.len()
    }

    /// Something was stored.
    pub fn none(&self, shard: Shard) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&shard);
    }
}

fn shortened(mut why: String) -> String {
    if why.len() > REASON_BYTES {
        let end = (0..=REASON_BYTES)
            .rev()
            .find(|at| why.is_char_boundary(*at))
            .unwrap_or(0);
        why.truncate(end);
        why.push('…');
    }
    why
}

/// A write, and PostgreSQL's reason to refuse it.
struct Refused<'a> {
    /// The two below.
    part: &'a [(Key, Entry)],
    key: &'a Key,
    entry: &'a Entry,
    sqlstate: String,
    why: String,
}

impl Owner<'_> {
    /// Stores entries that were refused as a whole: halves them until only the refused writes are left, and buries those.
    /// The shard's place is `through` then.
    pub async fn store_what_can_be(
        &mut self,
        base: Base,
        entries: &[(Key, Entry)],
        through: Version,
    ) -> anyhow::Result<Applied> {
        METRICS.halved();
        let n_entries = entries.len();
        tracing::warn!(shard = %self.shard, n_entries, "PostgreSQL refuses a batch: halving it to find what it refuses");
        let mut stored = Applied {
            n_changed: 0,
            over: Vec::new(),
        };
        let (mut refused, any_stored) = self.sift(base, vec![entries], &mut stored).await?;
        if any_stored {
            refused = self.once_more(base, refused, &mut stored).await?;
        }
        self.bury(base, through, &refused).await?;
        self.exhume(&stored.over).await;
        Ok(stored)
    }

    /// Stores what can be stored of `parts`, the last one first; returns what is refused, and whether anything was stored.
    async fn sift<'a>(
        &mut self,
        base: Base,
        mut parts: Vec<&'a [(Key, Entry)]>,
        stored: &mut Applied,
    ) -> anyhow::Result<(Vec<Refused<'a>>, bool)> {
        let (mut refused, mut any_stored) = (Vec::new(), false);
        while let Some(part) = parts.pop() {
            match self.session.apply_ahead(base, part).await {
                Ok(applied) => {
                    stored.n_changed += applied.n_changed;
                    stored.over.extend(applied.over);
                    if !part.is_empty() {
                        any_stored = true;
                        self.context.refusals.none(self.shard);
                    }
                }
                Err(error) if !error.is_permanent() => return Err(error.into()),
                Err(ApplyError::Failed { why, sqlstate, .. }) if let [(key, entry)] = part => {
                    let sqlstate = sqlstate.unwrap_or_default();
                    let why = shortened(why);
                    if self
                        .context
                        .refusals
                        .one_more(self.shard, &sqlstate, entry.version)
                        > MOST_REFUSED
                    {
                        bail!(
                            "PostgreSQL refuses all writes of shard {} alike, more than {MOST_REFUSED} in a row: {why}; no more are dead-lettered, the log waits",
                            self.shard,
                        );
                    }
                    refused.push(Refused {
                        part,
                        key,
                        entry,
                        sqlstate,
                        why,
                    });
                }
                Err(_) => {
                    let (left, right) = part.split_at(part.len() / 2);
                    parts.push(right);
                    parts.push(left);
                }
            }
        }
        Ok((refused, any_stored))
    }

    /// Stores what is refused no more: perhaps PostgreSQL was mended when these had been refused, like everything, and the
    /// others had not come yet. Their refusals are counted already, with what was stored between them.
    async fn once_more<'a>(
        &mut self,
        base: Base,
        refused: Vec<Refused<'a>>,
        stored: &mut Applied,
    ) -> anyhow::Result<Vec<Refused<'a>>> {
        let mut still = Vec::new();
        for one in refused {
            match self.session.apply_ahead(base, one.part).await {
                Ok(applied) => {
                    stored.n_changed += applied.n_changed;
                    stored.over.extend(applied.over);
                }
                Err(error) if !error.is_permanent() => return Err(error.into()),
                Err(_) => still.push(one),
            }
        }
        Ok(still)
    }

    /// Something was stored: refusals in a row are over, and so are the dead letters it replaced.
    pub async fn refusals_end(&self, applied: &Applied) {
        self.context.refusals.none(self.shard);
        self.exhume(&applied.over).await;
    }

    /// Removes dead letters that are over.
    pub async fn exhume(&self, over: &[(u64, Key)]) {
        for (sequence, key) in over {
            self.log.exhume(*sequence, key).await;
        }
    }

    /// Whether a refused write has a dead letter, or a newer write of its key has: `known` is what the key has.
    /// Messages of the log come again, to the next owner or from a fenced log, and the stream keeps only the newest
    /// letter of a key: to publish one more takes away the one that `dead_keys` points to.
    async fn has_letter(
        &self,
        known: Option<(Version, u64)>,
        version: Version,
    ) -> anyhow::Result<bool> {
        match known {
            Some((dead, _)) if dead > version => Ok(true),
            Some((dead, sequence)) if dead == version => {
                let found = self.log.dead_letter(sequence).await?;
                Ok(found.is_some_and(|entry| entry.version == version))
            }
            _ => Ok(false),
        }
    }

    /// Puts writes aside that PostgreSQL refuses, and moves the shard's place.
    async fn bury(
        &mut self,
        base: Base,
        through: Version,
        refused: &[Refused<'_>],
    ) -> anyhow::Result<()> {
        let shard = self.shard;
        let keys: Vec<&str> = refused.iter().map(|refused| refused.key.as_str()).collect();
        let known = self.session.dead_keys(&keys).await;
        let known = known.map_err(anyhow::Error::msg)?;
        let mut dead = Vec::with_capacity(refused.len());
        for Refused {
            key,
            entry,
            sqlstate,
            why,
            ..
        } in refused
        {
            let known = known.get(key.as_str()).copied();
            if self.has_letter(known, entry.version).await? {
                tracing::debug!(%shard, version = %entry.version, "a refused write came again: it has its dead letter");
                continue;
            }
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
            may_die_after("published-letter");
        }
        let retry = self.wait_after(1);
        let replaced = self.session.bury(base, through, &dead, retry).await?;
        may_die_after("recorded-letters");
        self.exhume(&replaced).await;
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
        let found = match self.log.dead_letter(due.sequence).await {
            Ok(found) => found,
            Err(error) => {
                // Its key waits; the shard must not.
                tracing::error!(%shard, sequence = due.sequence, %error, "a dead letter cannot be read");
                let noted = self
                    .session
                    .refused_again(due, "", &error.to_string(), Some(LONGEST_WAIT / 60))
                    .await;
                return noted.map_err(anyhow::Error::msg);
            }
        };
        let Some(entry) = found.filter(|entry| entry.version == due.version) else {
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
            Ok(applied) => {
                self.refusals_end(&applied).await;
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
                    .refused_again(due, &sqlstate, &shortened(why), retry)
                    .await;
                noted.map_err(|why| anyhow!(why))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How long to wait after `n_attempts` failed ones; `None` when they were enough.
    fn wait_after(&self, n_attempts: u32) -> Option<Duration> {
        let first = self.context.config.worker_dead_letter_retry;
        let is_enough = n_attempts > self.log.max_retries();
        (!is_enough).then(|| wait_after(first, n_attempts, rand::random()))
    }
}

/// Doubled with each of `n_attempts`, which is at least 1; `random` is uniform in 0.0..1.0.
fn wait_after(first: Duration, n_attempts: u32, random: f64) -> Duration {
    let mut backoff = Backoff::new(first, LONGEST_WAIT);
    let mut wait = backoff.fail(random);
    for _ in 1..n_attempts {
        wait = backoff.fail(random);
    }
    wait
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_are_spread_and_end_at_an_hour() {
        let first = Duration::from_secs(60);
        let minutes = |random| {
            let waits = (1..=8).map(move |n| wait_after(first, n, random).as_secs() as f64 / 60.0);
            waits.collect::<Vec<_>>()
        };
        assert_eq!(minutes(1.0), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
        assert_eq!(minutes(0.0), [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
    }
}
