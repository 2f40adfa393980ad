//! `/v1/cache/{key}`: one entry.

use axum::{
    Extension,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use birb_nest_core::{Document, Key, Precondition};
use birb_nest_http::Connection;
use birb_nest_store::{
    nest::{Deletion, Lookup, NewEntry, Told, Written},
    trace::TraceParent,
};
use bytes::Bytes;
use serde::Serialize;

use crate::{
    body,
    durability::{Durability, Wait},
    error::{ApiError, etag},
    extract::{
        PathKey, check_sends_json, known_versions, precondition, trace_parent, wants_past_redis,
    },
    room,
    state::AppState,
};

/// Which store answered a read.
const BIRB_SOURCE: HeaderName = HeaderName::from_static("birb-source");
/// What a client should know of the cache: `pending` on a write, `unconfirmed` on a read.
pub const BIRB_CACHE: HeaderName = HeaderName::from_static("birb-cache");

/// Most bytes in the body of a touch, blanks included.
const MAX_TOUCH_BYTES: usize = 4096;

/// GET, HEAD.
#[utoipa::path(method(get, head), path = "/v1/cache/{key}", tag = "entries", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("If-None-Match" = Option<String>, Header, description = "versions that the client has"), ("Cache-Control" = Option<String>, Header, description = "`no-cache`: ask past Redis")),
    responses((status = 200, description = "the entry", body = crate::schemas::Entry), (status = 304, description = "the client has it"), (status = 404, description = "the key has no value", body = crate::schemas::Error)))]
pub async fn get(
    State(state): State<AppState>,
    PathKey(key): PathKey,
    Extension(connection): Extension<Connection>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    read(&state, &key, &method, &headers, connection, |document| {
        let body = document.body_at(state.nest.clock().now());
        let body = body.ok_or_else(ApiError::no_entry)?;
        Ok((json(StatusCode::OK, Body::empty()), body))
    })
    .await
}

/// Reads `key` as the request asks for it, and has `render` make head and body of the answer of what was found, unless the
/// client has it already.
pub async fn read(
    state: &AppState,
    key: &Key,
    method: &Method,
    headers: &HeaderMap,
    connection: Connection,
    render: impl FnOnce(&Document) -> Result<(Response, Bytes), ApiError>,
) -> Result<Response, ApiError> {
    let known = known_versions(headers)?;
    let (lookup, told) = if wants_past_redis(headers) {
        state.nest.get_past_redis(key).await?
    } else {
        (state.nest.get(key).await?, Told::Yes)
    };
    let Lookup::Found {
        document,
        source,
        unconfirmed,
    } = lookup
    else {
        let mut response = ApiError::no_entry().into_response();
        mark(&mut response, told);
        return Ok(response);
    };
    // It may have expired since it was judged; then there is nothing that the client could have.
    let (mut response, body) = render(&document)?;
    if known.is_some_and(|known| known.name(Some(document.version))) {
        response = StatusCode::NOT_MODIFIED.into_response();
    } else {
        let length = body.len().into();
        response
            .headers_mut()
            .insert(header::CONTENT_LENGTH, length);
        if method != Method::HEAD {
            *response.body_mut() = room::answer(state, body, connection)?;
        }
    }
    identify(&mut response, &document);
    mark(&mut response, told);
    let headers = response.headers_mut();
    headers.insert(BIRB_SOURCE, HeaderValue::from_static(source.as_str()));
    if unconfirmed {
        headers.insert(BIRB_CACHE, HeaderValue::from_static("unconfirmed"));
    }
    Ok(response)
}

