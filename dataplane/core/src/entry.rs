//! Entries: one version of one key, a value or a tombstone, and which of two wins.

use std::time::Duration;

use bytes::Bytes;

use crate::{Timestamp, Version};

/// The value a client wrote and what it said about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The media type of `value`; [`Content::JSON`] for everything written through `/v1/cache`.
    pub content_type: String,
    /// A JSON object as the client wrote it, at most 4 KiB; empty when it gave none.
    pub metadata: Bytes,
    /// The value's bytes as the client wrote them, never re-encoded.
    pub value: Bytes,
}

impl Content {
    /// The media type of JSON values.
    pub const JSON: &str = "application/json";
    /// Most bytes in a media type: its length is one byte in the log.
    pub const MAX_TYPE_BYTES: usize = 255;

    /// Whether the value is JSON, which clients get as it is.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.content_type == Self::JSON
    }

    /// Bytes it takes, for limits on batches and requests.
    #[must_use]
    pub fn size(&self) -> usize {
        self.content_type.len() + self.metadata.len() + self.value.len()
    }
}

/// Whether a version gave the key a value or took it away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The key has this value (until the entry expires).
    Present(Content),
    /// The key was deleted: a tombstone, which hides every older version until it is reaped.
    Deleted,
}

/// One version of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the order of writes to the key.
    pub version: Version,
    /// When the writer wrote it: shown to clients, decides nothing.
    pub written_at: Timestamp,
    /// From when on it is gone; `None` for a key that lives until it is deleted.
    pub expires_at: Option<Timestamp>,
    /// A value, or a tombstone.
    pub state: State,
}

impl Entry {
    /// The value, unless the entry is a tombstone or has expired at `now`.
    #[must_use]
    pub fn content(&self, now: Timestamp) -> Option<&Content> {
        match &self.state {
            State::Present(content) if !is_expired(self.expires_at, now) => Some(content),
            State::Present(_) | State::Deleted => None,
        }
    }

    /// Bytes it takes, for limits on batches.
    #[must_use]
    pub fn size(&self) -> usize {
        match &self.state {
            State::Present(content) => content.size(),
            State::Deleted => 0,
        }
    }
}

/// Whether something that expires at `expires_at` is gone at `now`; it is, from that very instant on.
#[must_use]
pub fn is_expired(expires_at: Option<Timestamp>, now: Timestamp) -> bool {
    expires_at.is_some_and(|at| at <= now)
}

/// The time to live at `now` in whole seconds, rounded up, as clients see it; 0 once expired.
#[must_use]
pub fn ttl_seconds(expires_at: Timestamp, now: Timestamp) -> u64 {
    let left: Duration = expires_at.since(now);
    left.as_secs() + u64::from(left.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(expires_at: Option<i64>, state: State) -> Entry {
        Entry {
            version: Version::new(7).expect("small"),
            written_at: Timestamp::from_micros(0),
            expires_at: expires_at.map(Timestamp::from_micros),
            state,
        }
    }

    #[test]
    fn an_entry_is_gone_from_its_expiry_on() {
        let content = Content {
            content_type: Content::JSON.into(),
            metadata: Bytes::new(),
            value: Bytes::from_static(b"1"),
        };
        let check = |entry: &Entry, now: i64, live: bool| {
            assert_eq!(
                entry.content(Timestamp::from_micros(now)).is_some(),
                live,
                "{entry:?} at {now}"
            );
        };
        let forever = entry(None, State::Present(content.clone()));
        check(&forever, i64::MAX, true);
        let timed = entry(Some(100), State::Present(content));
        check(&timed, 99, true);
        check(&timed, 100, false);
        check(&timed, 101, false);
        check(&entry(None, State::Deleted), 0, false);
        assert_eq!(timed.size(), "application/json".len() + 1);
    }

    #[test]
    fn ttl_is_rounded_up() {
        let check = |expires: i64, now: i64, expected: u64| {
            assert_eq!(
                ttl_seconds(Timestamp::from_micros(expires), Timestamp::from_micros(now)),
                expected
            );
        };
        check(10_000_000, 0, 10);
        check(10_000_000, 1, 10);
        check(10_000_000, 9_000_000, 1);
        check(10_000_000, 9_999_999, 1);
        check(10_000_000, 10_000_000, 0);
        check(10_000_000, 99_000_000, 0);
    }
}
