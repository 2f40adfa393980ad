//! All keys that begin alike: listing and deleting them, page by page.

use std::time::Duration;

use birb_nest_core::{Key, Place, Range, entry::is_expired};
use futures::future::{join_all, try_join_all};

use super::{Deletion, Lookup, Nest, NestError, Told};
use crate::{postgres::Listed, trace::TraceParent};

/// Some keys that begin alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Those that have a value, or whose newest write is a dead letter, in the order of their bytes.
    pub keys: Vec<Listed>,
    /// Where the next page begins. `None` after the last page.
    pub next: Option<Place>,
}

/// What a call of [`Nest::delete_page`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swept {
    /// Keys whose value was taken away.
    pub n_deleted: usize,
    /// Whether Redis knows of all that.
    pub told: Told,
    /// Where to go on. `None` at the end.
    pub next: Option<Place>,
}

impl Nest {
    /// Keys of `range` that are stored in PostgreSQL, or set aside by it, and have a value.
    ///
    /// # Errors
    /// As [`Nest::find_page`]; [`NestError::Unavailable`], too, when a dead letter cannot be read.
    pub async fn list_page(&self, range: &Range, limit: u32) -> Result<Page, NestError> {
        let Page { keys, next } = self.find_page(range, limit).await?;
        let dead: Vec<Key> = keys
            .iter()
            .filter(|listed| listed.dead)
            .map(|listed| listed.key.clone())
            .collect();
        let mut answers = self.0.ask_many(&dead).await.into_iter();
        let mut listed = Vec::with_capacity(keys.len());
        for mut key in keys {
            if key.dead {
                let answer = answers.next().expect("each dead letter was asked for");
                let Lookup::Found { document, .. } = self.0.judge_answer(answer?)? else {
                    continue;
                };
                key.version = document.version;
                key.expires_at = document.expires_at;
                key.size = document
                    .content()
                    .map_or(0, |content| content.value.len() as u64);
            }
            listed.push(key);
        }
        Ok(Page { keys: listed, next })
    }

    /// As [`Nest::list_page`], but dead letters are not read: whether they are values or deletes is left open. Looks at no
    /// more rows than `limit`, those of deleted and expired entries and of what is no key included, so a page may be short, or empty, and not
    /// the last one.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when PostgreSQL cannot be asked.
    pub async fn find_page(&self, range: &Range, limit: u32) -> Result<Page, NestError> {
        let (rows, next) = self
            .database()
            .list(range, limit)
            .await
            .map_err(|error| NestError::Unavailable(error.to_string()))?;
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
        let Some(session) = self.log().session() else {
            return false;
        };
        let shards = || self.log().shards().iter();
        let Ok(depths) = try_join_all(shards().map(|shard| session.depth(shard))).await else {
            return false;
        };
        let Some(applied) = self.database().applied_to().await else {
            return false;
        };
        let behind = shards().zip(depths).filter(|(shard, depth)| {
            let applied_to = applied.get(shard.index());
            applied_to.is_none_or(|applied_to| depth.behind(*applied_to) > 0)
        });
        let reached = join_all(behind.map(|(shard, depth)| async move {
            let mut progress = self.progress_of(shard).await;
            progress.reaches(depth.last, limit).await
        }));
        reached.await.into_iter().all(|reached| reached)
    }

    /// Deletes the keys of one page, by ordinary deletes. What was deleted stays deleted if a later one fails: call it again
    /// with the same `range`.
    ///
    /// # Errors
    /// The first of those of the deletes, or [`NestError::UnknownOutcome`] if others succeeded; or as [`Nest::find_page`].
    pub async fn delete_page(
        &self,
        range: &Range,
        limit: u32,
        trace: Option<&TraceParent>,
    ) -> Result<Swept, NestError> {
        let page = self.find_page(range, limit).await?;
        let keys: Vec<Key> = page.keys.into_iter().map(|listed| listed.key).collect();
        let deletions = self.delete_many(&keys, trace).await;
        let mut swept = Swept {
            n_deleted: 0,
            told: Told::Yes,
            next: page.next,
        };
        let mut failed = None;
        for deletion in deletions {
            match deletion {
                Ok(Deletion::Deleted(_, told)) => {
                    swept.n_deleted += 1;
                    swept.told = swept.told.and(told);
                }
                Ok(Deletion::Absent) => {}
                Err(error) => failed = Some(error.after(failed)),
            }
        }
        match failed {
            None => Ok(swept),
            Some(error) => Err(error.partly(swept.n_deleted)),
        }
    }
}
