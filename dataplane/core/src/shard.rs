//! Shards: which of the log's streams a key belongs to.

use std::{fmt, str::FromStr};

use crate::Key;

/// How many streams the log has: 1 to 64, fixed for the life of a nest (resharding is a procedure of its own).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardCount(u16);

/// One of the log's streams, 0 to count - 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Shard(u16);

/// A number of shards out of range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the number of shards is a whole number from 1 to {max}, not `{0}`", max = ShardCount::MAX)]
pub struct ShardCountError(String);

impl ShardCount {
    /// The most shards; beyond some 16 streams a server's disk gains nothing (docs/adr/0003-shards.md).
    pub const MAX: u16 = 64;

    /// `count` shards.
    ///
    /// # Errors
    /// When it is not in 1..=[`ShardCount::MAX`].
    pub fn new(count: u16) -> Result<Self, ShardCountError> {
        if (1..=Self::MAX).contains(&count) {
            Ok(Self(count))
        } else {
            Err(ShardCountError(count.to_string()))
        }
    }

    /// How many.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The shard of `key`: XXH3-64 (seed 0) of its bytes modulo the count, the same in every release.
    #[must_use]
    pub fn shard_of(self, key: &Key) -> Shard {
        let hash = xxhash_rust::xxh3::xxh3_64(key.as_str().as_bytes());
        Shard((hash % u64::from(self.0)) as u16)
    }

    /// Every shard, in order.
    pub fn iter(self) -> impl Iterator<Item = Shard> + use<> {
        (0..self.0).map(Shard)
    }
}

impl FromStr for ShardCount {
    type Err = ShardCountError;

    fn from_str(text: &str) -> Result<Self, ShardCountError> {
        text.parse()
            .ok()
            .and_then(|count| Self::new(count).ok())
            .ok_or_else(|| ShardCountError(text.to_owned()))
    }
}

impl fmt::Display for ShardCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Shard {
    /// The shard numbered `index`, whatever the count.
    #[must_use]
    pub const fn from_index(index: u16) -> Self {
        Self(index)
    }

    /// The shard's number, to index lists with.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The shard's number as PostgreSQL's `smallint`.
    #[must_use]
    pub const fn as_i16(self) -> i16 {
        self.0 as i16
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_same_in_every_release() {
        // Computed with the reference implementation. Another result here strands every key that is in a log or on its way.
        let shards = ShardCount::new(8).expect("8 is in range");
        let of = |text: &str| shards.shard_of(&Key::parse(text).expect("a key")).index();
        assert_eq!(
            ["a", "b", "user:1", "user:2", "näme", "🐦"].map(of),
            [7, 7, 1, 2, 6, 5]
        );
    }

    #[test]
    fn counts_out_of_range_are_refused() {
        for text in ["0", "65", "-1", "eight", ""] {
            assert!(text.parse::<ShardCount>().is_err(), "{text:?}");
        }
        assert_eq!("64".parse::<ShardCount>().map(ShardCount::get), Ok(64));
    }

    #[test]
    fn keys_spread_evenly() {
        let shards = ShardCount::new(8).expect("8 is in range");
        let mut counts = [0u32; 8];
        for n in 0..8000 {
            counts[shards
                .shard_of(&Key::parse(&format!("key-{n}")).expect("a key"))
                .index()] += 1;
        }
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
    }
}
