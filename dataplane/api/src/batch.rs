//! `/v1/cache/batch/*`: many entries in one request.

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use birb_nest_core::Key;
use birb_nest_store::nest::Lookup;

use crate::{
    body, entries::BIRB_CACHE, error::ApiError, extract::check_sends_json, state::AppState,
};

/// POST /v1/cache/batch/get: `{"keys": [..]}` becomes `{"entries": {..}, "missing": [..], "errors": {..}}`.
///
/// Every key is in exactly one of the three; one that could not be judged is an error, never missing.
pub async fn get(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    check_sends_json(&headers)?;
    let limit = state.config.api_max_batch_bytes;
    let body = body::read(&state, &headers, body, limit).await?;
    let keys = body::parse_keys(&body, &state.config)?;
    drop(body);
    let results = state.nest.get_many(&keys).await;

    let now = state.nest.clock().now();
    let (mut entries, mut missing, mut errors) =
        (List::default(), List::default(), List::default());
    let mut any_unconfirmed = false;
    for (key, result) in keys.iter().zip(results) {
        match result {
            Ok(Lookup::Found {
                document,
                unconfirmed,
                ..
            }) => match document.body_at(now) {
                Some(body) => {
                    any_unconfirmed |= unconfirmed;
                    entries.member(key, &body);
                }
                None => missing.item(key),
            },
            Ok(Lookup::Absent) => missing.item(key),
            Err(error) => {
                let code = serde_json::to_string(&ApiError::from(error).code)
                    .expect("a code becomes JSON");
                errors.member(key, format!("{{\"code\":{code}}}").as_bytes());
            }
        }
    }
    let mut out = Vec::with_capacity(entries.0.len() + missing.0.len() + errors.0.len() + 48);
    out.extend_from_slice(b"{\"entries\":{");
    out.extend_from_slice(&entries.0);
    out.extend_from_slice(b"},\"missing\":[");
    out.extend_from_slice(&missing.0);
    out.extend_from_slice(b"],\"errors\":{");
    out.extend_from_slice(&errors.0);
    out.extend_from_slice(b"}}");
    let mut response = out.into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if any_unconfirmed {
        headers.insert(BIRB_CACHE, HeaderValue::from_static("unconfirmed"));
    }
    Ok(response)
}

/// The inside of a JSON list or object. Entries are rendered already, so it is joined, not serialised.
#[derive(Default)]
struct List(Vec<u8>);

impl List {
    fn item(&mut self, key: &Key) {
        if !self.0.is_empty() {
            self.0.push(b',');
        }
        serde_json::to_writer(&mut self.0, key.as_str()).expect("a string becomes JSON");
    }

    fn member(&mut self, key: &Key, value: &[u8]) {
        self.item(key);
        self.0.push(b':');
        self.0.extend_from_slice(value);
    }
}
