//! What every pass is given.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use kube::{
    Client,
    runtime::events::{Recorder, Reporter},
};
use rand::Rng;

use crate::{
    config::Config,
    error::{Error, Result},
    leader::Term,
    render::CONTROLLER,
    scaling::Scaling,
};

/// Shared by all passes.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// Where events go.
    pub recorder: Recorder,
    /// Flags.
    pub config: Config,
    /// Nests whose workers follow the lag.
    pub scaling: Arc<Scaling>,
    /// Until when this process may write.
    term: Term,
    /// Passes of a nest that failed in a row, by uid.
    failures: Mutex<HashMap<String, u32>>,
}

/// Pause after the first failed pass.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after many failed passes.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

impl Context {
    /// For this process.
    pub fn new(client: Client, config: Config, holder: &str, term: Term) -> Self {
        let reporter = Reporter {
            controller: CONTROLLER.to_owned(),
            instance: Some(holder.to_owned()),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            config,
            scaling: Arc::default(),
            term,
            failures: Mutex::default(),
        }
    }

    /// Asked before each write.
    ///
    /// # Errors
    /// [`Error::NotLeading`].
    pub fn may_write(&self) -> Result<()> {
        if self.term.holds() {
            Ok(())
        } else {
            Err(Error::NotLeading)
        }
    }

    /// Forgets that passes of this nest have failed.
    pub fn succeeded(&self, uid: &str) {
        self.failures().remove(uid);
    }

    /// How long the next pass of this nest should wait: twice as long after each failure, each nest for itself.
    pub fn failed(&self, uid: &str) -> Duration {
        let mut failures = self.failures();
        let count = failures.entry(uid.to_owned()).or_default();
        *count += 1;
        pause(*count)
    }

    /// The resync interval, give or take a tenth, so that nests do not move in step.
    pub fn resync(&self) -> Duration {
        self.config
            .resync
            .mul_f64(rand::rng().random_range(0.9..1.1))
    }

    fn failures(&self) -> std::sync::MutexGuard<'_, HashMap<String, u32>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// 1 s, 2 s, 4 s and so on to 5 min, less up to a quarter.
fn pause(failures: u32) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(16));
    doubled
        .min(LONGEST_PAUSE)
        .mul_f64(rand::rng().random_range(0.75..1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        for failures in 1..40 {
            let expected = Duration::from_secs(1 << (failures - 1).min(16)).min(LONGEST_PAUSE);
            let pause = pause(failures);
            assert!(
                pause <= expected && pause >= expected.mul_f64(0.74),
                "{failures}: {pause:?}"
            );
        }
    }
}
