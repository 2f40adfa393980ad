//! One idea of now for all processes of a nest: PostgreSQL's.
//!
//! Entries expire by comparing instants that different machines wrote, so a machine whose clock is wrong would hide
//! or revive them. Each process therefore counts with its own monotonic clock and learns once, and again every few
//! seconds, how that relates to PostgreSQL's `clock_timestamp()` (until it was reached, to Redis's `TIME`, or to the time of
//! NATS: without one of the three nothing is written).

use std::{
    sync::atomic::{AtomicI64, AtomicU8, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use birb_nest_core::Timestamp;

use crate::sabotage::{Mistake, makes};

/// An answer that took longer says too little about the time.
const QUICK: Duration = Duration::from_millis(100);
/// Steps back by less than this, in microseconds, are not made.
const LITTLE: i64 = 1_000_000;

/// Whose time the clock follows, worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Source {
    /// This machine's wall clock: nothing better was reached yet.
    Own = 0,
    /// The NATS server's: learned before the first write through it.
    Nats = 1,
    /// The Redis server's.
    Redis = 2,
    /// The PostgreSQL server's.
    Postgres = 3,
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
    /// A better source is never replaced by a worse one. The error is at most half of the time the answer took, so of a
    /// source that is followed already only quick answers count. The clock does not step back by little: what was gone
    /// would return. A large step back means that the clock was wrong; it is made, and logged.
    pub fn learn(&self, source: Source, shown: Timestamp, asked: Instant) {
        let followed = self.source.load(Ordering::Relaxed);
        let took = asked.elapsed();
        if (source as u8) < followed || ((source as u8) == followed && took > QUICK) {
            return;
        }
        let half = i64::try_from(took.as_micros() / 2).unwrap_or(i64::MAX);
        let offset = shown.as_micros() + half - self.elapsed();
        let back = self.offset.load(Ordering::Relaxed) - offset;
        self.source.store(source as u8, Ordering::Relaxed);
        if makes(Mistake::OwnClock) {
            return;
        }
        if back >= LITTLE && followed != Source::Own as u8 {
            tracing::error!(
                seconds = back as f64 / 1e6,
                ?source,
                "the clock that is followed went back"
            );
        }
        if back <= 0 || back >= LITTLE {
            self.offset.store(offset, Ordering::Relaxed);
        }
        if (source as u8) > followed {
            let ahead_seconds = self.skew_seconds();
            tracing::info!(
                ?source,
                ahead_seconds,
                "following the clock of another server"
            );
        }
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

    #[test]
    fn little_steps_back_are_not_made_and_large_ones_are() {
        let clock = Clock::new();
        let start = clock.now();
        clock.learn(
            Source::Postgres,
            start.after(Duration::from_secs(10)),
            Instant::now(),
        );
        let before = clock.now();
        clock.learn(
            Source::Postgres,
            start.after(Duration::from_millis(9_500)),
            Instant::now(),
        );
        assert!(clock.now() >= before);
        clock.learn(Source::Postgres, start, Instant::now());
        assert!(clock.now() < before);
        let asked = Instant::now() - Duration::from_secs(1);
        let before = clock.now();
        clock.learn(
            Source::Postgres,
            start.after(Duration::from_secs(99)),
            asked,
        );
        assert!(
            clock.now().since(before) < Duration::from_secs(1),
            "the answer took too long to count"
        );
    }
}
