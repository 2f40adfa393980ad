//! `/v1/raw/{key}`: values as bytes, with a media type of their own.

use std::collections::BTreeMap;

use axum::{
    Extension,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::Response,
};
use birb_nest_core::{Content, entry::ttl_seconds};
use birb_nest_http::Connection;
use birb_nest_store::nest::NewEntry;
use bytes::Bytes;
use serde_json::value::RawValue;

use crate::{
    body,
    config::MAX_METADATA_BYTES,
    entries,
    error::ApiError,
    extract::{PathKey, single},
    room,
    state::AppState,
};

/// Whole seconds to live.
const BIRB_TTL: HeaderName = HeaderName::from_static("birb-ttl");
/// What the headers of metadata begin with.
const BIRB_META: &str = "birb-meta-";
/// The media type of bytes of which nothing is known.
const BYTES: &str = "application/octet-stream";

/// GET, HEAD: the value alone.
#[utoipa::path(method(get, head), path = "/v1/raw/{key}", tag = "bytes", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("If-None-Match" = Option<String>, Header, description = "versions that the client has")),
    responses((status = 200, description = "the value", content_type = "*/*", body = Vec<u8>), (status = 304, description = "the client has it"), (status = 404, description = "the key has no value", body = crate::schemas::Error)))]
pub async fn get(
    State(state): State<AppState>,
    PathKey(key): PathKey,
    Extension(connection): Extension<Connection>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    entries::read(&state, &key, &method, &headers, connection, |document| {
        let now = state.nest.clock().now();
        if birb_nest_core::entry::is_expired(document.expires_at, now) {
            return Err(ApiError::no_entry());
        }
        let content = document.content().ok_or_else(ApiError::internal)?;
        let mut response = Response::default();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::try_from(content.content_type).unwrap_or(HeaderValue::from_static(BYTES)),
        );
        // These bytes are a client's: no browser shall take them for anything else.
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        if let Some(at) = document.expires_at {
            headers.insert(BIRB_TTL, HeaderValue::from(ttl_seconds(at, now)));
        }
        metadata_headers(&content.metadata, headers);
        Ok((response, content.value))
    })
    .await
}

/// PUT: 200 and the entry.
#[utoipa::path(put, path = "/v1/raw/{key}", tag = "bytes", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("Birb-TTL" = Option<u64>, Header, description = "whole seconds to live", minimum = 1), ("If-Match" = Option<String>, Header, description = "the version that the key must have, or `*`"), ("If-None-Match" = Option<String>, Header, description = "`*`: the key must have no value"), ("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")), request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, description = "the entry", body = crate::schemas::Entry), (status = 202, description = "the entry; PostgreSQL does not have it yet", body = crate::schemas::Entry), (status = 412, description = "the condition does not hold", body = crate::schemas::Error)))]
pub async fn put(
    State(state): State<AppState>,
    PathKey(key): PathKey,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let asked = entries::Asked::of(&headers)?;
    let content_type = media_type(&headers)?;
    let metadata = metadata(&headers)?;
    let ttl = single(&headers, &BIRB_TTL)?.map(|ttl| {
        let text = ttl.to_str().unwrap_or_default();
        body::parse_ttl(BIRB_TTL.as_str(), text, &state.config)
    });
    let ttl = ttl.transpose()?;
    let limit = state.config.api_max_value_bytes;
    let body = room::read(&state, &headers, body, limit).await?;
    let value = if content_type == Content::JSON {
        let value: &RawValue = serde_json::from_slice(&body).map_err(|error| {
            ApiError::malformed("the body says to be JSON, and is not", error.to_string())
        })?;
        body.slice_ref(value.get().as_bytes())
    } else {
        body.clone()
    };
    let new = NewEntry {
        content: Content {
            content_type,
            metadata,
            value,
        },
        ttl,
    };
    entries::store(&state, &key, asked, new, StatusCode::OK).await
}

/// The value's media type. JSON is JSON whatever parameters it has: it is UTF-8.
fn media_type(headers: &HeaderMap) -> Result<String, ApiError> {
    let field = header::CONTENT_TYPE.as_str();
    let Some(value) = single(headers, &header::CONTENT_TYPE)? else {
        return Ok(BYTES.to_owned());
    };
    let text = value
        .to_str()
        .map_err(|_| ApiError::invalid(field, "ASCII is expected"))?
        .trim();
    if text.len() > Content::MAX_TYPE_BYTES {
        return Err(ApiError::invalid(
            field,
            format!("a media type has at most {} bytes", Content::MAX_TYPE_BYTES),
        ));
    }
    let essence = text.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case(Content::JSON) {
        return Ok(Content::JSON.to_owned());
    }
    let is_token = |part: &str| {
        let symbols = "!#$&-^_.+";
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || symbols.contains(c))
    };
    match essence.split_once('/') {
        Some((kind, subtype)) if is_token(kind) && is_token(subtype) => Ok(text.to_owned()),
        _ => Err(ApiError::invalid(
            field,
            "a media type such as `image/png` is expected",
        )),
    }
}

