//! The bytes of one message of the log.
//!
//! ```text
//! format u8 = 1 | operation u8 | expires_at i64 | written_at i64 | content_type u8+bytes | metadata u32+bytes | value
//! ```
//! Integers are big endian; instants are microseconds since the epoch, `expires_at` 0 for never. Only a set has what
//! follows `written_at`. The key stands in the subject, the version is base + sequence (docs/adr/0002-versions.md).

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
        match bytes.try_get_u8().map_err(|_| MALFORMED)? {
            FORMAT => {}
            newer if newer > FORMAT => return Err(DecodeError::UnknownFormat(newer)),
            _ => return Err(MALFORMED),
        }
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

    #[test]
    fn the_format_stays_readable() {
        // These bytes lie in people's logs: a change here needs a new format number and a reader for this one.
        let mut bytes = vec![1, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 5, 16];
        bytes.extend_from_slice(b"application/json\0\0\0\x02{}[1,2]");
        assert_eq!(set().encode(), bytes);
        assert_eq!(Record::decode(bytes.into()), Ok(set()));
        assert_eq!(Record::Pin.encode(), [1, 3].as_slice());
    }

    #[test]
    fn a_newer_format_is_held_not_guessed() {
        assert_eq!(
            Record::decode(Bytes::from_static(&[2, 1, 0])),
            Err(DecodeError::UnknownFormat(2))
        );
        assert_eq!(Record::decode(Bytes::new()), Err(DecodeError::Malformed));
        assert_eq!(
            Record::decode(Bytes::from_static(&[0])),
            Err(DecodeError::Malformed)
        );
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
