//! Waiting until a write is in PostgreSQL.

use std::time::Duration;

use birb_nest_core::{Key, Shard, Version};
use tokio::time::{Instant, interval_at, timeout};

use super::{Inner, Nest};
use crate::jetstream::Announcements;

/// How often PostgreSQL is asked itself, lest an announcement was lost.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// Waits for writes of one shard.
pub struct Progress {
    nest: Nest,
    shard: Shard,
    announcements: Option<Announcements>,
    applied_to: Option<Version>,
}

/// How far PostgreSQL has stored all shards, and when it was asked: one question serves all who wait.
#[derive(Default)]
pub(super) struct Stored {
    asked: Option<Instant>,
    applied_to: Vec<Version>,
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
            applied_to: None,
        }
    }
}

impl Inner {
    /// How far PostgreSQL has stored `shard`, as it said not long ago.
    async fn stored_lately(&self, shard: Shard) -> Option<Version> {
        let mut stored = self.stored.lock().await;
        if stored
            .asked
            .is_none_or(|asked| asked.elapsed() >= ASK_EVERY)
        {
            // Those who wait behind the lock find an answer, or that there is none.
            stored.asked = Some(Instant::now());
            if let Some(applied_to) = self.database.applied_to().await {
                stored.applied_to = applied_to;
            }
        }
        stored.applied_to.get(shard.index()).copied()
    }
}

impl Progress {
    /// Waits until PostgreSQL has stored everything up to `version`, for at most `limit`; tells whether it has.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn reaches(&mut self, version: Version, limit: Duration) -> bool {
        timeout(limit, async {
            let mut ask = interval_at(Instant::now() + ASK_EVERY, ASK_EVERY);
            while self.applied_to < Some(version) {
                let applied_to = tokio::select! {
                    announced = next(&mut self.announcements) => announced,
                    _ = ask.tick() => self.nest.0.stored_lately(self.shard).await,
                };
                self.applied_to = self.applied_to.max(applied_to);
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
