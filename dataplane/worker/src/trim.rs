//! Which messages may leave the log: those that are stored, and of which Redis was told.
//!
//! A message stays for `LOG_TRIM_LAG` after it was stored, so that a PostgreSQL that lost its newest commits can read
//! them again; unless the log would fill up, then half of its size is what stays at most.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use birb_nest_core::Version;

/// Remembers when the shard got how far, coarsely.
#[derive(Debug)]
pub struct Trim {
    lag: Duration,
    grain: Duration,
    marks: VecDeque<(Instant, Version)>,
    /// Up to where messages may be dropped.
    due_to: Version,
    /// Up to where they were.
    trimmed_to: Version,
}

impl Trim {
    /// Nothing is known to be stored yet. `interval` is how often [`Trim::due`] is asked.
    pub fn new(lag: Duration, interval: Duration) -> Self {
        Self {
            lag,
            // Finer marks than trims would only cost memory.
            grain: interval / 4,
            marks: VecDeque::new(),
            due_to: Version::ZERO,
            trimmed_to: Version::ZERO,
        }
    }

    /// Everything up to `through` is stored, and told to Redis, since `now`.
    pub fn stored(&mut self, now: Instant, through: Version) {
        match self.marks.back_mut() {
            Some((at, newest)) if now.duration_since(*at) < self.grain => {
                *newest = through;
            }
            _ => self.marks.push_back((now, through)),
        }
    }

    /// Up to where messages may be dropped now, until [`Trim::done`] says that they were. `crowded`: the log is more than
    /// half full.
    pub fn due(&mut self, now: Instant, crowded: bool) -> Option<Version> {
        // A mark's last message was stored up to a grain after its time.
        let kept = self.lag + self.grain;
        while let Some(&(at, version)) = self.marks.front() {
            if !crowded && now.duration_since(at) < kept {
                break;
            }
            self.due_to = version;
            self.marks.pop_front();
        }
        (self.due_to > self.trimmed_to).then_some(self.due_to)
    }

    /// Messages were dropped up to `through`.
    pub fn done(&mut self, through: Version) {
        self.trimmed_to = through;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: u64) -> Version {
        Version::new(number).expect("small")
    }

    #[test]
    fn a_message_stays_for_the_lag() {
        let (lag, interval) = (Duration::from_secs(30), Duration::from_secs(4));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut trim = Trim::new(lag, interval);
        trim.stored(at(0), version(10));
        trim.stored(at(10), version(20));
        assert_eq!(trim.due(at(29), false), None);
        assert_eq!(trim.due(at(31), false), Some(version(10)));
        trim.done(version(10));
        assert_eq!(trim.due(at(32), false), None, "nothing new");
        assert_eq!(trim.due(at(60), false), Some(version(20)));
    }

    #[test]
    fn what_was_not_trimmed_stays_due_though_nothing_is_stored_any_more() {
        let mut trim = Trim::new(Duration::from_secs(30), Duration::from_secs(4));
        let now = Instant::now();
        trim.stored(now, version(10));
        assert_eq!(trim.due(now, true), Some(version(10)));
        assert_eq!(trim.due(now, true), Some(version(10)), "it failed");
        assert_eq!(trim.due(now, false), Some(version(10)), "it failed again");
        trim.done(version(10));
        assert_eq!(trim.due(now, true), None);
    }

    #[test]
    fn a_crowded_log_keeps_nothing_that_is_stored() {
        let mut trim = Trim::new(Duration::from_secs(30), Duration::from_secs(4));
        let now = Instant::now();
        trim.stored(now, version(10));
        trim.stored(now, version(11));
        assert_eq!(trim.due(now, true), Some(version(11)));
    }

    #[test]
    fn no_message_leaves_before_its_lag_is_over_and_marks_stay_few() {
        let (lag, interval) = (Duration::from_secs(30), Duration::from_secs(4));
        let start = Instant::now();
        let mut trim = Trim::new(lag, interval);
        let mut stored_at = std::collections::BTreeMap::new();
        for step in 0..10_000u64 {
            let now = start + Duration::from_millis(step * 10);
            trim.stored(now, version(step + 1));
            stored_at.insert(step + 1, now);
            if step % 400 == 0
                && let Some(through) = trim.due(now, false)
            {
                let since = now.duration_since(stored_at[&through.get()]);
                assert!(since >= lag, "{since:?}");
                trim.done(through);
            }
            assert!(trim.marks.len() < 60, "{}", trim.marks.len());
        }
        assert!(trim.trimmed_to > Version::ZERO);
    }
}
