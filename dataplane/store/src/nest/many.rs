//! Writing many keys at once: publishes go out without waiting for each other, and their acknowledgements come together.

use std::collections::{BTreeMap, BTreeSet};

use birb_nest_core::{Key, Precondition};
use futures::{StreamExt, stream};

use super::{Deletion, Nest, NestError, NewEntry, Written};
use crate::trace::TraceParent;

/// Writes of one call that are on their way at the same time.
const AT_ONCE: usize = 128;

/// One write of several.
#[derive(Debug, Clone)]
pub struct Put {
    /// Its key.
    pub key: Key,
    /// What is to be stored.
    pub new: NewEntry,
    /// When it may be.
    pub condition: Precondition,
}

impl Nest {
    /// As [`Nest::put`] for each of `puts`, with the results in their order; one that fails does not stop the others.
    /// Writes of the same key happen one after another, in the order in which they were given.
    ///
    /// # Cancel safety
    /// As [`Nest::put`], for each.
    pub async fn put_many(
        &self,
        puts: Vec<Put>,
        trace: Option<&TraceParent>,
    ) -> Vec<Result<Written, NestError>> {
        let mut by_key: BTreeMap<Key, Vec<(usize, Put)>> = BTreeMap::new();
        for (place, put) in puts.into_iter().enumerate() {
            by_key
                .entry(put.key.clone())
                .or_default()
                .push((place, put));
        }
        let mut results: Vec<_> = stream::iter(by_key.into_values())
            .map(|puts| async move {
                let mut results = Vec::with_capacity(puts.len());
                for (place, put) in puts {
                    let result = self.put(&put.key, put.new, &put.condition, trace).await;
                    results.push((place, result));
                }
                results
            })
            .buffer_unordered(AT_ONCE)
            .concat()
            .await;
        results.sort_unstable_by_key(|(place, _)| *place);
        results.into_iter().map(|(_, result)| result).collect()
    }

    /// As [`Nest::delete`] without a condition for each of `keys`, with the results in their order; one that fails does
    /// not stop the others. A key that is there again is deleted once, and absent from then on.
    ///
    /// # Cancel safety
    /// As [`Nest::put`], for each.
    pub async fn delete_many(
        &self,
        keys: &[Key],
        trace: Option<&TraceParent>,
    ) -> Vec<Result<Deletion, NestError>> {
        let once: BTreeSet<Key> = keys.iter().cloned().collect();
        let once: Vec<Key> = once.into_iter().collect();
        let absent = self.are_absent(&once).await;
        let mut ends: BTreeMap<Key, Result<Deletion, NestError>> =
            stream::iter(once.into_iter().zip(absent))
                .map(|(key, is_absent)| async move {
                    let end = if is_absent {
                        Ok(Deletion::Absent)
                    } else {
                        self.take_away(&key, &Precondition::default(), trace).await
                    };
                    (key, end)
                })
                .buffer_unordered(AT_ONCE)
                .collect()
                .await;
        keys.iter()
            .map(|key| {
                let end = ends.get_mut(key).expect("each key has an end");
                let now = end.clone();
                if now.is_ok() {
                    *end = Ok(Deletion::Absent);
                }
                now
            })
            .collect()
    }
}
