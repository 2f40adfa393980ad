//! The bytes of one message of the log.
//!
//! ```text
//! format u8 = 1 | operation u8 | expires_at i64 | written_at i64 | content_type u8+bytes | metadata u32+bytes | value
//! ```
//! Integers are big endian; instants are microseconds since the epoch, `expires_at` 0 for never. Only a set has what
//! follows `written_at`. The key stands in the subject, the version is base + sequence (docs/adr/0002-versions.md).
//!
//! What is read are the format that is written and the one before it, if there is one. Whoever reads anything else holds it.

use birb_nest_core::{Content, Entry, State, Timestamp, Version};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The format this release writes, and the newest it reads.
pub const FORMAT: u8 = 1;

const SET: u8 = 1;
const DELETE: u8 = 2;
const PIN: u8 = 3;

/// Bytes of a message beside its content, at most.
pub const OVERHEAD: usize = 2 + 8 + 8 + 1 + u8::MAX as usize + 4;

/// One message of the log, without the key and version that its envelope has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// A write or a delete.
    Change {
        /// When the writer wrote it.
        written_at: Timestamp,
        /// From when on the entry is gone.
        expires_at: Option<Timestamp>,
        /// The value, or that there is none any more.
        state: State,
    },
    /// Holds the key's place in the log while a condition is judged; stores nothing, readers look past it.
    Pin,
}

/// Why bytes are not a [`Record`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a newer release; whoever reads the log must be upgraded, nothing may be skipped.
    #[error("message format {0} is newer than this release reads ({FORMAT}): upgrade it")]
    UnknownFormat(u8),
    /// Not a message of ours.
    #[error("message is cut short or garbled")]
    Malformed,
}

impl Record {
    /// The entry that this record is at `version`; `None` for a pin.
    #[must_use]
    pub fn into_entry(self, version: Version) -> Option<Entry> {
        match self {
            Self::Pin => None,
            Self::Change {
                written_at,
                expires_at,
                state,
            } => Some(Entry {
                version,
                written_at,
                expires_at,
                state,
            }),
        }
    }

    /// The message's bytes. A content type of more than 255 bytes does not fit and is a caller's mistake.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let Self::Change {
            written_at,
            expires_at,
            state,
        } = self
        else {
            return Bytes::from_static(&[FORMAT, PIN]);
        };
        let content = match state {
            State::Present(content) => Some(content),
            State::Deleted => None,
        };
        let mut out = BytesMut::with_capacity(OVERHEAD + content.map_or(0, Content::size));
        out.put_u8(FORMAT);
        out.put_u8(if content.is_some() { SET } else { DELETE });
        out.put_i64(expires_at.map_or(0, Timestamp::as_micros));
        out.put_i64(written_at.as_micros());
        if let Some(content) = content {
            out.put_u8(
                u8::try_from(content.content_type.len())
                    .expect("content types are at most 255 bytes"),
            );
            out.put_slice(content.content_type.as_bytes());
            out.put_u32(u32::try_from(content.metadata.len()).expect("metadata is at most 4 KiB"));
            out.put_slice(&content.metadata);
            out.put_slice(&content.value);
        }
        out.freeze()
    }

    /// The record that [`Record::encode`] made `bytes` from; shares them instead of copying.
    ///
    /// # Errors
    /// [`DecodeError`]; never panics, whatever the bytes.
    pub fn decode(mut bytes: Bytes) -> Result<Self, DecodeError> {
        const MALFORMED: DecodeError = DecodeError::Malformed;
        // A reader for each format: when another one is written, the one before it stays here.
        match bytes.try_get_u8().map_err(|_| MALFORMED)? {
            1 => Self::decode_1(bytes),
            newer if newer > FORMAT => Err(DecodeError::UnknownFormat(newer)),
            _ => Err(MALFORMED),
        }
    }

    fn decode_1(mut bytes: Bytes) -> Result<Self, DecodeError> {
        const MALFORMED: DecodeError = DecodeError::Malformed;
        let operation = bytes.try_get_u8().map_err(|_| MALFORMED)?;
        if operation == PIN {
            return Ok(Self::Pin);
        }
        let expires_at = bytes.try_get_i64().map_err(|_| MALFORMED)?;
        let written_at = Timestamp::from_micros(bytes.try_get_i64().map_err(|_| MALFORMED)?);
        let state = match operation {
            DELETE => State::Deleted,
            SET => {
                let n = usize::from(bytes.try_get_u8().map_err(|_| MALFORMED)?);
                let content_type = take(&mut bytes, n)?;
                let n = bytes.try_get_u32().map_err(|_| MALFORMED)? as usize;
                let metadata = take(&mut bytes, n)?;
                State::Present(Content {
                    content_type: std::str::from_utf8(&content_type)
                        .map_err(|_| MALFORMED)?
                        .to_owned(),
                    metadata,
                    value: bytes,
                })
            }
            _ => return Err(MALFORMED),
        };
        Ok(Self::Change {
            written_at,
            expires_at: (expires_at != 0).then(|| Timestamp::from_micros(expires_at)),
            state,
        })
    }
}

