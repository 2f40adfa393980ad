//! Reading: Redis first, then the log and PostgreSQL.

use birb_nest_core::{Document, Key, Version};
use futures::{StreamExt, stream};
use tokio::time::timeout;

use super::{
    Inner, Lookup, Nest, NestError, Source, Told,
    ask::{AT_ONCE, Answer, unsure},
};
use crate::{
    metrics::METRICS,
    redis::{CacheError, Fill, Lease, Stored, Token},
};

impl Nest {
    /// The value of `key`, or that it has none. Never older than any write acknowledged before the call, but for what
    /// docs/ARCHITECTURE.md labels.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when no store that must be asked could be.
    pub async fn get(&self, key: &Key) -> Result<Lookup, NestError> {
        let stored = self.0.cache.get(key).await.unwrap_or(None);
        let result = match stored.and_then(|stored| self.0.judge_hit(stored)) {
            Some(hit) => Ok(hit),
            None => self.join_lookup(key).await,
        };
        count(result.as_ref());
        result
    }

    /// The value of `key`, or that it has none, without asking Redis: the newest at some moment during the call. Has
    /// what is older deleted from Redis before it returns, so that no later read is behind this one;
    /// [`Told::Pending`] if that could not be done.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when log or PostgreSQL cannot be asked and would have to be.
    pub async fn get_past_redis(&self, key: &Key) -> Result<(Lookup, Told), NestError> {
        let result = async {
            let answer = self.0.ask(key).await?;
            if answer.unconfirmed {
                return Err(NestError::Unavailable(
                    "a server is down that may hold a newer write of this key".to_owned(),
                ));
            }
            let told = self.0.outdate(key, answer.outdates).await;
            Ok((self.0.judge_answer(answer)?, told))
        }
        .await;
        count(result.as_ref().map(|(lookup, _)| lookup));
        result
    }

    /// What Redis says of each of `keys`, in their order; `None` where it says nothing. For [`Nest::complete`].
    pub async fn hits(&self, keys: &[Key]) -> Vec<Option<Lookup>> {
        let stored = match self.0.cache.get_many(keys).await {
            Ok(stored) => stored,
            Err(_) => vec![None; keys.len()],
        };
        stored
            .into_iter()
            .map(|stored| stored.and_then(|stored| self.0.judge_hit(stored)))
            .collect()
    }

    /// As [`Nest::get`] for each of `keys`, in their order, of which `hits` are known; one that fails does not stop the others.
    ///
    /// When Redis has none of many keys, log and PostgreSQL are asked for all of them at once, and Redis is not filled
    /// from here: the workers are asked to.
    pub async fn complete(
        &self,
        keys: &[Key],
        hits: Vec<Option<Lookup>>,
    ) -> Vec<Result<Lookup, NestError>> {
        let missed: Vec<Key> = keys
            .iter()
            .zip(&hits)
            .filter(|(_, hit)| hit.is_none())
            .map(|(key, _)| key.clone())
            .collect();
        let mut looked_up = self.look_up_many(&missed).await.into_iter();
        let results: Vec<_> = hits
            .into_iter()
            .filter_map(|hit| hit.map(Ok).or_else(|| looked_up.next()))
            .collect();
        results.iter().map(Result::as_ref).for_each(count);
        results
    }

    async fn look_up_many(&self, keys: &[Key]) -> Vec<Result<Lookup, NestError>> {
        if keys.len() > AT_ONCE {
            if self.0.cache.is_up() {
                self.0.wanted.note(keys);
            }
            let answers = self.0.ask_many(keys).await;
            return answers
                .into_iter()
                .map(|answer| self.0.judge_answer(answer?))
                .collect();
        }
        stream::iter(keys.to_vec())
            .map(|key| async move { self.join_lookup(&key).await })
            .buffered(AT_ONCE)
            .collect()
            .await
    }

    /// Asks past Redis; shares the answer with other readers of the key.
    async fn join_lookup(&self, key: &Key) -> Result<Lookup, NestError> {
        let (nest, looked_up) = (self.clone(), key.clone());
        let look_up = move || {
            let (nest, key) = (nest.clone(), looked_up.clone());
            async move {
                let Ok(_permit) = nest.0.lookups.try_acquire() else {
                    METRICS.error("lookup_shed");
                    return Err(NestError::Unavailable(
                        "too many lookups are under way".to_owned(),
                    ));
                };
                nest.0.look_up(&key).await
            }
        };
        self.0.flights.join(key, look_up).await.unwrap_or_else(|| {
            Err(NestError::Unavailable(
                "the lookup ended without an answer".to_owned(),
            ))
        })
    }
}

