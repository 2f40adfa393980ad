//! Shards that were lost by a failure: when each is tried again, and when this worker should leave them to others.
//!
//! A fair share counts members. One that owns its share and can never store it would keep it from those who could: so
//! after some failures in a row, with nothing stored in between, it rests, and is no member meanwhile. Nobody rests while
//! there is nobody else: what refuses everybody will end, and then somebody must be there.

use std::{collections::HashMap, time::Duration};

use birb_nest_core::{Backoff, Shard};
use tokio::time::Instant;

/// A shard that was owned this long failed for a new reason: its backoff starts over.
const SETTLED: Duration = Duration::from_secs(30);
/// Failures of one shard in a row, while the worker stored nothing at all, that make it rest: some seconds of them.
const FRUITLESS: u32 = 5;
/// The first rest, and the longest. Coming back costs the others a few seconds of each shard that it takes.
const REST: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(600));

pub struct Failures {
    shards: HashMap<Shard, Failing>,
    rests: Backoff,
    rests_until: Option<Instant>,
}

struct Failing {
    backoff: Backoff,
    until: Instant,
    n_fruitless: u32,
    /// Batches that the worker had stored when it failed last.
    n_stored: u64,
}

impl Failures {
    pub fn new() -> Self {
        Self {
            shards: HashMap::new(),
            rests: Backoff::new(REST.0, REST.1),
            rests_until: None,
        }
    }

    /// `shard` was lost at `now` after it was `owned_for` some time, and the worker has stored `n_stored` batches in its
    /// life; returns how long the shard is left alone.
    pub fn add(
        &mut self,
        shard: Shard,
        now: Instant,
        owned_for: Duration,
        n_stored: u64,
    ) -> Duration {
        let failing = self.shards.entry(shard).or_insert_with(|| Failing {
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(10)),
            until: now,
            n_fruitless: 0,
            n_stored,
        });
        if owned_for > SETTLED {
            failing.backoff.succeed();
        }
        if owned_for > SETTLED || failing.n_stored != n_stored {
            failing.n_fruitless = 0;
            self.rests.succeed();
        }
        failing.n_stored = n_stored;
        failing.n_fruitless += 1;
        let wait = failing.backoff.fail(rand::random());
        failing.until = now + wait;
        wait
    }

    /// `shard` was given up in good order.
    pub fn forget(&mut self, shard: Shard) {
        self.shards.remove(&shard);
    }

    /// Whether `shard` is not to be tried at `now`.
    pub fn keep_off(&self, shard: Shard, now: Instant) -> bool {
        self.shards
            .get(&shard)
            .is_some_and(|failing| failing.until > now)
    }

    /// Whether the worker fails and fails, and should leave its share to others.
    pub fn are_fruitless(&self) -> bool {
        self.shards
            .values()
            .any(|failing| failing.n_fruitless >= FRUITLESS)
    }

    /// Begins a rest at `now`; returns how long it takes.
    pub fn begin_rest(&mut self, now: Instant) -> Duration {
        self.shards.clear();
        let rest = self.rests.fail(rand::random());
        self.rests_until = Some(now + rest);
        rest
    }

    /// Ends the rest: there is nobody else.
    pub fn end_rest(&mut self) {
        self.rests_until = None;
    }

    /// Whether the worker rests at `now`.
    pub fn is_resting(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn only_who_stores_nothing_at_all_rests() {
        let now = Instant::now();
        let (one, two) = (Shard::from_index(1), Shard::from_index(2));
        let mut failures = Failures::new();
        for n_stored in 0..20 {
            failures.add(one, now, MOMENT, n_stored);
        }
        assert!(!failures.are_fruitless(), "it stores others meanwhile");
        for _ in 0..3 {
            failures.add(one, now, MOMENT, 20);
            failures.add(two, now, MOMENT, 20);
        }
        assert!(
            !failures.are_fruitless(),
            "a moment's failure hits all shards"
        );
        failures.add(one, now, MOMENT, 20);
        failures.add(one, now, MOMENT, 20);
        assert!(failures.are_fruitless());
        assert!(failures.keep_off(one, now));
        let rest = failures.begin_rest(now);
        assert!(failures.is_resting(now) && !failures.is_resting(now + rest));
        assert!(!failures.are_fruitless(), "it gets another chance");
        assert!(
            failures.begin_rest(now) >= REST.0,
            "the next rest is longer"
        );
        for _ in 0..20 {
            failures.add(two, now, 2 * SETTLED, 20);
        }
        assert!(!failures.are_fruitless(), "it had nothing to store");
    }
}
