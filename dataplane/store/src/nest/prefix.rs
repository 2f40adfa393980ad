//! All keys that begin alike: listing and deleting them, page by page.

use std::time::Duration;

use birb_nest_core::{Key, Range, entry::is_expired};
use tokio::time::Instant;

use super::{Deletion, Nest, NestError};
use crate::{postgres::Listed, trace::TraceParent};

/// Some keys that begin alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Those that have a value, in the order of their bytes.
    pub keys: Vec<Listed>,
    /// Where the next page begins: after this key. `None` after the last page.
    pub next: Option<Key>,
}

/// What a call of [`Nest::delete_page`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swept {
    /// Keys whose value was taken away.
    pub n_deleted: usize,
    /// Where to go on: after this key. `None` at the end.
    pub next: Option<Key>,
}

impl Nest {
    /// Keys of `range` that are stored in PostgreSQL and have a value. Looks at no more rows than `limit`, those of deleted
    /// and expired entries included, so a page may be short, or empty, and not the last one.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when PostgreSQL cannot be asked.
    pub async fn list_page(&self, range: &Range, limit: u32) -> Result<Page, NestError> {
        let rows = self
            .database()
            .list(range, limit)
            .await
            .map_err(|error| NestError::Unavailable(error.to_string()))?;
        let next = (rows.len() >= limit as usize)
            .then(|| rows.last().map(|row| row.key.clone()))
            .flatten();
        let now = self.clock().now();
        let keys = rows
            .into_iter()
            .filter(|row| !row.deleted && !is_expired(row.expires_at, now))
            .collect();
        Ok(Page { keys, next })
    }

    /// Waits for at most `limit` until PostgreSQL has stored whatever was acknowledged before the call, so that pages show
    /// it; tells whether it has.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn catches_up(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let Some(session) = self.log().session() else {
            return false;
        };
        for shard in self.log().shards().iter() {
            let progress = self.progress_of(shard).await;
            let Ok(depth) = session.depth(shard).await else {
                return false;
            };
            if !progress
                .reaches(
                    depth.last,
                    deadline.saturating_duration_since(Instant::now()),
                )
                .await
            {
                return false;
            }
        }
        true
    }

    /// Deletes the keys of one page, by ordinary deletes. What was deleted stays deleted if a later one fails: call it again
    /// with the same `range`.
    ///
    /// # Errors
    /// The first of those of the deletes; or as [`Nest::list_page`].
    pub async fn delete_page(
        &self,
        range: &Range,
        limit: u32,
        trace: Option<&TraceParent>,
    ) -> Result<Swept, NestError> {
        let page = self.list_page(range, limit).await?;
        let keys: Vec<Key> = page.keys.into_iter().map(|listed| listed.key).collect();
        let deletions = self.delete_many(&keys, trace).await;
        let mut n_deleted = 0;
        for deletion in deletions {
            n_deleted += usize::from(matches!(deletion?, Deletion::Deleted(..)));
        }
        Ok(Swept {
            n_deleted,
            next: page.next,
        })
    }
}
