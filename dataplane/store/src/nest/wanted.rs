//! Keys that a read could not, or did not, put into Redis: the workers are asked to.

use std::{
    collections::HashSet,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use birb_nest_core::Key;
use tokio::sync::Notify;

use super::Nest;
use crate::jetstream::{Refill, Request};

/// How soon workers are asked once more that could not be asked to fill an empty Redis.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// More than this is not remembered.
const MOST: usize = 10_000;

/// How long keys are collected before anybody is asked: more come, and many are the same.
const COLLECT: Duration = Duration::from_secs(1);

/// The keys of large batches that were answered past Redis, and those that nobody could look up because PostgreSQL was
/// down.
#[derive(Default)]
pub(super) struct Wanted {
    keys: Mutex<HashSet<Key>>,
    noted: Notify,
}

impl Wanted {
    pub fn note(&self, some: &[Key]) {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let room = MOST.saturating_sub(keys.len());
        keys.extend(some.iter().take(room).cloned());
        drop(keys);
        self.noted.notify_one();
    }

    fn take(&self) -> Vec<Key> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *keys).into_iter().collect()
    }
}

impl Nest {
    /// Asks the workers to warm Redis when it came back empty, and with what reads want there, once PostgreSQL is up.
    /// Never ends.
    pub(super) async fn ask_for_rehydration(&self) {
        let (mut emptied, mut database) = (self.0.cache.emptied(), self.0.database.up());
        if *emptied.borrow() > 0 {
            // Before anybody could listen.
            emptied.mark_changed();
        }
        loop {
            let requests = tokio::select! {
                changed = emptied.changed() => match changed {
                    // What was written last only PostgreSQL can say.
                    Ok(()) if database.wait_for(|up| *up).await.is_ok() => vec![Request::Everything(Refill::default())],
                    _ => return,
                },
                () = self.0.wanted.noted.notified() => {
                    tokio::time::sleep(COLLECT).await;
                    if database.wait_for(|up| *up).await.is_err() {
                        return;
                    }
                    let keys = self.0.wanted.take();
                    Request::pieces(&keys).map(|keys| Request::Keys(keys.to_vec())).collect()
                }
            };
            for request in &requests {
                self.ask_workers(request).await;
            }
        }
    }

    async fn ask_workers(&self, request: &Request) {
        let mut n_tries = 0u32;
        loop {
            let session = self.0.log.wait_for_session().await;
            let Err(error) = session.ask_rehydration(request).await else {
                tracing::info!(n_keys = request.n_keys(), "asked the workers to warm Redis");
                return;
            };
            // Keys are asked for again when somebody misses them. For an empty Redis nobody asks a second time.
            if !matches!(request, Request::Everything(_)) {
                tracing::warn!(%error, "the workers were not asked to warm Redis; reads will");
                return;
            }
            if n_tries.is_power_of_two() || n_tries == 0 {
                tracing::warn!(%error, "the workers were not asked to warm Redis, which is empty; they will be");
            }
            n_tries = n_tries.saturating_add(1);
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}
