//! `Birb-Durability`: where a write has to be before it is answered.

use std::collections::{BTreeMap, BTreeSet};

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::Response,
};
use birb_nest_core::{Key, Shard, Version};
use birb_nest_store::nest::Progress;
use futures::future::join_all;
use tokio::time::Instant;

use crate::{error::ApiError, state::AppState};

/// In a request what is asked for, in its response what was reached.
const BIRB_DURABILITY: HeaderName = HeaderName::from_static("birb-durability");

/// Where a write is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// In the log, where every acknowledged write is.
    Log,
    /// In PostgreSQL.
    Database,
}

impl Durability {
    /// What a request asks for, if it does.
    pub fn asked(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let mut values = headers.get_all(BIRB_DURABILITY).iter();
        let (first, second) = (values.next(), values.next());
        match (first.map(HeaderValue::as_bytes), second) {
            (None, _) => Ok(None),
            (Some(b"log"), None) => Ok(Some(Self::Log)),
            (Some(b"database"), None) => Ok(Some(Self::Database)),
            _ => Err(ApiError::invalid(
                BIRB_DURABILITY.as_str(),
                "`log` or `database` is expected",
            )),
        }
    }

    /// Says in a response what was reached.
    pub fn say(self, response: &mut Response) {
        response
            .headers_mut()
            .insert(BIRB_DURABILITY, HeaderValue::from_static(self.as_str()));
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Database => "database",
        }
    }
}

/// A write that perhaps waits for PostgreSQL.
pub struct Wait {
    asked: Option<Durability>,
    progress: Option<Progress>,
}

impl Wait {
    /// Call it before the write, lest its announcement comes first.
    pub async fn begin(state: &AppState, key: &Key, asked: Option<Durability>) -> Self {
        let progress = match asked {
            Some(Durability::Database) => {
                Some(state.nest.progress_of(state.nest.shard_of(key)).await)
            }
            Some(Durability::Log) | None => None,
        };
        Self { asked, progress }
    }

    /// Waits until `version` is where it was asked to be, and says in the response how far it has come: 202 if the time
    /// was over before that.
    pub async fn end(self, state: &AppState, version: Version, response: &mut Response) {
        let Some(asked) = self.asked else { return };
        let limit = state.config.durability_timeout();
        let is_stored = match self.progress {
            Some(mut progress) => progress.reaches(version, limit).await,
            None => false,
        };
        let reached = if is_stored {
            Durability::Database
        } else {
            Durability::Log
        };
        if reached != asked {
            *response.status_mut() = StatusCode::ACCEPTED;
        }
        reached.say(response);
    }
}

/// Writes of one request that perhaps wait for PostgreSQL: those of a shard together.
pub struct Waits {
    asked: Option<Durability>,
    /// That of each write.
    shards: Vec<Shard>,
    progress: BTreeMap<Shard, Progress>,
}

impl Waits {
    /// As [`Wait::begin`] for a write of each of `keys`.
    pub async fn begin(
        state: &AppState,
        keys: impl Iterator<Item = &Key>,
        asked: Option<Durability>,
    ) -> Self {
        let shards: Vec<Shard> = keys.map(|key| state.nest.shard_of(key)).collect();
        let mut progress = BTreeMap::new();
        if asked == Some(Durability::Database) {
            for shard in shards.iter().copied().collect::<BTreeSet<_>>() {
                progress.insert(shard, state.nest.progress_of(shard).await);
            }
        }
        Self {
            asked,
            shards,
            progress,
        }
    }

    /// Waits until each of `versions`, one for each key or none where nothing was written, is where it was asked to be, or
    /// the time is over, and tells where it is; nothing if nothing was asked.
    pub async fn end(
        self,
        state: &AppState,
        versions: &[Option<Version>],
    ) -> Option<Vec<Durability>> {
        self.asked?;
        let deadline = Instant::now() + state.config.durability_timeout();
        let shards = &self.shards;
        let stored = join_all(
            self.progress
                .into_iter()
                .map(|(shard, mut progress)| async move {
                    let mut writes: Vec<(Version, usize)> = versions
                        .iter()
                        .enumerate()
                        .filter(|(place, _)| shards[*place] == shard)
                        .filter_map(|(place, version)| Some(((*version)?, place)))
                        .collect();
                    writes.sort_unstable();
                    let mut stored = Vec::with_capacity(writes.len());
                    for (version, place) in writes {
                        let left = deadline.saturating_duration_since(Instant::now());
                        if !progress.reaches(version, left).await {
                            break;
                        }
                        stored.push(place);
                    }
                    stored
                }),
        )
        .await;
        let mut reached = vec![Durability::Log; versions.len()];
        for place in stored.into_iter().flatten() {
            reached[place] = Durability::Database;
        }
        Some(reached)
    }
}