/// `Birb-Meta-*` as the JSON object that metadata is; empty without any.
fn metadata(headers: &HeaderMap) -> Result<Bytes, ApiError> {
    let mut members = BTreeMap::new();
    for (header, value) in headers {
        let Some(name) = header.as_str().strip_prefix(BIRB_META) else {
            continue;
        };
        let value = value
            .to_str()
            .map_err(|_| ApiError::invalid(header.as_str(), "visible ASCII is expected"))?;
        if name.is_empty() || members.insert(name, value).is_some() {
            return Err(ApiError::invalid(
                header.as_str(),
                "metadata has names, each at most once",
            ));
        }
    }
    if members.is_empty() {
        return Ok(Bytes::new());
    }
    let json = serde_json::to_vec(&members).expect("strings become JSON");
    if json.len() > MAX_METADATA_BYTES {
        return Err(ApiError::invalid(
            "birb-meta-*",
            format!(
                "metadata has at most {MAX_METADATA_BYTES} bytes as JSON, this has {}",
                json.len()
            ),
        ));
    }
    Ok(json.into())
}

/// Each member that fits into a header: strings as they are, others as the JSON that was sent.
fn metadata_headers(metadata: &[u8], headers: &mut HeaderMap) {
    let members: BTreeMap<String, &RawValue> = serde_json::from_slice(metadata).unwrap_or_default();
    for (name, value) in members {
        let json = value.get();
        let text = if json.starts_with('"') {
            serde_json::from_str(json)
        } else {
            Ok(json.to_owned())
        };
        // Half of a surrogate pair is legal JSON, and no text.
        let Ok(text) = text else { continue };
        if let (Ok(name), Ok(value)) = (
            HeaderName::try_from(format!("{BIRB_META}{name}")),
            HeaderValue::try_from(text),
        ) {
            headers.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn media_types() {
        let check = |sent: Option<&'static str>, expected: Result<&str, ()>| {
            let headers = headers(
                &sent
                    .map(|sent| ("content-type", sent))
                    .into_iter()
                    .collect::<Vec<_>>(),
            );
            let got = media_type(&headers);
            assert_eq!(got.as_deref().map_err(|_| ()), expected, "{sent:?}");
        };
        check(None, Ok(BYTES));
        check(Some("image/png"), Ok("image/png"));
        check(
            Some("text/plain; charset=latin1"),
            Ok("text/plain; charset=latin1"),
        );
        check(Some("Application/JSON; charset=utf-8"), Ok(Content::JSON));
        for wrong in ["", "png", "image/", "/png", "a b/c", "text/plain/x"] {
            check(Some(wrong), Err(()));
        }
    }

    #[test]
    fn metadata_travels_in_headers() {
        let sent = headers(&[("birb-meta-lang", "en"), ("birb-meta-b", "2"), ("x", "y")]);
        let metadata = metadata(&sent).expect("valid");
        assert_eq!(metadata, r#"{"b":"2","lang":"en"}"#);
        let mut answered = HeaderMap::new();
        metadata_headers(&metadata, &mut answered);
        assert_eq!(
            answered,
            headers(&[("birb-meta-lang", "en"), ("birb-meta-b", "2")])
        );
        let mut answered = HeaderMap::new();
        metadata_headers(
            r#"{"n":1,"with blank":"x","line":"a\nb","o":{"a":1}}"#.as_bytes(),
            &mut answered,
        );
        assert_eq!(
            answered,
            headers(&[("birb-meta-n", "1"), ("birb-meta-o", r#"{"a":1}"#)])
        );
        // Numbers are what was sent, and what is no text takes nothing else with it.
        let mut answered = HeaderMap::new();
        metadata_headers(
            br#"{"lang":"en","n":1e400,"s":"\ud800","i":12345678901234567890123}"#,
            &mut answered,
        );
        assert_eq!(
            answered,
            headers(&[
                ("birb-meta-lang", "en"),
                ("birb-meta-n", "1e400"),
                ("birb-meta-i", "12345678901234567890123")
            ])
        );
        assert!(super::metadata(&headers(&[("birb-meta-", "x")])).is_err());
    }
}
