//! A warning that comes once for many events.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between two warnings.
const EVERY: Duration = Duration::from_secs(60);

/// Counts events between warnings, which are a minute apart at least.
#[derive(Debug, Default)]
pub struct Warning(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    n_events: u64,
}

impl Warning {
    /// Notes an event at `now`; returns how many there were since the last warning if it is time for one.
    pub fn note(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.n_events += 1;
        let is_due = state
            .last
            .is_none_or(|last| now.saturating_duration_since(last) >= EVERY);
        is_due.then(|| {
            state.last = Some(now);
            std::mem::take(&mut state.n_events)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_event_is_told_and_then_one_a_minute() {
        let (warning, start) = (Warning::default(), Instant::now());
        let at = |seconds| warning.note(start + Duration::from_secs(seconds));
        assert_eq!(at(0), Some(1));
        assert_eq!([at(1), at(30), at(59)], [None; 3]);
        assert_eq!(at(60), Some(4));
        assert_eq!(at(61), None);
        assert_eq!(at(1000), Some(2));
    }
}
