//! What is read from a request's head: the key in its path, what it accepts, what it sends, under which condition.

use std::borrow::Cow;

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header, request::Parts},
};
use birb_nest_core::{
    Key, Precondition,
    precondition::{Comparison, Tags},
};
use birb_nest_store::trace::TraceParent;
use percent_encoding::percent_decode_str;

use crate::error::{ApiError, Code};

/// The key in the last segment of the path.
///
/// Read from the path as it was sent: a `%2F` is part of the key, and a `%` that encodes nothing is refused instead of
/// being guessed at.
pub struct PathKey(pub Key);

impl<S: Sync> FromRequestParts<S> for PathKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let segment = parts.uri.path().rsplit('/').next().unwrap_or_default();
        parse_segment(segment).map(Self)
    }
}

fn parse_segment(segment: &str) -> Result<Key, ApiError> {
    let text = decode("key", segment)?;
    Key::parse(&text).map_err(|error| ApiError::key("key", error))
}

/// The text of `field` that stands percent-encoded in the URL.
fn decode<'a>(field: &str, encoded: &'a str) -> Result<Cow<'a, str>, ApiError> {
    let mut rest = encoded.as_bytes();
    while let Some(at) = rest.iter().position(|&b| b == b'%') {
        match rest.get(at + 1..at + 3) {
            Some(digits) if digits.iter().all(u8::is_ascii_hexdigit) => rest = &rest[at + 3..],
            _ => {
                return Err(ApiError::invalid(
                    field,
                    "a `%` in a URL is followed by two hexadecimal digits; `%` itself is `%25`",
                ));
            }
        }
    }
    percent_decode_str(encoded)
        .decode_utf8()
        .map_err(|_| ApiError::invalid(field, "what is percent-encoded is UTF-8"))
}

/// The parameters behind the `?`, each at most once; a `+` in them is a blank. As in [`PathKey`], a `%` that encodes nothing
/// is refused.
pub struct Query<const N: usize>([Option<String>; N]);

impl<const N: usize> Query<N> {
    /// The values of `known` in their order.
    ///
    /// # Errors
    /// 400 with the parameter that is unknown, badly encoded or there twice.
    pub fn parse(uri: &Uri, known: [&str; N]) -> Result<Self, ApiError> {
        let mut values = [const { None }; N];
        let query = uri.query().unwrap_or_default().replace('+', " ");
        for parameter in query.split('&').filter(|text| !text.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let name = decode(name, name)?.into_owned();
            let Some(place) = known.iter().position(|known| *known == name) else {
                return Err(ApiError::invalid(
                    name.clone(),
                    format!("unknown parameter `{name}`; known are {}", known.join(", ")),
                ));
            };
            let value = decode(&name, value)?.into_owned();
            if values[place].replace(value).is_some() {
                return Err(ApiError::invalid(name, "the parameter is there twice"));
            }
        }
        Ok(Self(values))
    }

    /// The values.
    pub fn into_values(self) -> [Option<String>; N] {
        self.0
    }
}

/// Refuses a request that does not take JSON (406).
pub fn check_accepts_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let mut any = false;
    for value in headers.get_all(header::ACCEPT) {
        any = true;
        let ranges = value.to_str().unwrap_or_default();
        for range in ranges.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let refused =
                parts.any(|p| matches!(p.strip_prefix("q="), Some(q) if q.parse() == Ok(0.0f32)));
            let fits = ["*/*", "application/*", "application/json"]
                .iter()
                .any(|ours| media.eq_ignore_ascii_case(ours));
            if fits && !refused {
                return Ok(());
            }
        }
    }
    if any {
        return Err(ApiError::new(
            StatusCode::NOT_ACCEPTABLE,
            Code::NotAcceptable,
            "answers are application/json",
        ));
    }
    Ok(())
}

