//! One idea of now for all processes of a nest: PostgreSQL's.
//!
//! Entries expire by comparing instants that different machines wrote, so a machine whose clock is wrong would hide
//! or revive them. Each process therefore counts with its own monotonic clock and learns once, and again every few
//! seconds, how that relates to PostgreSQL's `clock_timestamp()` (or Redis's `TIME`, until PostgreSQL was reached).

use std::{
    sync::atomic::{AtomicI64, AtomicU8, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use birb_nest_core::Timestamp;

/// Whose time the clock follows, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Source {
    /// This machine's wall clock: nothing better was reached yet.
    Own = 0,
    /// The Redis server's.
    Redis = 1,
    /// The PostgreSQL server's.
    Postgres = 2,
}

/// A monotonic clock that shows a server's time.
#[derive(Debug)]
pub struct Clock {
    started: Instant,
    /// Microseconds from `started` to the epoch of the followed clock.
    offset: AtomicI64,
    own_offset: i64,
    source: AtomicU8,
}

impl Clock {
    /// A clock that shows this machine's time until it learns better.
    #[must_use]
    pub fn new() -> Self {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or(Duration::ZERO);
        let own_offset = i64::try_from(wall.as_micros()).unwrap_or(0);
        Self {
            started: Instant::now(),
            offset: AtomicI64::new(own_offset),
            own_offset,
            source: AtomicU8::new(Source::Own as u8),
        }
    }

    /// The instant it is now.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp::from_micros(self.elapsed() + self.offset.load(Ordering::Relaxed))
    }

    /// Follows `source`, which said that it is `shown` somewhere between `asked` and now.
    ///
    /// A better source is never replaced by a worse one. The error is at most half of the time the answer took.
    pub fn learn(&self, source: Source, shown: Timestamp, asked: Instant) {
        if (source as u8) < self.source.load(Ordering::Relaxed) {
            return;
        }
        let took = i64::try_from(asked.elapsed().as_micros()).unwrap_or(i64::MAX);
        let offset = shown.as_micros() + took / 2 - self.elapsed();
        self.offset.store(offset, Ordering::Relaxed);
        self.source.store(source as u8, Ordering::Relaxed);
    }

    /// How far the followed clock is ahead of what this machine's showed when the process started, in seconds.
    #[must_use]
    pub fn skew_seconds(&self) -> f64 {
        (self.offset.load(Ordering::Relaxed) - self.own_offset) as f64 / 1e6
    }

    fn elapsed(&self) -> i64 {
        i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_better_source() {
        let clock = Clock::new();
        let hour = Duration::from_secs(3600);
        let own = clock.now();
        clock.learn(Source::Postgres, own.after(hour), Instant::now());
        assert!(clock.now().since(own) >= hour);
        assert!((clock.skew_seconds() - 3600.0).abs() < 1.0);
        clock.learn(Source::Redis, own, Instant::now());
        assert!(
            clock.now().since(own) >= hour,
            "Redis does not overrule PostgreSQL"
        );
    }
}
