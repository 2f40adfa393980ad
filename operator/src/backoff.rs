//! How long to wait after a pass that failed: each nest for itself, twice as long after each failure.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::Rng;

/// Pause after the first failed pass.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after many failed passes.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// Passes that failed in a row, by the nest's uid.
#[derive(Default)]
pub struct Backoff(Mutex<HashMap<String, Failures>>);

struct Failures {
    generation: Option<i64>,
    count: u32,
}

impl Backoff {
    /// A pass over this `generation` of the nest failed; how long the next one should wait: 1 s, 2 s, 4 s and so on to
    /// 5 min, less up to a quarter. A new generation begins anew: somebody may have mended it.
    pub fn failed(&self, nest: &str, generation: Option<i64>) -> Duration {
        let mut nests = self.lock();
        let failures = nests.entry(nest.to_owned()).or_insert(Failures {
            generation,
            count: 0,
        });
        if failures.generation != generation {
            *failures = Failures {
                generation,
                count: 0,
            };
        }
        failures.count += 1;
        pause(failures.count)
    }

    /// A pass over the nest succeeded, or it is gone.
    pub fn forget(&self, nest: &str) {
        self.lock().remove(nest);
    }

    /// Forgets all nests but these.
    pub fn keep(&self, nests: &HashSet<String>) {
        self.lock().retain(|nest, _| nests.contains(nest));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Failures>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pause(failures: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(16));
    doubled
        .min(LONGEST_PAUSE)
        .mul_f64(rand::rng().random_range(0.75..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_about(pause: Duration, seconds: u64) -> bool {
        let expected = Duration::from_secs(seconds);
        pause <= expected && pause >= expected.mul_f64(0.74)
    }

    #[test]
    fn pauses_grow_and_end() {
        let backoff = Backoff::default();
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            let pause = backoff.failed("nest", Some(1));
            assert!(is_about(pause, seconds), "{pause:?}, not {seconds} s");
        }
        // No overflow, however long it goes on.
        for _ in 0..100 {
            assert!(is_about(backoff.failed("nest", Some(1)), 300));
        }
    }

    #[test]
    fn success_and_a_new_generation_begin_anew_each_nest_for_itself() {
        let backoff = Backoff::default();
        for _ in 0..5 {
            backoff.failed("nest", Some(1));
        }
        assert!(is_about(backoff.failed("other", Some(1)), 1));
        assert!(is_about(backoff.failed("nest", Some(2)), 1));
        assert!(is_about(backoff.failed("nest", Some(2)), 2));
        backoff.forget("nest");
        assert!(is_about(backoff.failed("nest", Some(2)), 1));
        backoff.keep(&HashSet::from(["other".to_owned()]));
        assert_eq!(backoff.lock().len(), 1);
    }
}
