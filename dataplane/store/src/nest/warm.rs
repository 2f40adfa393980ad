//! Putting many keys into Redis at once, by the same rules as a read: token, log, PostgreSQL, fill.

use birb_nest_core::{Document, Key, Shard, Version};
use futures::{StreamExt, stream};

use super::{Nest, NestError, Source};
use crate::{
    metrics::METRICS,
    redis::{Fill, Lease, Token},
};

/// Keys of one call that are worked on at the same time.
const AT_ONCE: usize = 32;

impl Nest {
    /// Fills Redis with those of `keys` that it does not have; returns how many it filled. What is being read or
    /// written by somebody else is left to them.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when a store cannot be asked; what was filled until then stays.
    pub async fn warm(&self, keys: &[Key]) -> Result<usize, NestError> {
        let unavailable = |error: &dyn std::error::Error| NestError::Unavailable(error.to_string());
        let nest = &*self.0;
        let session = nest
            .log
            .session()
            .ok_or_else(|| NestError::Unavailable("the log is not connected".to_owned()))?;
        // The tokens come before the log is asked, as for every read.
        let leased: Vec<(Key, Token)> = stream::iter(keys.iter().cloned())
            .map(|key| async move {
                let token = Token::random();
                match nest.cache.lease_for_read(&key, &token).await {
                    Ok(Lease::Taken) => Some((key, token)),
                    Ok(Lease::Found(_)) | Err(_) => None,
                }
            })
            .buffered(AT_ONCE)
            .filter_map(std::future::ready)
            .collect()
            .await;
        let places: Vec<(Key, Shard)> = leased
            .iter()
            .map(|(key, _)| (key.clone(), nest.shard_of(key)))
            .collect();
        let pending: Vec<_> = stream::iter(places.clone())
            .map(|(key, shard)| {
                let session = session.clone();
                async move { session.last(shard, &key).await }
            })
            .buffered(AT_ONCE)
            .collect()
            .await;
        let rows = nest
            .database
            .lookup_many(&places)
            .await
            .map_err(|error| unavailable(&error))?;

        let mut fills = Vec::with_capacity(leased.len());
        for (((key, token), pending), row) in leased.into_iter().zip(pending).zip(rows) {
            let (pending, asked) = pending.map_err(|error| unavailable(&error))?;
            // A shard that changes its life, and keys with a dead letter, are left to readers.
            if asked != row.base || row.dead.is_some() || session.is_fenced(nest.shard_of(&key)) {
                continue;
            }
            // The log is at least as new, unless it lost its tail.
            let stored = row
                .entry
                .as_ref()
                .map_or(Version::ZERO, |entry| entry.version);
            let newest = match pending.filter(|entry| entry.version > stored) {
                Some(entry) => Some((entry, Source::Log)),
                None => row.entry.map(|entry| (entry, Source::Postgres)),
            };
            if let Some((entry, source)) = newest {
                fills.push((Document::render(&key, &entry), key, token, source));
            }
        }
        let filled = stream::iter(fills)
            .map(|(document, key, token, source)| async move {
                let fill = nest
                    .cache
                    .fill(&key, &token, Fill::Document(&document), nest.clock.now())
                    .await;
                let filled = matches!(fill, Ok(true));
                if filled {
                    METRICS.rehydrated(source.as_str());
                }
                usize::from(filled)
            })
            .buffered(AT_ONCE)
            .fold(0, |sum, n| std::future::ready(sum + n))
            .await;
        Ok(filled)
    }
}
