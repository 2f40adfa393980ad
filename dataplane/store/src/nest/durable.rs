//! Waiting until a write is in PostgreSQL.

use std::{pin::pin, time::Duration};

use birb_nest_core::{Key, Shard, Version};
use tokio::time::{Instant, sleep, timeout};

use super::{Inner, Nest};
use crate::jetstream::{Announcements, Stored};

/// How often PostgreSQL is asked itself, lest an announcement was lost.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Waits for writes of one shard.
pub struct Progress {
    nest: Nest,
    shard: Shard,
    announcements: Option<Announcements>,
    stored: Option<Stored>,
}

/// How far PostgreSQL has stored all shards, and when it was asked: one question serves all who wait.
#[derive(Default)]
pub(super) struct Lately {
    asked: Option<Instant>,
    stored: Vec<Stored>,
}

impl Nest {
    /// The shard that `key` belongs to.
    #[must_use]
    pub fn shard_of(&self, key: &Key) -> Shard {
        self.0.shard_of(key)
    }

    /// Begins to listen how far `shard` is stored. Call it before the writes.
    pub async fn progress_of(&self, shard: Shard) -> Progress {
        let announcements = match self.0.log.session() {
            Some(session) => session.announcements(shard).await,
            None => None,
        };
        Progress {
            nest: self.clone(),
            shard,
            announcements,
            stored: None,
        }
    }
}

impl Inner {
    /// How far PostgreSQL has stored `shard`, as it said not long ago.
    async fn stored_lately(&self, shard: Shard) -> Option<Stored> {
        let mut lately = self.lately.lock().await;
        if lately
            .asked
            .is_none_or(|asked| asked.elapsed() >= ASK_EVERY)
        {
            // For those who wait behind the lock, should nobody wait for this answer any more.
            lately.asked = Some(Instant::now());
            if let Some(stored) = self.database.stored().await {
                lately.stored = stored;
            }
            // However long it took, they find it, or that there is none, and do not ask one after the other.
            lately.asked = Some(Instant::now());
        }
        lately.stored.get(shard.index()).copied()
    }
}

impl Progress {
    /// Waits until PostgreSQL has stored the write that has this version, for at most `limit`; tells whether it has. Once its
    /// shard lives another life that is not known.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn reaches(&mut self, version: Version, limit: Duration) -> bool {
        let (nest, shard) = (self.nest.clone(), self.shard);
        let ask = || async {
            sleep(ASK_EVERY).await;
            nest.0.stored_lately(shard).await
        };
        let waiting = async {
            // PostgreSQL may take long to answer: announcements are heard meanwhile.
            let mut asked = pin!(ask());
            loop {
                match self.stored {
                    Some(stored) if stored.has(version) => return true,
                    Some(stored) if stored.base.get() > version.get() => return false,
                    _ => {}
                }
                let stored = tokio::select! {
                    announced = next(&mut self.announcements) => announced,
                    answer = &mut asked => {
                        asked.set(ask());
                        answer
                    }
                };
                // The one comes by another way than the other: what is older may come last.
                let place = |stored: &Stored| (stored.base, stored.applied_to);
                self.stored = self.stored.into_iter().chain(stored).max_by_key(place);
            }
        };
        timeout(limit, waiting).await.unwrap_or(false)
    }
}

/// The next announcement; never comes when there is nobody to hear it from, or no more.
async fn next(announcements: &mut Option<Announcements>) -> Option<Stored> {
    let Some(listened) = announcements else {
        return std::future::pending().await;
    };
    let announced = listened.next().await;
    if announced.is_none() {
        *announcements = None;
    }
    announced
}