impl Inner {
    /// What a value in Redis says; `None` when it says nothing about the key.
    pub(super) fn judge_hit(&self, stored: Stored) -> Option<Lookup> {
        match stored {
            Stored::Leased => None,
            Stored::Absent => Some(Lookup::Absent),
            Stored::Document(document) => Some(self.judge(document, Source::Redis, false)),
        }
    }

    fn judge(&self, document: Document, source: Source, unconfirmed: bool) -> Lookup {
        if document.body.is_none()
            || birb_nest_core::entry::is_expired(document.expires_at, self.clock.now())
        {
            Lookup::Absent
        } else {
            Lookup::Found {
                document,
                source,
                unconfirmed,
            }
        }
    }

    async fn look_up(&self, key: &Key) -> Result<Lookup, NestError> {
        // The token comes before the log is asked: what Redis learns under it cannot be older than a write that
        // tells Redis meanwhile, since that breaks it. Without the log nothing may be filled.
        let token = Token::random();
        let mut leased = false;
        if self.log.session().is_some() {
            match self.cache.lease_for_read(key, &token).await {
                Ok(Lease::Taken) => leased = true,
                Ok(Lease::Found(stored)) => {
                    if let Some(hit) = self.judge_hit(stored) {
                        return Ok(hit);
                    }
                }
                Err(_) => {}
            }
        }
        let answer = self.ask(key).await;
        if leased {
            // Who reads has the answer, whatever Redis says.
            let _ = self.fill(key, &token, &answer).await;
        }
        self.judge_answer(answer?)
    }

    /// Puts an answer into Redis in place of the token that was taken before it was asked for, and tells whether it did:
    /// the token may be gone. Without an answer to stand by, the place is free for others at once.
    ///
    /// # Errors
    /// [`CacheError`]: the token may stay, for as long as it lasts.
    pub(super) async fn fill(
        &self,
        key: &Key,
        token: &Token,
        answer: &Result<Answer, NestError>,
    ) -> Result<bool, CacheError> {
        let Some(answer) = answer.as_ref().ok().filter(|answer| !answer.unconfirmed) else {
            // A failure leaves the token, and in a few seconds nothing.
            let _ = self.cache.release(key, token).await;
            return Ok(false);
        };
        let fill = answer
            .document
            .as_ref()
            .map_or(Fill::Absent, Fill::Document);
        let filled = self.cache.fill(key, token, fill, self.clock.now()).await?;
        if filled {
            METRICS.rehydrated(match &answer.document {
                Some(_) => answer.source.as_str(),
                None => "none",
            });
        }
        Ok(filled)
    }

    /// Has what is older than `version` deleted from Redis, now or as soon as it can be.
    pub(super) async fn outdate(&self, key: &Key, version: Version) -> Told {
        let versions = [(key.clone(), version)];
        match timeout(self.cache.timeout(), self.cache.forget(&versions)).await {
            Ok(Ok(())) => Told::Yes,
            Ok(Err(_)) | Err(_) => {
                self.cache.repair_later(key.clone(), version);
                Told::Pending
            }
        }
    }

    pub(super) fn judge_answer(&self, answer: Answer) -> Result<Lookup, NestError> {
        let Answer {
            document,
            source,
            unconfirmed,
            outdates: _,
        } = answer;
        match document.map(|document| self.judge(document, source, unconfirmed)) {
            Some(found @ Lookup::Found { .. }) => Ok(found),
            Some(Lookup::Absent) | None if unconfirmed => Err(unsure()),
            Some(Lookup::Absent) | None => Ok(Lookup::Absent),
        }
    }
}

fn count(result: Result<&Lookup, &NestError>) {
    match result {
        Ok(Lookup::Found { source, .. }) => METRICS.read(source.as_str(), true),
        Ok(Lookup::Absent) => METRICS.read("none", false),
        Err(_) => METRICS.error("read"),
    }
}