/// POST: 201 and the entry.
#[utoipa::path(post, path = "/v1/cache/{key}", tag = "entries", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("If-Match" = Option<String>, Header, description = "the version that the key must have, or `*`"), ("If-None-Match" = Option<String>, Header, description = "`*`: the key must have no value"), ("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")), request_body = crate::schemas::NewEntry,
    responses((status = 201, description = "the entry", body = crate::schemas::Entry), (status = 202, description = "the entry; PostgreSQL does not have it yet", body = crate::schemas::Entry), (status = 412, description = "the condition does not hold", body = crate::schemas::Error), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn post(
    state: State<AppState>,
    key: PathKey,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    write(state, key, headers, body, StatusCode::CREATED).await
}

/// PUT: 200 and the entry.
#[utoipa::path(put, path = "/v1/cache/{key}", tag = "entries", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("If-Match" = Option<String>, Header, description = "the version that the key must have, or `*`"), ("If-None-Match" = Option<String>, Header, description = "`*`: the key must have no value"), ("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")), request_body = crate::schemas::NewEntry,
    responses((status = 200, description = "the entry", body = crate::schemas::Entry), (status = 202, description = "the entry; PostgreSQL does not have it yet", body = crate::schemas::Entry), (status = 412, description = "the condition does not hold", body = crate::schemas::Error), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn put(
    state: State<AppState>,
    key: PathKey,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    write(state, key, headers, body, StatusCode::OK).await
}

async fn write(
    State(state): State<AppState>,
    PathKey(key): PathKey,
    headers: HeaderMap,
    body: Body,
    success: StatusCode,
) -> Result<Response, ApiError> {
    let asked = Asked::of(&headers)?;
    check_sends_json(&headers)?;
    let limit = room::write_limit(&state.config);
    let body = room::read(&state, &headers, body, limit).await?;
    let new = body::parse_entry(&body, &state.config)?;
    store(&state, &key, asked, new, success).await
}

/// What the head of a write says of it.
pub struct Asked {
    condition: Precondition,
    durability: Option<Durability>,
    trace: Option<TraceParent>,
}

impl Asked {
    /// # Errors
    /// 400.
    pub fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        Ok(Self {
            condition: precondition(headers)?,
            durability: Durability::asked(headers)?,
            trace: trace_parent(headers),
        })
    }
}

/// Stores `new` as it is asked for, and answers with the entry.
pub async fn store(
    state: &AppState,
    key: &Key,
    asked: Asked,
    new: NewEntry,
    success: StatusCode,
) -> Result<Response, ApiError> {
    let wait = Wait::begin(state, key, asked.durability).await;
    let written = state
        .nest
        .put(key, new, &asked.condition, asked.trace.as_ref())
        .await?;
    Ok(answer(state, success, written, wait).await)
}

/// PATCH: another time to live; 200 and the entry, 404 when the key has no value.
#[utoipa::path(patch, path = "/v1/cache/{key}", tag = "entries", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("If-Match" = Option<String>, Header, description = "the version that the key must have, or `*`"), ("If-None-Match" = Option<String>, Header, description = "`*`: the key must have no value"), ("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")), request_body = crate::schemas::Touch,
    responses((status = 200, description = "the entry", body = crate::schemas::Entry), (status = 202, description = "the entry; PostgreSQL does not have it yet", body = crate::schemas::Entry), (status = 404, description = "the key has no value", body = crate::schemas::Error), (status = 412, description = "the condition does not hold", body = crate::schemas::Error), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn touch(
    State(state): State<AppState>,
    PathKey(key): PathKey,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let asked = Asked::of(&headers)?;
    check_sends_json(&headers)?;
    let body = room::read(&state, &headers, body, MAX_TOUCH_BYTES).await?;
    let ttl = body::parse_touch(&body, &state.config)?;
    let wait = Wait::begin(&state, &key, asked.durability).await;
    let written = state
        .nest
        .touch(&key, ttl, &asked.condition, asked.trace.as_ref())
        .await?
        .ok_or_else(ApiError::no_entry)?;
    Ok(answer(&state, StatusCode::OK, written, wait).await)
}

async fn answer(state: &AppState, success: StatusCode, written: Written, wait: Wait) -> Response {
    let document = written.document;
    let body = document
        .body_at(state.nest.clock().now())
        .or_else(|| document.body.clone())
        .unwrap_or_default();
    let mut response = json(success, body);
    identify(&mut response, &document);
    mark(&mut response, written.told);
    wait.end(state, document.version, &mut response).await;
    response
}

/// DELETE: 204, or 404 when the key is known to have no value.
#[utoipa::path(delete, path = "/v1/cache/{key}", tag = "entries", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded"), ("If-Match" = Option<String>, Header, description = "the version that the key must have, or `*`"), ("If-None-Match" = Option<String>, Header, description = "`*`: the key must have no value"), ("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")),
    responses((status = 204, description = "deleted"), (status = 202, description = "deleted; PostgreSQL does not know yet"), (status = 404, description = "the key has no value", body = crate::schemas::Error), (status = 412, description = "the condition does not hold", body = crate::schemas::Error)))]
pub async fn delete(
    State(state): State<AppState>,
    PathKey(key): PathKey,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asked = Asked::of(&headers)?;
    let wait = Wait::begin(&state, &key, asked.durability).await;
    match state
        .nest
        .delete(&key, &asked.condition, asked.trace.as_ref())
        .await?
    {
        Deletion::Absent => Err(ApiError::no_entry()),
        Deletion::Deleted(version, told) => {
            let mut response = StatusCode::NO_CONTENT.into_response();
            mark(&mut response, told);
            wait.end(&state, version, &mut response).await;
            Ok(response)
        }
    }
}

/// A response that is JSON already.
pub fn json(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = (status, body.into()).into_response();
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// A response that is about more than one entry, or about none.
pub fn report(status: StatusCode, body: &impl Serialize) -> Response {
    let body = serde_json::to_vec(body).expect("strings and numbers become JSON");
    let mut response = json(status, body);
    response
        .headers_mut()
        .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn identify(response: &mut Response, document: &Document) {
    let headers = response.headers_mut();
    headers.insert(header::ETAG, etag(document.version));
    // Any copy must be asked about before it is used again: the entry may have changed.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
}

/// Says in a response if Redis could not be told.
pub fn mark(response: &mut Response, told: Told) {
    if told == Told::Pending {
        response
            .headers_mut()
            .insert(BIRB_CACHE, HeaderValue::from_static("pending"));
    }
}
