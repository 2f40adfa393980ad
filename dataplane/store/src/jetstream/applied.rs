//! How far a shard is stored, told by its owner to whoever waits for it.
//!
//! Plain messages outside of JetStream: nobody may be listening, and whoever must know asks PostgreSQL as well.

use birb_nest_core::{Base, Shard, Version};
use futures::StreamExt;

use super::Session;
use crate::config::LogConfig;

/// How far a shard is stored, and in which of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Greater than every version of the lives before.
    pub base: Base,
    /// Up to where, or up to where the life began.
    pub applied_to: Version,
}

impl Stored {
    /// Whether PostgreSQL has this write. Of a life that is over, what its log had lost was never stored.
    #[must_use]
    pub fn has(&self, version: Version) -> bool {
        self.base.get() <= version.get() && version <= self.applied_to
    }
}

/// What the owner of one shard says from now on.
pub struct Announcements(async_nats::Subscriber);

impl Session {
    /// Tells whoever listens how far PostgreSQL has stored `shard`.
    pub async fn announce(&self, shard: Shard, stored: Stored) {
        let words = format!("{} {}", stored.base.get(), stored.applied_to);
        let told = self
            .context
            .client()
            .publish(subject(&self.config, shard), words.into())
            .await;
        if let Err(error) = told {
            tracing::debug!(%shard, %error, "who waits for the shard was not told");
        }
    }

    /// Listens to the owner of `shard`. What this session writes afterwards is announced later than this; `None` if the
    /// server cannot be told so.
    pub async fn announcements(&self, shard: Shard) -> Option<Announcements> {
        let subject = subject(&self.config, shard);
        let subscriber = self.context.client().subscribe(subject).await.ok()?;
        Some(Announcements(subscriber))
    }
}

impl Announcements {
    /// How far the shard is stored, the next time its owner says so; `None` when the connection is lost.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn next(&mut self) -> Option<Stored> {
        loop {
            let message = self.0.next().await?;
            let stored = std::str::from_utf8(&message.payload).ok().and_then(parse);
            if stored.is_some() {
                return stored;
            }
        }
    }
}

fn parse(words: &str) -> Option<Stored> {
    let (base, applied_to) = words.split_once(' ')?;
    Some(Stored {
        base: Base::new(base.parse().ok()?)?,
        applied_to: Version::new(applied_to.parse().ok()?)?,
    })
}

fn subject(config: &LogConfig, shard: Shard) -> String {
    format!("{}.applied.{shard}", config.nats_subject_prefix)
}
