//! Dead letters as people look after them.

use birb_nest_core::{Document, Key, Version};

use super::{Nest, NestError};
use crate::{
    postgres::{Letter, LookupError},
    trace::TraceParent,
};

impl Nest {
    /// Dead letters behind that of the key `after`, in the order of their keys' bytes, at most `limit`.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when PostgreSQL cannot be asked.
    pub async fn letters(&self, after: Option<&Key>, limit: u32) -> Result<Vec<Letter>, NestError> {
        let letters = self.database().letters(after, false, limit).await;
        letters.map_err(unavailable)
    }

    /// The dead letter of `key` that has this version, and what it would have stored; that is `None` when it is a tombstone,
    /// or gone from its stream.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when PostgreSQL or the log cannot be asked.
    pub async fn letter(
        &self,
        key: &Key,
        version: Version,
    ) -> Result<Option<(Letter, Option<Document>)>, NestError> {
        let letter = self.database().letter(key, version).await;
        let Some(letter) = letter.map_err(unavailable)? else {
            return Ok(None);
        };
        let session = self
            .log()
            .session()
            .ok_or_else(|| NestError::Unavailable("the log is not connected".to_owned()))?;
        let entry = session
            .dead_letter(letter.sequence)
            .await
            .map_err(|error| NestError::Unavailable(error.to_string()))?
            .filter(|entry| entry.version == version);
        let document = entry.map(|entry| Document::render(key, &entry));
        Ok(Some((letter, document)))
    }

    /// Has the dead letter of `key` that has this version tried again by its shard's owner; `false` when there is none.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when PostgreSQL cannot be asked.
    pub async fn replay(&self, key: &Key, version: Version) -> Result<bool, NestError> {
        let replayed = self.database().replay(key, version).await;
        replayed.map_err(unavailable)
    }

    /// Has parked dead letters tried again by their shards' owners, at most `limit`; tells how many.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when PostgreSQL cannot be asked.
    pub async fn replay_parked(&self, limit: u32) -> Result<u64, NestError> {
        let replayed = self.database().replay_parked(limit).await;
        replayed.map_err(unavailable)
    }

    /// Gives the write up: deletes its key, if nothing newer of that is known, so that nothing older shows again. A tombstone,
    /// what has expired and a letter whose message is gone are given up alike. `false` when the key has moved on, and with
    /// it the dead letter.
    ///
    /// # Errors
    /// As [`Nest::delete`]; [`NestError::Unavailable`] while PostgreSQL cannot be asked.
    pub async fn purge(
        &self,
        key: &Key,
        version: Version,
        trace: Option<&TraceParent>,
    ) -> Result<bool, NestError> {
        let tombstone = self.tombstone();
        let published = self.publish_over(key, version, &tombstone, trace).await?;
        let Some(published) = published else {
            return Ok(false);
        };
        self.end(key, published, "delete").await;
        Ok(true)
    }

    /// Gives parked writes up, at most `limit`; tells how many, and whether there are more.
    ///
    /// # Errors
    /// The first of those of [`Nest::purge`]; what was given up before stays so.
    pub async fn purge_parked(
        &self,
        limit: u32,
        trace: Option<&TraceParent>,
    ) -> Result<(usize, bool), NestError> {
        let parked = self.database().letters(None, true, limit + 1).await;
        let parked = parked.map_err(unavailable)?;
        let is_last = parked.len() <= limit as usize;
        let mut n_purged = 0;
        for letter in parked.iter().take(limit as usize) {
            n_purged += usize::from(self.purge(&letter.key, letter.version, trace).await?);
        }
        Ok((n_purged, is_last))
    }
}

fn unavailable(error: LookupError) -> NestError {
    NestError::Unavailable(error.to_string())
}
