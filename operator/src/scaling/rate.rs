//! How fast a worker stores, learnt from what is read anyway. Pure.

use std::time::Duration;

/// What the consumers of all shards said at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Messages that are not stored yet, those included that are under way.
    pub backlog: u64,
    /// Deliveries of each shard's consumer that were acknowledged since it was made.
    pub stored: Vec<u64>,
}

/// The rate of one worker, and what it is learnt from.
#[derive(Clone, Debug, Default)]
pub struct Rates {
    last: Option<(Duration, Reading)>,
    per_worker: Option<f64>,
}

impl Rates {
    /// Messages per second, once it was seen.
    pub fn per_worker(&self) -> Option<f64> {
        self.per_worker
    }

    /// Learns from `reading` at `now`, up to which `workers` were at work.
    ///
    /// Only from times in which nobody lacked work: at both ends at least as much was waiting as was stored in between. A
    /// worker that takes a shard makes its consumer anew, which then counts from 0: that says nothing. Nor does a time in
    /// which nothing was stored: then it is not workers that are missing.
    pub fn observe(&mut self, reading: Option<&Reading>, workers: i32, now: Duration) {
        let last = std::mem::replace(
            &mut self.last,
            reading.map(|reading| (now, reading.clone())),
        );
        let (Some((then, last)), Some(reading)) = (last, reading) else {
            return;
        };
        let Some(stored) = stored_between(&last, reading) else {
            return;
        };
        let seconds = now.saturating_sub(then).as_secs_f64();
        let was_busy = stored > 0 && last.backlog.min(reading.backlog) >= stored;
        if was_busy && workers > 0 && seconds > 0.0 {
            let rate = stored as f64 / seconds / f64::from(workers);
            self.per_worker = Some(self.per_worker.map_or(rate, |before| (before + rate) / 2.0));
        }
    }
}

fn stored_between(last: &Reading, next: &Reading) -> Option<u64> {
    if last.stored.len() != next.stored.len() {
        return None;
    }
    let shards = last.stored.iter().zip(&next.stored);
    shards
        .map(|(before, after)| after.checked_sub(*before))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(backlog: u64, stored: &[u64]) -> Reading {
        Reading {
            backlog,
            stored: stored.to_vec(),
        }
    }

    /// What is learnt of 2 workers from two readings 10 s apart.
    fn learnt(first: Reading, second: Option<Reading>) -> Option<f64> {
        let mut rates = Rates::default();
        rates.observe(Some(&first), 2, Duration::from_secs(5));
        rates.observe(second.as_ref(), 2, Duration::from_secs(15));
        rates.per_worker()
    }

    #[test]
    fn busy_workers_show_their_rate() {
        let first = reading(9_000, &[100, 50]);
        assert_eq!(
            learnt(first.clone(), Some(reading(8_000, &[600, 550]))),
            Some(50.0)
        );
        for (what, second) in [
            ("idle", Some(reading(10, &[600, 550]))),
            ("a consumer is new", Some(reading(8_000, &[600, 0]))),
            ("other shards", Some(reading(8_000, &[600]))),
            ("PostgreSQL is down", Some(reading(9_500, &[100, 50]))),
            ("unknown", None),
        ] {
            assert_eq!(learnt(first.clone(), second), None, "{what}");
        }
    }

    #[test]
    fn a_gap_is_no_interval_and_forgets_nothing() {
        let mut rates = Rates::default();
        let at = Duration::from_secs;
        rates.observe(Some(&reading(9_000, &[0])), 1, at(0));
        rates.observe(Some(&reading(9_000, &[1_000])), 1, at(10));
        rates.observe(None, 1, at(20));
        rates.observe(Some(&reading(9_000, &[5_000])), 1, at(30));
        assert_eq!(rates.per_worker(), Some(100.0));
        rates.observe(Some(&reading(9_000, &[7_000])), 1, at(40));
        assert_eq!(rates.per_worker(), Some(150.0), "half of it is the past");
    }
}
