//! Dead letters as people look after them.

use birb_nest_core::{Document, Key, Version};

use super::{Nest, NestError, Told};
use crate::{
    postgres::{Letter, LookupError},
    trace::TraceParent,
};

/// What a call of [`Nest::purge_parked`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GivenUp {
    /// Writes that were given up.
    pub n: usize,
    /// Whether Redis knows of all that.
    pub told: Told,
    /// Whether no parked write is left.
    pub is_all: bool,
}

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
    /// what has expired and a letter whose message is gone are given up alike. `None` when the key has moved on, and with
    /// it the dead letter; else whether Redis knows.
    ///
    /// # Errors
    /// As [`Nest::delete`]; [`NestError::Unavailable`] while PostgreSQL cannot be asked.
    pub async fn purge(
        &self,
        key: &Key,
        version: Version,
        trace: Option<&TraceParent>,
    ) -> Result<Option<Told>, NestError> {
        let tombstone = self.tombstone();
        let published = self.publish_over(key, version, &tombstone, trace).await?;
        let Some(published) = published else {
            return Ok(None);
        };
        Ok(Some(self.end(key, published, "delete").await.told))
    }

    /// Gives parked writes up, at most `limit`.
    ///
    /// # Errors
    /// As [`Nest::purge`], or [`NestError::UnknownOutcome`] if others were given up before; they stay so.
    pub async fn purge_parked(
        &self,
        limit: u32,
        trace: Option<&TraceParent>,
    ) -> Result<GivenUp, NestError> {
        let parked = self.database().letters(None, true, limit + 1).await;
        let parked = parked.map_err(unavailable)?;
        let mut given_up = GivenUp {
            n: 0,
            told: Told::Yes,
            is_all: parked.len() <= limit as usize,
        };
        for letter in parked.iter().take(limit as usize) {
            let purged = self.purge(&letter.key, letter.version, trace).await;
            if let Some(told) = purged.map_err(|error| error.partly(given_up.n))? {
                given_up.n += 1;
                given_up.told = given_up.told.and(told);
            }
        }
        Ok(given_up)
    }
}

fn unavailable(error: LookupError) -> NestError {
    NestError::Unavailable(error.to_string())
}