/// The condition of a write.
pub fn precondition(headers: &HeaderMap) -> Result<Precondition, ApiError> {
    Ok(Precondition {
        if_match: tags(headers, &header::IF_MATCH, Comparison::Strong)?,
        if_none_match: tags(headers, &header::IF_NONE_MATCH, Comparison::Strong)?,
    })
}

/// Refuses conditions (400) on requests that are about several keys.
pub fn refuse_conditions(headers: &HeaderMap) -> Result<(), ApiError> {
    let condition = [header::IF_MATCH, header::IF_NONE_MATCH]
        .into_iter()
        .find(|name| headers.contains_key(name));
    condition.map_or(Ok(()), |name| {
        Err(ApiError::invalid(
            name.as_str(),
            "a condition is about one key; entries of a batch have `if_match`",
        ))
    })
}

/// The only value of a header that says one thing.
///
/// # Errors
/// 400 when it is there twice.
pub fn single<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> Result<Option<&'a HeaderValue>, ApiError> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (first, None) => Ok(first),
        _ => Err(ApiError::invalid(
            name.as_str(),
            "the header is there twice",
        )),
    }
}

/// The versions that the reader has.
pub fn known_versions(headers: &HeaderMap) -> Result<Option<Tags>, ApiError> {
    tags(headers, &header::IF_NONE_MATCH, Comparison::Weak)
}

fn tags(
    headers: &HeaderMap,
    name: &HeaderName,
    comparison: Comparison,
) -> Result<Option<Tags>, ApiError> {
    let mut lines = Vec::new();
    for value in headers.get_all(name) {
        let line = value.to_str();
        lines.push(line.map_err(|_| ApiError::invalid(name.as_str(), "ASCII is expected"))?);
    }
    if lines.is_empty() {
        return Ok(None);
    }
    // Several lines are one list (RFC 9110, section 5.3).
    Tags::parse(&lines.join(","), comparison)
        .map(Some)
        .map_err(|error| ApiError::invalid(name.as_str(), error.to_string()))
}

/// Whether a read asks for more than a cache has.
pub fn wants_past_redis(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::CACHE_CONTROL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|directive| directive.trim().eq_ignore_ascii_case("no-cache"))
}

/// The trace this request belongs to, if it says so.
pub fn trace_parent(headers: &HeaderMap) -> Option<TraceParent> {
    TraceParent::parse(headers.get("traceparent")?.to_str().ok()?)
}

/// Refuses a body that does not call itself JSON (415).
pub fn check_sends_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let sent = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let media = sent.split(';').next().unwrap_or_default().trim();
    if media.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        Code::UnsupportedMediaType,
        "the body must be sent as `Content-Type: application/json`",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_decoded_once_and_strictly() {
        let check = |segment: &str, expected: Result<&str, StatusCode>| {
            let got = parse_segment(segment);
            assert_eq!(
                got.as_ref().map(Key::as_str).map_err(|error| error.status),
                expected,
                "{segment:?}"
            );
        };
        check("plain", Ok("plain"));
        check("a%2Fb", Ok("a/b"));
        check("a%252Fb", Ok("a%2Fb"));
        check("%F0%9F%90%A6", Ok("🐦"));
        check("a+b", Ok("a+b"));
        check("..", Ok(".."));
        for nonsense in ["%", "%2", "a%zz", "%u0041", "%ff%fe", "a%00b", "%0A", ""] {
            check(nonsense, Err(StatusCode::BAD_REQUEST));
        }
        check(&"x".repeat(513), Err(StatusCode::URI_TOO_LONG));
        check(&"%C3%A4".repeat(257), Err(StatusCode::URI_TOO_LONG));
    }

    #[test]
    fn what_a_client_accepts() {
        let check = |accept: Option<&'static str>, expected: bool| {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            }
            assert_eq!(check_accepts_json(&headers).is_ok(), expected, "{accept:?}");
        };
        check(None, true);
        check(Some("*/*"), true);
        check(Some("text/html, application/json;q=0.5"), true);
        check(Some("application/*"), true);
        check(Some("text/html"), false);
        check(Some("application/json;q=0"), false);
    }
}
