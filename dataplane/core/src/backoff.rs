//! How long to wait before trying again.

use std::time::Duration;

/// Exponential backoff with jitter: between half and all of `first` doubled per failure, never above `max`.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    n_failures: u32,
}

impl Backoff {
    /// Waits start at `first` and end at `max`.
    #[must_use]
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self {
            first,
            max,
            n_failures: 0,
        }
    }

    /// The wait after one more failure; `random` is uniform in 0.0..1.0.
    pub fn fail(&mut self, random: f64) -> Duration {
        let ceiling = self
            .first
            .saturating_mul(2u32.saturating_pow(self.n_failures))
            .min(self.max);
        self.n_failures = self.n_failures.saturating_add(1);
        ceiling.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// Failures since the last success.
    #[must_use]
    pub const fn n_failures(&self) -> u32 {
        self.n_failures
    }

    /// Starts over, after a success.
    pub const fn succeed(&mut self) {
        self.n_failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_ceiling_and_starts_over() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        let waits: Vec<_> = (0..6).map(|_| backoff.fail(1.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        backoff.succeed();
        assert_eq!(backoff.fail(0.0), Duration::from_millis(50));
    }

    proptest::proptest! {
        #[test]
        fn never_outside_its_bounds(failures in 0u32..100, random in 0.0f64..1.0) {
            let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_secs(30));
            for _ in 0..failures { backoff.fail(0.5); }
            let wait = backoff.fail(random);
            proptest::prop_assert!(wait >= Duration::from_millis(5) && wait <= Duration::from_secs(30));
        }
    }
}
