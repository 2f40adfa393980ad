//! What lies under a key in Redis.
//!
//! ```text
//! E <version, 16 digits> <expires_at, 16 digits, microseconds, 0 = never> <body>    an entry
//! D <version> <expires_at>                                                         a deleted one
//! N                                                                                known to have no value
//! T <32 hexadecimal digits>                                                        a lease token
//! ```
//! without the blanks. Digits, so that the scripts can compare versions and people can read them in redis-cli.

use std::io::Write;

use birb_nest_core::{Document, Timestamp, Version};
use bytes::Bytes;

/// Bytes before the body. They alone are a value, too, with an empty body.
pub(super) const HEADER: usize = 33;

/// A parsed value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// An entry or a tombstone.
    Document(Document),
    /// A lookup found that the key has no value, a few seconds ago at most.
    Absent,
    /// Somebody is looking the key up or writing it.
    Leased,
}

/// The right to create one key, while Redis still has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token nobody else has.
    #[must_use]
    pub fn random() -> Self {
        Self(format!("T{:032x}", rand::random::<u128>()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The value that stands for "no value".
pub(super) const ABSENT: &[u8] = b"N";

/// A version as the scripts compare it.
pub(super) fn version_digits(version: Version) -> String {
    format!("{:016}", version.get())
}

/// The bytes that Redis keeps for `document`.
pub(super) fn encode(document: &Document) -> Vec<u8> {
    let body = document.body.as_deref().unwrap_or_default();
    let mut out = Vec::with_capacity(HEADER + body.len());
    let kind = if document.body.is_some() { 'E' } else { 'D' };
    let expires_at = document.expires_at.map_or(0, Timestamp::as_micros);
    write!(
        out,
        "{kind}{}{expires_at:016}",
        version_digits(document.version)
    )
    .expect("a Vec takes all");
    out.extend_from_slice(body);
    out
}

/// Parses a value; the body shares its memory. `None` for what no release of ours wrote.
pub(super) fn parse(bytes: Vec<u8>) -> Option<Stored> {
    let bytes = Bytes::from(bytes);
    let kind = *bytes.first()?;
    match kind {
        b'N' => return Some(Stored::Absent),
        b'T' => return Some(Stored::Leased),
        b'E' | b'D' => {}
        _ => return None,
    }
    let digits = |range| {
        std::str::from_utf8(bytes.get(range)?)
            .ok()?
            .parse::<u64>()
            .ok()
    };
    let version = Version::new(digits(1..17)?)?;
    let expires_at = digits(17..HEADER)?;
    Some(Stored::Document(Document {
        version,
        expires_at: (expires_at > 0)
            .then(|| i64::try_from(expires_at).map(Timestamp::from_micros))
            .transpose()
            .ok()?,
        body: (kind == b'E').then(|| bytes.slice(HEADER..)),
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_document_comes_back(
            version in 0..=Version::MAX.get(),
            expires in prop::option::of(1i64..9_999_999_999_999_999),
            body in prop::option::of(prop::collection::vec(any::<u8>(), 1..100)),
        ) {
            let document = Document {
                version: Version::new(version).expect("in range"),
                expires_at: expires.map(Timestamp::from_micros),
                body: body.map(Bytes::from),
            };
            let bytes = encode(&document);
            prop_assert_eq!(parse(bytes.clone()), Some(Stored::Document(document.clone())));
            let head = Document { body: document.body.as_ref().map(|_| Bytes::new()), ..document };
            prop_assert_eq!(parse(bytes[..HEADER].to_vec()), Some(Stored::Document(head)));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse(bytes);
        }
    }

    #[test]
    fn tokens_are_as_long_as_a_header() {
        // install.lua and fill.lua compare the first 33 bytes.
        assert_eq!(Token::random().as_str().len(), HEADER);
        assert_ne!(Token::random(), Token::random());
        assert_eq!(parse(Token::random().as_str().into()), Some(Stored::Leased));
    }
}
