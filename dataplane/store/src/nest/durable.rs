//! Waiting until a write is in PostgreSQL.

use std::time::Duration;

use birb_nest_core::{Key, Shard, Version};
use tokio::time::{Instant, interval_at, timeout};

use super::Nest;
use crate::jetstream::Announcements;

/// How often PostgreSQL is asked itself, lest an announcement was lost.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Waits for one write of a key.
pub struct Progress {
    nest: Nest,
    shard: Shard,
    announcements: Option<Announcements>,
}

impl Nest {
    /// Begins to listen how far the shard of `key` is stored. Call it before the write.
    pub async fn progress(&self, key: &Key) -> Progress {
        self.progress_of(self.0.shard_of(key)).await
    }

    /// Begins to listen how far `shard` is stored.
    pub(super) async fn progress_of(&self, shard: Shard) -> Progress {
        let announcements = match self.0.log.session() {
            Some(session) => session.announcements(shard).await,
            None => None,
        };
        Progress {
            nest: self.clone(),
            shard,
            announcements,
        }
    }
}

impl Progress {
    /// Waits until PostgreSQL has stored everything up to `version`, for at most `limit`; tells whether it has.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn reaches(mut self, version: Version, limit: Duration) -> bool {
        timeout(limit, async {
            let mut ask = interval_at(Instant::now() + ASK_EVERY, ASK_EVERY);
            loop {
                let applied_to = tokio::select! {
                    announced = next(&mut self.announcements) => announced,
                    _ = ask.tick() => {
                        let all = self.nest.0.database.applied_to().await;
                        all.and_then(|all| all.get(self.shard.index()).copied())
                    }
                };
                if applied_to.is_some_and(|applied_to| applied_to >= version) {
                    return;
                }
            }
        })
        .await
        .is_ok()
    }
}

/// The next announcement; never comes when there is nobody to hear it from, or no more.
async fn next(announcements: &mut Option<Announcements>) -> Option<Version> {
    let Some(listened) = announcements else {
        return std::future::pending().await;
    };
    let announced = listened.next().await;
    if announced.is_none() {
        *announcements = None;
    }
    announced
}
