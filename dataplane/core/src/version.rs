//! Versions: the one order of all writes to a key.
//!
//! A shard's stream numbers its messages 1, 2, 3 ...; should it ever lose its tail, numbers would be used twice. So
//! each life of a stream has a [`Base`], and **version = base + sequence** (docs/adr/0002-versions.md).

use std::{fmt, str::FromStr};

/// The version of one write, greater than that of every earlier write to the same key.
///
/// Fits 53 bits, so that every JSON reader gets it exactly; clients see it as `version` and as the `ETag`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version(u64);

impl Version {
    /// The version before all others; no write has it.
    pub const ZERO: Self = Self(0);
    /// The largest version: 2^53 - 1, the largest integer an IEEE 754 double keeps exactly (RFC 8259, section 6).
    pub const MAX: Self = Self((1 << 53) - 1);

    /// The version numbered `number`; `None` beyond [`Version::MAX`].
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number <= Self::MAX.0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The version as a number in 0..=2^53-1.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The version as PostgreSQL's `bigint`.
    #[must_use]
    pub const fn as_i64(self) -> i64 {
        self.0 as i64
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a life of a shard's stream adds to its sequences; later lives have greater bases than every version before.
///
/// Unix microseconds when that life began. Written in base 36 in subjects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Base(u64);

impl Base {
    /// The base numbered `number`; `None` when it leaves no room for sequences below [`Version::MAX`].
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        if number < Version::MAX.0 {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The base as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The version of the message numbered `sequence`; `None` beyond [`Version::MAX`].
    #[must_use]
    pub const fn version(self, sequence: u64) -> Option<Version> {
        match self.0.checked_add(sequence) {
            Some(number) => Version::new(number),
            None => None,
        }
    }

    /// The sequence that has `version` under this base: 0 for anything at or before the base itself.
    #[must_use]
    pub const fn sequence(self, version: Version) -> u64 {
        version.0.saturating_sub(self.0)
    }
}

/// Base 36 with lower-case letters, ten characters today.
impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut digits = [0u8; 13];
        let (mut rest, mut at) = (self.0, digits.len());
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdefghijklmnopqrstuvwxyz"[(rest % 36) as usize];
            rest /= 36;
            if rest == 0 {
                break;
            }
        }
        f.write_str(std::str::from_utf8(&digits[at..]).expect("base 36 digits are ASCII"))
    }
}

/// A text that is not a [`Base`] in base 36.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a stream base in base 36")]
pub struct BaseError(String);

impl FromStr for Base {
    type Err = BaseError;

    fn from_str(text: &str) -> Result<Self, BaseError> {
        u64::from_str_radix(text, 36)
            .ok()
            .and_then(Self::new)
            .ok_or_else(|| BaseError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn base_36_comes_back(number in 0..Version::MAX.get()) {
            let base = Base::new(number).expect("in range");
            proptest::prop_assert_eq!(base.to_string().parse(), Ok(base));
        }

        #[test]
        fn version_and_sequence_are_inverse(number in 0..1u64 << 52, sequence in 0..1u64 << 40) {
            let base = Base::new(number).expect("in range");
            let version = base.version(sequence).expect("in range");
            proptest::prop_assert_eq!(base.sequence(version), sequence);
        }
    }

    #[test]
    fn versions_end_where_doubles_lose_integers() {
        assert_eq!(Version::new(1 << 53), None);
        let base = Base::new(Version::MAX.get() - 1).expect("in range");
        assert_eq!(base.version(1), Some(Version::MAX));
        assert_eq!(base.version(2), None);
        assert_eq!(base.version(u64::MAX), None);
    }
}
