//! Writes that Redis could not be told of: their keys are remembered here until what is older has been deleted.
//!
//! A repair only deletes. Installing the value late would race with newer writes for nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use birb_nest_core::{Backoff, Key, Version};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::Inner;
use crate::metrics::METRICS;

/// Beyond this many, further keys are left to the worker, who deletes what is older after its commit.
const MOST: usize = 100_000;
/// Keys per call.
const AT_ONCE: usize = 500;

/// The keys to repair.
#[derive(Default)]
pub(super) struct Repairs {
    keys: Mutex<HashMap<Key, Version>>,
    added: Notify,
}

impl Repairs {
    pub fn add(&self, key: Key, version: Version) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= MOST && !keys.contains_key(&key) {
            METRICS.error("redis_repair_overflow");
            return;
        }
        let newest = keys.entry(key).or_insert(version);
        *newest = version.max(*newest);
        METRICS.repairs_pending(keys.len());
        drop(keys);
        self.added.notify_one();
    }

    fn some(&self) -> Vec<(Key, Version)> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        keys.iter()
            .take(AT_ONCE)
            .map(|(key, version)| (key.clone(), *version))
            .collect()
    }

    fn done(&self, repaired: &[(Key, Version)]) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, version) in repaired {
            if keys.get(key).is_some_and(|newest| newest <= version) {
                keys.remove(key);
            }
        }
        METRICS.repairs_pending(keys.len());
    }
}

/// Repairs until `stop`.
pub(super) async fn run(cache: Arc<Inner>, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let some = cache.repairs.some();
        if some.is_empty() {
            tokio::select! {
                () = cache.repairs.added.notified() => continue,
                () = stop.cancelled() => return,
            }
        }
        match cache.forget(&some).await {
            Ok(()) => {
                backoff.succeed();
                cache.repairs.done(&some);
                tracing::debug!(
                    n_keys = some.len(),
                    "repaired Redis: it has nothing older any more than what it was not told of"
                );
            }
            Err(error) => {
                tracing::debug!(%error, n_keys = some.len(), "repair of Redis waits");
                tokio::select! {
                    () = tokio::time::sleep(backoff.fail(rand::random())) => {}
                    () = stop.cancelled() => return,
                }
            }
        }
    }
}
