//! Batches: many messages of one shard become few rows.

use std::{
    collections::{HashMap, hash_map},
    time::Duration,
};

use crate::{Entry, Key, Version};

/// When a batch is closed: at whichever limit comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Most messages in a batch, at least 1.
    pub max_messages: usize,
    /// Most bytes of content in a batch; a single larger message still makes a batch of its own.
    pub max_bytes: usize,
    /// How long the first message waits for others.
    pub linger: Duration,
}

/// Collects messages of one shard in stream order and keeps the newest entry of each key.
#[derive(Debug)]
pub struct Coalescer {
    limits: BatchLimits,
    entries: HashMap<Key, Entry>,
    n_messages: usize,
    n_bytes: usize,
    through: Version,
}

/// What [`Coalescer`] made of a run of messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The newest entry of each key, sorted by key, so that concurrent batches lock rows in one order.
    pub entries: Vec<(Key, Entry)>,
    /// The version of the last message in it: where the shard stands once the batch is stored.
    pub through: Version,
    /// Messages that went in, at least as many as entries came out.
    pub n_messages: usize,
}

impl Coalescer {
    /// An empty batch that will end at `limits`.
    #[must_use]
    pub fn new(limits: BatchLimits) -> Self {
        Self {
            limits,
            entries: HashMap::new(),
            n_messages: 0,
            n_bytes: 0,
            through: Version::ZERO,
        }
    }

    /// Adds the next message: `version` and, unless it stores nothing (a pin), the entry of its key.
    ///
    /// Repeated and out-of-order messages do no harm: the newest version of a key stays.
    pub fn push(&mut self, version: Version, entry: Option<(Key, Entry)>) {
        self.n_messages += 1;
        self.through = self.through.max(version);
        let Some((key, entry)) = entry else { return };
        match self.entries.entry(key) {
            hash_map::Entry::Vacant(place) => {
                self.n_bytes += entry.size();
                place.insert(entry);
            }
            hash_map::Entry::Occupied(mut place) if place.get().version < entry.version => {
                self.n_bytes = self.n_bytes + entry.size() - place.get().size();
                place.insert(entry);
            }
            hash_map::Entry::Occupied(_) => {}
        }
    }

    /// Whether nothing was pushed since the last [`Coalescer::take`].
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n_messages == 0
    }

    /// Whether a limit other than time is reached.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.n_messages >= self.limits.max_messages || self.n_bytes >= self.limits.max_bytes
    }

    /// The batch so far; the coalescer is empty again.
    #[must_use]
    pub fn take(&mut self) -> Batch {
        let mut entries: Vec<_> = self.entries.drain().collect();
        entries.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        self.n_bytes = 0;
        Batch {
            entries,
            through: std::mem::replace(&mut self.through, Version::ZERO),
            n_messages: std::mem::take(&mut self.n_messages),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::{Content, State, Timestamp};

    fn limits(max_messages: usize, max_bytes: usize) -> BatchLimits {
        BatchLimits {
            max_messages,
            max_bytes,
            linger: Duration::from_millis(10),
        }
    }

    fn entry(version: u64, size: usize) -> Entry {
        Entry {
            version: Version::new(version).expect("small"),
            written_at: Timestamp::from_micros(0),
            expires_at: None,
            state: State::Present(Content {
                content_type: String::new(),
                metadata: Bytes::new(),
                value: Bytes::from(vec![0; size]),
            }),
        }
    }

    fn push(coalescer: &mut Coalescer, key: u8, version: u64, size: usize) {
        let entry = entry(version, size);
        let key = Key::parse(&format!("k{key}")).expect("a key");
        coalescer.push(entry.version, Some((key, entry)));
    }

    proptest! {
        #[test]
        fn any_order_and_repetition_keeps_the_newest_of_each_key(
            messages in prop::collection::vec((0u8..6, 1u64..40), 1..60)
        ) {
            let mut coalescer = Coalescer::new(limits(1000, 1 << 20));
            let mut newest = std::collections::BTreeMap::new();
            for &(key, version) in &messages {
                push(&mut coalescer, key, version, 1);
                let place = newest.entry(format!("k{key}")).or_insert(version);
                *place = version.max(*place);
            }
            let batch = coalescer.take();
            let got: Vec<_> = batch.entries.iter().map(|(k, e)| (k.to_string(), e.version.get())).collect();
            prop_assert_eq!(got, newest.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(batch.n_messages, messages.len());
            prop_assert_eq!(batch.through.get(), messages.iter().map(|m| m.1).max().unwrap_or(0));
            prop_assert!(coalescer.is_empty());
        }
    }

    #[test]
    fn full_by_messages_or_by_bytes() {
        let mut coalescer = Coalescer::new(limits(3, 100));
        push(&mut coalescer, 1, 1, 10);
        push(&mut coalescer, 1, 2, 10);
        assert!(!coalescer.is_full());
        push(&mut coalescer, 1, 3, 10);
        assert!(coalescer.is_full(), "three messages, though one key");
        assert_eq!(coalescer.take().entries.len(), 1);
        push(&mut coalescer, 1, 4, 99);
        assert!(!coalescer.is_full());
        push(&mut coalescer, 2, 5, 1);
        assert!(coalescer.is_full());
    }

    #[test]
    fn a_pin_moves_the_shard_and_stores_nothing() {
        let mut coalescer = Coalescer::new(limits(3, 100));
        coalescer.push(Version::new(9).expect("small"), None);
        let batch = coalescer.take();
        assert_eq!((batch.entries.len(), batch.through.get()), (0, 9));
    }
}
