//! How far a shard is stored, told by its owner to whoever waits for it.
//!
//! Plain messages outside of JetStream: nobody may be listening, and whoever must know asks PostgreSQL as well.

use birb_nest_core::{Shard, Version};
use futures::StreamExt;

use super::Session;
use crate::config::LogConfig;

/// What the owner of one shard says from now on.
pub struct Announcements(async_nats::Subscriber);

impl Session {
    /// Tells whoever listens that PostgreSQL has stored `shard` up to `applied_to`.
    pub async fn announce(&self, shard: Shard, applied_to: Version) {
        let told = self
            .context
            .client()
            .publish(subject(&self.config, shard), applied_to.to_string().into())
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
    /// Up to where the shard is stored, the next time its owner says so; `None` when the connection is lost.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn next(&mut self) -> Option<Version> {
        loop {
            let message = self.0.next().await?;
            let version = std::str::from_utf8(&message.payload)
                .ok()
                .and_then(|text| Version::new(text.parse().ok()?));
            if version.is_some() {
                return version;
            }
        }
    }
}

fn subject(config: &LogConfig, shard: Shard) -> String {
    format!("{}.applied.{shard}", config.nats_subject_prefix)
}
