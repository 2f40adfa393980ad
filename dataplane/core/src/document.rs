//! The JSON document that clients read: rendered once when an entry is written or filled, copied on every hit.

use std::borrow::Cow;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::{
    Content, Entry, Key, State, Timestamp, Version,
    entry::{is_expired, ttl_seconds},
};

/// An entry as Redis keeps it and clients get it: what must be compared, and a body that is only copied.
///
/// `body` is the whole JSON object of docs/API.md but for `ttl`, which changes every second:
/// [`Document::body_at`] splices it in. Tombstones have no body. A value that is not JSON is in base64 there, with its
/// media type beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The entry's version.
    pub version: Version,
    /// The entry's expiry.
    pub expires_at: Option<Timestamp>,
    /// The JSON object; `None` for a tombstone.
    pub body: Option<Bytes>,
}

impl Document {
    /// Renders `entry` of `key`.
    #[must_use]
    pub fn render(key: &Key, entry: &Entry) -> Self {
        let body = match &entry.state {
            State::Deleted => None,
            State::Present(content) => {
                let mut out = Vec::with_capacity(
                    key.as_str().len() + content.value.len() + content.metadata.len() + 224,
                );
                out.extend_from_slice(b"{\"key\":");
                serde_json::to_writer(&mut out, key.as_str()).expect("a string becomes JSON");
                out.extend_from_slice(b",\"value\":");
                if content.is_json() {
                    out.extend_from_slice(&content.value);
                } else {
                    let encoded = BASE64_STANDARD.encode(&content.value);
                    out.extend_from_slice(
                        format!("\"{encoded}\",\"encoding\":\"base64\",\"content_type\":")
                            .as_bytes(),
                    );
                    serde_json::to_writer(&mut out, &content.content_type)
                        .expect("a string becomes JSON");
                }
                out.extend_from_slice(format!(",\"version\":{}", entry.version).as_bytes());
                out.extend_from_slice(b",\"metadata\":");
                out.extend_from_slice(if content.metadata.is_empty() {
                    b"{}"
                } else {
                    &content.metadata
                });
                let written_at = entry.written_at;
                out.extend_from_slice(
                    format!(",\"created_at\":\"{written_at}\",\"updated_at\":\"{written_at}\"")
                        .as_bytes(),
                );
                if let Some(at) = entry.expires_at {
                    out.extend_from_slice(format!(",\"expires_at\":\"{at}\"").as_bytes());
                }
                out.push(b'}');
                Some(Bytes::from(out))
            }
        };
        Self {
            version: entry.version,
            expires_at: entry.expires_at,
            body,
        }
    }

    /// What was written, taken out of the body again; `None` for a tombstone, and for a body that this release cannot read.
    #[must_use]
    pub fn content(&self) -> Option<Content> {
        #[derive(Deserialize)]
        struct Rendered<'a> {
            #[serde(borrow)]
            value: &'a RawValue,
            #[serde(borrow)]
            metadata: &'a RawValue,
            #[serde(borrow)]
            content_type: Option<Cow<'a, str>>,
        }
        let body = self.body.as_ref()?;
        let rendered: Rendered<'_> = serde_json::from_slice(body).ok()?;
        let value = rendered.value.get();
        let (content_type, value) = match rendered.content_type {
            None => (Content::JSON.to_owned(), body.slice_ref(value.as_bytes())),
            Some(content_type) => {
                let encoded = value.strip_prefix('"')?.strip_suffix('"')?;
                let decoded = BASE64_STANDARD.decode(encoded).ok()?;
                (content_type.into_owned(), decoded.into())
            }
        };
        let metadata = match rendered.metadata.get() {
            "{}" => Bytes::new(),
            given => body.slice_ref(given.as_bytes()),
        };
        Some(Content {
            content_type,
            metadata,
            value,
        })
    }

    /// The body a client gets at `now`, with `ttl` when the entry expires; `None` when it is deleted or has expired.
    ///
    /// Without expiry the bytes are shared, not copied.
    #[must_use]
    pub fn body_at(&self, now: Timestamp) -> Option<Bytes> {
        let body = self.body.as_ref()?;
        match self.expires_at {
            None => Some(body.clone()),
            Some(_) if is_expired(self.expires_at, now) => None,
            Some(at) => {
                let (open, close) = body.split_at(body.len() - 1);
                let ttl = format!(",\"ttl\":{}", ttl_seconds(at, now));
                let mut out = BytesMut::with_capacity(body.len() + ttl.len());
                out.put_slice(open);
                out.put_slice(ttl.as_bytes());
                out.put_slice(close);
                Some(out.freeze())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Content;

    fn written(value: &'static str, metadata: &'static str, expires_at: Option<i64>) -> Document {
        Document::render(
            &Key::parse("a \"b\"").expect("a key"),
            &Entry {
                version: Version::new(42).expect("small"),
                written_at: Timestamp::from_micros(1_000_000),
                expires_at: expires_at.map(Timestamp::from_micros),
                state: State::Present(Content {
                    content_type: Content::JSON.into(),
                    metadata: Bytes::from_static(metadata.as_bytes()),
                    value: Bytes::from_static(value.as_bytes()),
                }),
            },
        )
    }

    #[test]
    fn the_document_keeps_the_value_byte_for_byte() {
        let body = written(r#"{"z":1.0,"a":1e400,"é":"\u00e9"}"#, "", None)
            .body_at(Timestamp::from_micros(0))
            .expect("live");
        assert_eq!(
            std::str::from_utf8(&body).expect("UTF-8"),
            r#"{"key":"a \"b\"","value":{"z":1.0,"a":1e400,"é":"\u00e9"},"version":42,"metadata":{},"created_at":"1970-01-01T00:00:01.000000Z","updated_at":"1970-01-01T00:00:01.000000Z"}"#
        );
    }

    #[test]
    fn what_was_written_is_taken_out_again() {
        for (content_type, metadata, value) in [
            (Content::JSON, "", r#"{"z":1.0,"value":[ 1 ]}"#),
            (Content::JSON, r#"{"a":"\u00e9"}"#, "null"),
            ("image/png", "", "\0\r\n\"\\ é"),
            ("text/plain; charset=\"utf-8\"", r#"{"a":1}"#, ""),
        ] {
            let content = Content {
                content_type: content_type.to_owned(),
                metadata: Bytes::from_static(metadata.as_bytes()),
                value: Bytes::from_static(value.as_bytes()),
            };
            let document = Document::render(
                &Key::parse("k").expect("a key"),
                &Entry {
                    version: Version::new(42).expect("small"),
                    written_at: Timestamp::from_micros(0),
                    expires_at: Some(Timestamp::from_micros(1)),
                    state: State::Present(content.clone()),
                },
            );
            assert_eq!(document.content(), Some(content));
        }
    }

    #[test]
    fn ttl_is_spliced_and_ends() {
        let document = written("null", r#"{"a":[1]}"#, Some(61_000_000));
        let at = |micros| {
            document
                .body_at(Timestamp::from_micros(micros))
                .map(|body| String::from_utf8(body.to_vec()).expect("UTF-8"))
        };
        assert_eq!(
            at(1_000_001).as_deref(),
            Some(
                r#"{"key":"a \"b\"","value":null,"version":42,"metadata":{"a":[1]},"created_at":"1970-01-01T00:00:01.000000Z","updated_at":"1970-01-01T00:00:01.000000Z","expires_at":"1970-01-01T00:01:01.000000Z","ttl":60}"#
            )
        );
        assert_eq!(at(61_000_000), None);
    }
}
