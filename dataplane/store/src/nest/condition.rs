//! Writing under a condition, atomically: the log decides, whatever stalls or dies in between.
//!
//! A message of the key is in the log: it is the key's newest, so its version is compared, and the write is published on
//! condition that the key still stands there. Nothing is there: a **pin** is published, on condition that nothing is. All
//! that was written before has left the log, so it is committed, and PostgreSQL is asked *after* the pin stands. The write
//! replaces the pin, on condition that it still stands: if it does, nobody wrote in between. Somebody else's pin serves
//! as well as one's own, for the same reason; so racers share it, and one whose owner died hinders nobody.
//! docs/adr/0015-conditions.md.

use std::{sync::Arc, time::Duration};

use birb_nest_core::{Backoff, Document, Key, Precondition, Shard, Version};

use super::{
    Inner, Lookup, Nest, NestError,
    ask::conclude,
    write::{Change, Published, not_acknowledged},
};
use crate::{
    jetstream::{Place, PublishError, Record, Session},
    sabotage::{DAWDLE, Mistake, makes},
    trace::TraceParent,
};

/// How often a write whose key moved meanwhile is judged anew.
const ATTEMPTS: usize = 12;
/// How long it pauses before that, at least and at most: on a replicated log the message that came first may still be on
/// its way.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// A key as it stands in the log, with a message there.
struct Standing {
    session: Arc<Session>,
    place: Place,
    /// What it had for a value when it stood there first, if it had one.
    current: Option<Document>,
    /// What else is known of it under a lesser version is outdated.
    outdates: Version,
}

impl Nest {
    /// Publishes `change` if `condition` holds. `None`: there was nothing to change, and nothing was written.
    pub(super) async fn publish_if(
        &self,
        key: &Key,
        change: &Change,
        condition: &Precondition,
        trace: Option<&TraceParent>,
    ) -> Result<Option<Published>, NestError> {
        let (nest, shard) = (&*self.0, self.0.shard_of(key));
        let mut pauses = Backoff::new(PAUSE.0, PAUSE.1);
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(pauses.fail(rand::random())).await;
            }
            let Some(standing) = nest.stand(key).await? else {
                continue;
            };
            let current = standing.current.as_ref();
            let version = current.map(|document| document.version);
            if !condition.holds(version) {
                // What Redis has may be older than what the answer names: who reads again must not find that.
                nest.outdate(key, standing.outdates).await;
                return Err(NestError::Mismatch(version));
            }
            let Some(record) = change.to(current) else {
                return Ok(None);
            };
            let token = nest.lease_for_write(key).await;
            let place = (!makes(Mistake::ConditionWithoutPin)).then_some(standing.place);
            let publishing = standing.session.publish(shard, key, &record, place, trace);
            match publishing.await {
                Ok(version) => {
                    return Ok(Some(Published {
                        token,
                        version,
                        record,
                    }));
                }
                Err(PublishError::Moved) => {
                    // A token that cannot be given up now is gone in a few seconds.
                    let _ = nest.cache.release(key, &token).await;
                }
                Err(error) => return Err(not_acknowledged(error)),
            }
        }
        Err(kept_moving())
    }
}

impl Nest {
    /// Publishes `record` over the dead letter of `key` that has `version`, whatever that would have stored and even if its
    /// message is gone, if nothing newer of the key is known. `None`: there is, and nothing was written.
    pub(super) async fn publish_over(
        &self,
        key: &Key,
        version: Version,
        record: &Record,
        trace: Option<&TraceParent>,
    ) -> Result<Option<Published>, NestError> {
        let (nest, shard) = (&*self.0, self.0.shard_of(key));
        let mut pauses = Backoff::new(PAUSE.0, PAUSE.1);
        for _ in 0..ATTEMPTS {
            let Some(logged) = nest.ask_log(key, shard).await else {
                return Err(NestError::Unavailable("the log cannot be asked".to_owned()));
            };
            let place = pinned(&logged.session, key, shard, logged.place).await?;
            let row = nest.database.lookup(key, shard).await;
            let row = row.map_err(|error| NestError::Unavailable(error.to_string()))?;
            if let Some(place) = place
                && logged.is_of_one_life_with(&row, shard).await
            {
                let is_there = row.dead.is_some_and(|dead| dead.version == version);
                let stored = row.entry.map_or(Version::ZERO, |entry| entry.version);
                if !is_there || stored.max(logged.version()) > version {
                    return Ok(None);
                }
                let token = nest.lease_for_write(key).await;
                let publishing = logged
                    .session
                    .publish(shard, key, record, Some(place), trace);
                match publishing.await {
                    Ok(version) => {
                        return Ok(Some(Published {
                            token,
                            version,
                            record: record.clone(),
                        }));
                    }
                    Err(PublishError::Moved) => {
                        let _ = nest.cache.release(key, &token).await;
                    }
                    Err(error) => return Err(not_acknowledged(error)),
                }
            } else {
                logged.session.refresh(shard).await;
            }
            tokio::time::sleep(pauses.fail(rand::random())).await;
        }
        Err(kept_moving())
    }
}

fn kept_moving() -> NestError {
    not_acknowledged(PublishError::Moved)
}

/// `place`, with a pin put there if nothing of `key` is in the log; `None` when there is something by now.
async fn pinned(
    session: &Session,
    key: &Key,
    shard: Shard,
    place: Place,
) -> Result<Option<Place>, NestError> {
    if place.sequence != 0 {
        return Ok(Some(place));
    }
    match session.pin(shard, key, place).await {
        Ok(pinned) => Ok(Some(pinned)),
        Err(PublishError::Moved) => Ok(None),
        // Perhaps the pin is there; the write is not.
        Err(error) => Err(match not_acknowledged(error) {
            NestError::UnknownOutcome(why) => NestError::Unavailable(why),
            certain => certain,
        }),
    }
}

impl Inner {
    /// Where `key` stands and what it has, pinned if nothing of it is in the log; `None` when it moved meanwhile.
    async fn stand(&self, key: &Key) -> Result<Option<Standing>, NestError> {
        let shard = self.shard_of(key);
        let Some(logged) = self.ask_log(key, shard).await else {
            return Err(NestError::Unavailable("the log cannot be asked".to_owned()));
        };
        let (session, mut place) = (logged.session.clone(), logged.place);
        let answer = match logged.suffices(key, shard) {
            Some(answer) => answer,
            None => {
                if !self.database.is_up() {
                    return Err(NestError::Unavailable("postgresql is down".to_owned()));
                }
                let is_pinned =
                    !makes(Mistake::ConditionWithoutPin) && !makes(Mistake::ConditionByAbsence);
                if is_pinned {
                    match pinned(&session, key, shard, place).await? {
                        Some(pinned) => place = pinned,
                        None => return Ok(None),
                    }
                }
                let row = self.database.lookup(key, shard).await;
                let row = row.map_err(|error| NestError::Unavailable(error.to_string()))?;
                if makes(Mistake::ConditionByAbsence) {
                    tokio::time::sleep(DAWDLE).await;
                }
                match conclude(key, shard, Some(logged), row).await {
                    Some(answer) => answer?,
                    None => {
                        session.refresh(shard).await;
                        return Ok(None);
                    }
                }
            }
        };
        let outdates = answer.outdates;
        let current = match self.judge_answer(answer)? {
            Lookup::Found { document, .. } => Some(document),
            Lookup::Absent => None,
        };
        Ok(Some(Standing {
            session,
            place,
            current,
            outdates,
        }))
    }
}