fn take(bytes: &mut Bytes, n: usize) -> Result<Bytes, DecodeError> {
    if bytes.len() < n {
        return Err(DecodeError::Malformed);
    }
    Ok(bytes.split_to(n))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set() -> Record {
        Record::Change {
            written_at: Timestamp::from_micros(5),
            expires_at: Some(Timestamp::from_micros(9)),
            state: State::Present(Content {
                content_type: Content::JSON.to_owned(),
                metadata: Bytes::from_static(b"{}"),
                value: Bytes::from_static(b"[1,2]"),
            }),
        }
    }

    /// What lies in people's logs, one of each kind: a change here needs a new format number, and a reader for this one.
    fn recorded() -> [(&'static str, Record); 4] {
        let change = |expires_at, state| Record::Change {
            written_at: Timestamp::from_micros(1_790_000_000_000_042),
            expires_at: (expires_at != 0).then(|| Timestamp::from_micros(expires_at)),
            state,
        };
        let content = |content_type: &str, metadata, value| {
            State::Present(Content {
                content_type: content_type.to_owned(),
                metadata: Bytes::from_static(metadata),
                value: Bytes::from_static(value),
            })
        };
        let json = content("application/json", b"{\"a\":1}", b"[1,2]");
        let raw = content("image/png", b"", b"\x89PNG\0\xff");
        [
            (
                "01 01 00065bffb0b9842a 00065bfeda25e02a 10 6170706c69636174696f6e2f6a736f6e 00000007 7b2261223a317d 5b312c325d",
                change(1_790_003_600_000_042, json),
            ),
            (
                "01 01 0000000000000000 00065bfeda25e02a 09 696d6167652f706e67 00000000 89504e4700ff",
                change(0, raw),
            ),
            (
                "01 02 0000000000000000 00065bfeda25e02a",
                change(0, State::Deleted),
            ),
            ("01 03", Record::Pin),
        ]
    }

    fn bytes_of(hex: &str) -> Vec<u8> {
        let digits: Vec<char> = hex.chars().filter(char::is_ascii_hexdigit).collect();
        let pairs = digits.chunks_exact(2);
        let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16);
        pairs.map(|pair| byte(pair).expect("hex")).collect()
    }

    #[test]
    fn what_was_recorded_stays_readable_and_is_what_is_written() {
        for (hex, record) in recorded() {
            let bytes = bytes_of(hex);
            assert_eq!(record.encode(), bytes, "{hex}");
            assert_eq!(Record::decode(bytes.into()), Ok(record), "{hex}");
        }
    }

    #[test]
    fn other_formats_are_held_not_guessed() {
        for (hex, _) in recorded() {
            for format in (0..=u8::MAX).filter(|format| *format != FORMAT) {
                let mut bytes = bytes_of(hex);
                bytes[0] = format;
                let expected = match format {
                    0 => DecodeError::Malformed,
                    newer => DecodeError::UnknownFormat(newer),
                };
                assert_eq!(Record::decode(bytes.into()), Err(expected), "{hex}");
            }
        }
        assert_eq!(Record::decode(Bytes::new()), Err(DecodeError::Malformed));
    }

    proptest! {
        #[test]
        fn every_record_comes_back(
            expires in prop::option::of(1i64..i64::MAX),
            written in any::<i64>(),
            content in prop::option::of((".{0,60}", prop::collection::vec(any::<u8>(), 0..50), prop::collection::vec(any::<u8>(), 0..200)))
        ) {
            let record = Record::Change {
                written_at: Timestamp::from_micros(written),
                expires_at: expires.map(Timestamp::from_micros),
                state: content.map_or(State::Deleted, |(content_type, metadata, value)| State::Present(Content {
                    content_type, metadata: metadata.into(), value: value.into(),
                })),
            };
            prop_assert_eq!(Record::decode(record.encode()), Ok(record));
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Record::decode(bytes.into());
        }

        #[test]
        fn every_cut_is_noticed_up_to_the_value(cut in 0usize..40) {
            let bytes = set().encode();
            let whole = bytes.len() - 5;
            prop_assert_eq!(Record::decode(bytes.slice(..cut.min(bytes.len()))).is_err(), cut < whole);
        }
    }
}
