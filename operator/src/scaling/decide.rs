//! How many workers there should be. Pure: what was before comes in and goes out, and so does the time.
//!
//! ```text
//! demand = max(backlog / targetLag, backlog / (rate of a worker * drainSeconds))
//! ```
//! The number follows `demand`, rounded up, within its bounds: upwards at once, by at most a doubling (or [`STEP`] workers,
//! if that is more) per reading; downwards only to the highest number that was wanted within the window.

use std::{collections::VecDeque, time::Duration};

/// A demand that is this close to the number of workers (one tenth) does not change it.
const TOLERANCE: f64 = 0.1;
/// So many workers may be added at once, however few there are.
const STEP: i32 = 4;

/// What a nest asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Fewest workers, at least 1.
    pub min: i32,
    /// Most workers.
    pub max: i32,
    /// Shards of the log: more workers than that have nothing to do, whatever `min` and `max` say.
    pub shards: i32,
    /// Backlog for which one worker is enough, in messages.
    pub target_lag: i32,
    /// How soon a backlog should be stored.
    pub drain: Duration,
    /// A backlog up to this is no reason for more than `min`.
    pub activation_lag: i32,
    /// How far back a higher demand still counts.
    pub window: Duration,
    /// Shortest time between a change and the next lowering.
    pub cooldown: Duration,
}

impl Policy {
    /// Of a number that somebody else says.
    pub fn standing(workers: i32, shards: i32) -> Self {
        Self {
            min: workers.max(1),
            max: workers.max(1),
            shards,
            target_lag: 1,
            drain: Duration::from_secs(1),
            activation_lag: 0,
            window: Duration::ZERO,
            cooldown: Duration::ZERO,
        }
    }

    fn upper(&self) -> i32 {
        self.max.min(self.shards)
    }

    /// The nearest number within the bounds.
    pub fn clamp(&self, workers: i32) -> i32 {
        workers.max(self.min).min(self.upper())
    }
}

/// What is known of the log now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sight {
    /// Messages that are not stored yet; none if it is not known of every shard.
    pub backlog: Option<u64>,
    /// Messages per second that one worker stores when it has enough to do, once that was seen.
    pub rate: Option<f64>,
}

/// What the next decision needs of those before.
#[derive(Clone, Debug, PartialEq)]
pub struct Memory {
    /// How many workers there should be.
    pub workers: i32,
    /// What was wanted when, newest last; only numbers above all that came after them, so at most one per worker.
    wanted: VecDeque<(Duration, i32)>,
    /// When the number changed last.
    changed: Option<Duration>,
}

impl Memory {
    /// Of one who knows only that there are `workers`. It may not lower their number before a whole window was seen.
    pub fn new(workers: i32, now: Duration) -> Self {
        Self {
            workers,
            wanted: [(now, workers)].into(),
            changed: None,
        }
    }

    /// Notes what is wanted now; returns the highest number that was within the window.
    fn highest(&mut self, wanted: i32, window: Duration, now: Duration) -> i32 {
        while self.wanted.back().is_some_and(|(_, less)| *less <= wanted) {
            self.wanted.pop_back();
        }
        while self
            .wanted
            .front()
            .is_some_and(|(at, _)| now.saturating_sub(*at) >= window)
        {
            self.wanted.pop_front();
        }
        self.wanted.push_back((now, wanted));
        self.wanted[0].1
    }
}

/// Why there are not as many workers as the lag alone asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hold {
    /// There are.
    None,
    /// The lag is not known.
    Unknown,
    /// The difference is too small.
    Tolerance,
    /// More were wanted a short while ago.
    Window,
    /// The last change is too fresh.
    Cooldown,
    /// More follow with the next reading.
    Step,
    /// `maxReplicas`.
    Max,
    /// Each shard has a worker.
    Shards,
}

impl Hold {
    /// For the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Unknown => "unknown",
            Self::Tolerance => "tolerance",
            Self::Window => "window",
            Self::Cooldown => "cooldown",
            Self::Step => "step",
            Self::Max => "max",
            Self::Shards => "shards",
        }
    }
}

/// Decides at `now`, which runs from any fixed moment on and never back.
///
/// An unknown backlog changes nothing, but that bounds are kept. What is held meanwhile counts as wanted, so that a whole
/// window passes after it before the number goes down.
pub fn decide(policy: &Policy, mut memory: Memory, sight: Sight, now: Duration) -> (Memory, Hold) {
    let before = policy.clamp(memory.workers);
    let (wanted, held) = match sight.backlog {
        Some(backlog) => wanted(policy, before, backlog, sight.rate),
        None => (before, Hold::Unknown),
    };
    let highest = policy.clamp(memory.highest(wanted, policy.window, now));
    let is_fresh = memory
        .changed
        .is_some_and(|changed| now.saturating_sub(changed) < policy.cooldown);
    let most = before.saturating_add(before.max(STEP));
    let (next, held) = if wanted > most {
        (most, Hold::Step)
    } else if wanted >= before {
        (wanted, held)
    } else if highest >= before {
        (before, Hold::Window)
    } else if is_fresh {
        (before, Hold::Cooldown)
    } else if highest > wanted {
        (highest, Hold::Window)
    } else {
        (wanted, held)
    };
    if next != memory.workers {
        memory.changed = Some(now);
        memory.workers = next;
    }
    (memory, held)
}

/// What `backlog` asks for when there are `before` workers, within the bounds.
fn wanted(policy: &Policy, before: i32, backlog: u64, rate: Option<f64>) -> (i32, Hold) {
    if backlog <= u64::try_from(policy.activation_lag).unwrap_or(0) {
        return (policy.clamp(0), Hold::None);
    }
    let backlog = backlog as f64;
    let by_lag = backlog / f64::from(policy.target_lag);
    let by_rate = rate.map_or(0.0, |rate| backlog / (rate * policy.drain.as_secs_f64()));
    let demand = by_lag.max(by_rate);
    // Saturates.
    let exact = demand.ceil() as i32;
    let is_close = (demand / f64::from(before) - 1.0).abs() <= TOLERANCE;
    let asked = if is_close { before } else { exact };
    let wanted = policy.clamp(asked);
    let held = if wanted < asked {
        if policy.shards < policy.max {
            Hold::Shards
        } else {
            Hold::Max
        }
    } else if asked != exact {
        Hold::Tolerance
    } else {
        Hold::None
    };
    (wanted, held)
}
