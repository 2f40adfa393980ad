//! `/v1/cache/batch/*`: many entries in one request.

use std::collections::BTreeSet;

use axum::{
    Extension,
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use birb_nest_core::{Key, Version};
use birb_nest_http::Connection;
use birb_nest_store::{
    Nest,
    nest::{Deletion, Lookup, NestError, Put, Told},
};
use serde::Serialize;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};
use utoipa::ToSchema;

use crate::{
    body,
    durability::{Durability, Waits},
    entries::{BIRB_CACHE, json, report},
    error::{ApiError, Code},
    extract::{check_sends_json, refuse_conditions, trace_parent},
    room,
    state::AppState,
};

/// Keys of a batch that are read at once while nothing is known of how large their values are. Each may have
/// `API_MAX_VALUE_BYTES`, and all of them are in memory before one is left out of the answer; more of them would be asked of
/// PostgreSQL in fewer questions.
const FEW: usize = 64;
/// The same once it is known how large values were.
const MANY: usize = 256;

/// Parts of batches that are read from Redis at once, by all requests together, and again as many that wait for the log or
/// PostgreSQL; others wait for these. Each may be [`FEW`] times `API_MAX_VALUE_BYTES` while it is read.
const PARTS_AT_ONCE: usize = 32;

/// A permit per part of a batch that is being read: what it comes to is known, and bounded, when it is there.
pub struct Parts {
    in_redis: Semaphore,
    past_redis: Semaphore,
}

impl Parts {
    pub fn new() -> Self {
        Self {
            in_redis: Semaphore::new(PARTS_AT_ONCE),
            past_redis: Semaphore::new(PARTS_AT_ONCE),
        }
    }

    /// What some keys have, and the right to hold it. Where Redis has all of them nobody is waited for who waits for more than
    /// Redis.
    async fn read(
        &self,
        nest: &Nest,
        keys: &[Key],
    ) -> Result<(Vec<Result<Lookup, NestError>>, SemaphorePermit<'_>), AcquireError> {
        let in_redis = self.in_redis.acquire().await?;
        let hits = nest.hits(keys).await;
        if hits.iter().all(Option::is_some) {
            return Ok((nest.complete(keys, hits).await, in_redis));
        }
        let (hits, past_redis) = match self.past_redis.try_acquire() {
            Ok(past_redis) => {
                drop(in_redis);
                (hits, past_redis)
            }
            Err(_) => {
                // Who waits for a place holds no values.
                drop((hits, in_redis));
                let past_redis = self.past_redis.acquire().await?;
                (nest.hits(keys).await, past_redis)
            }
        };
        Ok((nest.complete(keys, hits).await, past_redis))
    }
}

/// How many keys to read next, after `n_read` came to `n_bytes`: what probably fits the rest of `limit`.
fn next(n_read: usize, n_bytes: usize, limit: usize) -> usize {
    let average = (n_bytes / n_read.max(1)).max(1);
    (limit.saturating_sub(n_bytes) / average).clamp(FEW, MANY)
}

/// POST /v1/cache/batch/get: `{"keys": [..]}` becomes `{"entries": {..}, "missing": [..], "errors": {..}}`.
///
/// Every key is in exactly one of the three; one that could not be judged is an error, never missing.
#[utoipa::path(post, path = "/v1/cache/batch/get", tag = "batches", request_body = crate::schemas::Keys,
    responses((status = 200, description = "each key in one of three", body = crate::schemas::BatchFound), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn get(
    State(state): State<AppState>,
    Extension(connection): Extension<Connection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    check_sends_json(&headers)?;
    let limit = state.config.api_max_batch_bytes;
    let body = room::read(&state, &headers, body, limit).await?;
    let mut keys = Vec::new();
    let mut seen = BTreeSet::new();
    for (_, key) in body::parse_keys(&body, &state.config)? {
        let key = key?;
        if seen.insert(key.clone()) {
            keys.push(key);
        }
    }
    drop(body);

    // The answer itself, from its beginning: it is not there twice.
    let mut entries = List::behind("{\"entries\":{");
    let (mut missing, mut errors) = (List::behind(""), List::behind(""));
    let (mut any_unconfirmed, mut is_full) = (false, false);
    let (mut room, mut rest, mut n) = (state.answers.share(), &keys[..], FEW);
    while !rest.is_empty() && !is_full {
        let (some, others) = rest.split_at(n.min(rest.len()));
        rest = others;
        let (results, _reading) = state
            .parts
            .read(&state.nest, some)
            .await
            .map_err(|_| ApiError::internal())?;
        let now = state.nest.clock().now();
        for (key, result) in some.iter().zip(results) {
            match result {
                Ok(Lookup::Found {
                    document,
                    unconfirmed,
                    ..
                }) => match document.body_at(now) {
                    // As large as a batch that is sent; the first entry always fits.
                    Some(body) if !entries.is_empty() && entries.len() + body.len() > limit => {
                        is_full = true;
                        errors.code(key, Code::TooLarge);
                    }
                    Some(body) => {
                        any_unconfirmed |= unconfirmed;
                        entries.member(key, &body);
                    }
                    None => missing.item(key),
                },
                Ok(Lookup::Absent) => missing.item(key),
                Err(error) => errors.code(key, ApiError::from(error).code),
            }
        }
        room.grow_to(entries.bytes.len())?;
        n = next(keys.len() - rest.len(), entries.len(), limit);
    }
    for key in rest {
        errors.code(key, Code::TooLarge);
    }
    let mut out = entries.bytes;
    out.extend_from_slice(b"},\"missing\":[");
    out.extend_from_slice(&missing.bytes);
    out.extend_from_slice(b"],\"errors\":{");
    out.extend_from_slice(&errors.bytes);
    out.extend_from_slice(b"}}");
    let n = out.len();
    room.grow_to(n)?;
    let body = room.send(out.into(), state.config.api_answer_timeout, connection);
    let mut response = json(StatusCode::OK, body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_LENGTH, n.into());
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if any_unconfirmed {
        headers.insert(BIRB_CACHE, HeaderValue::from_static("unconfirmed"));
    }
    Ok(response)
}

/// POST /v1/cache/batch/set: `{"entries": [..]}` becomes `{"results": [..]}`, one for each, in their order.
#[utoipa::path(post, path = "/v1/cache/batch/set", tag = "batches", params(("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")), request_body = crate::schemas::Batch,
    responses((status = 200, description = "a result for each entry", body = Results), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn set(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let durability = Durability::asked(&headers)?;
    refuse_conditions(&headers)?;
    check_sends_json(&headers)?;
    let limit = state.config.api_max_batch_bytes;
    let body = room::read(&state, &headers, body, limit).await?;
    let (mut puts, mut names, mut outcomes) = (Vec::new(), Vec::new(), Vec::new());
    for item in body::parse_puts(&body, &state.config)? {
        names.push(item.key);
        outcomes.push(match item.put {
            Ok(put) => {
                puts.push(put);
                None
            }
            Err(error) => Some(Outcome::Failed(error)),
        });
    }
    let waits = Waits::begin(&state, puts.iter().map(|put: &Put| &put.key), durability).await;
    let trace = trace_parent(&headers);
    let written = state.nest.put_many(puts, trace.as_ref()).await;
    let written = written.into_iter().map(|result| match result {
        Ok(written) => {
            Outcome::Written(StatusCode::CREATED, written.document.version, written.told)
        }
        Err(error) => Outcome::Failed(error.into()),
    });
    finish(
        &state,
        names,
        outcomes,
        written.collect(),
        durability,
        waits,
    )
    .await
}

/// POST /v1/cache/batch/delete: `{"keys": [..]}` becomes `{"results": [..]}`, one for each, in their order.
#[utoipa::path(post, path = "/v1/cache/batch/delete", tag = "batches", params(("Birb-Durability" = Option<String>, Header, description = "`log` or `database`")), request_body = crate::schemas::Keys,
    responses((status = 200, description = "a result for each key", body = Results), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn delete(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let durability = Durability::asked(&headers)?;
    refuse_conditions(&headers)?;
    check_sends_json(&headers)?;
    let limit = state.config.api_max_batch_bytes;
    let body = room::read(&state, &headers, body, limit).await?;
    let (mut keys, mut names, mut outcomes) = (Vec::new(), Vec::new(), Vec::new());
    for (name, key) in body::parse_keys(&body, &state.config)? {
        names.push(Some(name));
        outcomes.push(match key {
            Ok(key) => {
                keys.push(key);
                None
            }
            Err(error) => Some(Outcome::Failed(error)),
        });
    }
    drop(body);
    let waits = Waits::begin(&state, keys.iter(), durability).await;
    let trace = trace_parent(&headers);
    let deleted = state.nest.delete_many(&keys, trace.as_ref()).await;
    let deleted = deleted.into_iter().map(|result| match result {
        Ok(Deletion::Deleted(version, told)) => {
            Outcome::Written(StatusCode::NO_CONTENT, version, told)
        }
        Ok(Deletion::Absent) => Outcome::Failed(ApiError::no_entry()),
        Err(error) => Outcome::Failed(error.into()),
    });
    finish(
        &state,
        names,
        outcomes,
        deleted.collect(),
        durability,
        waits,
    )
    .await
}

/// How one write of a batch ended.
enum Outcome {
    Written(StatusCode, Version, Told),
    Failed(ApiError),
}

impl Outcome {
    const fn version(&self) -> Option<Version> {
        match self {
            Self::Written(_, version, _) => Some(*version),
            Self::Failed(_) => None,
        }
    }
}

/// What the answer is: a result for each item, in their order.
#[derive(Serialize, ToSchema)]
struct Results {
    results: Vec<ItemResult>,
}

/// What the answer says of one.
#[derive(Serialize, ToSchema)]
struct ItemResult {
    /// Absent where none could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
    /// The status that the same request would have had alone.
    status: u16,
    /// The version that was written; or, with `VERSION_MISMATCH`, the one that is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    /// `pending`: Redis could not be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<Code>,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Box<str>>,
}

/// Answers for all items: what was wrong with some from the beginning is in `outcomes`, how the others ended in `done`.
async fn finish(
    state: &AppState,
    names: Vec<Option<String>>,
    outcomes: Vec<Option<Outcome>>,
    mut done: Vec<Outcome>,
    asked: Option<Durability>,
    waits: Waits,
) -> Result<Response, ApiError> {
    let versions: Vec<Option<Version>> = done.iter().map(Outcome::version).collect();
    // What holds for all that was written.
    let mut least = None;
    for (outcome, reached) in done
        .iter_mut()
        .zip(waits.end(state, &versions).await.unwrap_or_default())
    {
        let Outcome::Written(status, ..) = outcome else {
            continue;
        };
        if Some(reached) < asked {
            *status = StatusCode::ACCEPTED;
        }
        least = Some(least.map_or(reached, |least: Durability| least.min(reached)));
    }
    let mut done = done.into_iter();
    let results: Vec<ItemResult> = names
        .into_iter()
        .zip(outcomes)
        .map(|(name, outcome)| {
            let outcome = outcome.or_else(|| done.next());
            ItemResult::of(
                name,
                outcome.expect("each was done, or wrong from the beginning"),
            )
        })
        .collect();
    let any_pending = results.iter().any(|result| result.cache.is_some());

    let mut response = report(StatusCode::OK, &Results { results });
    if any_pending {
        response
            .headers_mut()
            .insert(BIRB_CACHE, HeaderValue::from_static("pending"));
    }
    if let Some(reached) = least {
        reached.say(&mut response);
    }
    Ok(response)
}

impl ItemResult {
    fn of(key: Option<String>, outcome: Outcome) -> Self {
        let empty = Self {
            key,
            status: 0,
            version: None,
            cache: None,
            error: None,
            code: None,
            field: None,
            details: None,
        };
        match outcome {
            Outcome::Written(status, version, told) => Self {
                status: status.as_u16(),
                version: Some(version.get()),
                cache: (told == Told::Pending).then_some("pending"),
                ..empty
            },
            Outcome::Failed(error) => Self {
                status: error.status.as_u16(),
                version: error.version.map(Version::get),
                error: Some(error.message.into_owned()),
                code: Some(error.code),
                field: error.field,
                details: error.details,
                ..empty
            },
        }
    }
}

/// The inside of a JSON list or object. Entries are rendered already, so it is joined, not serialised.
struct List {
    bytes: Vec<u8>,
    /// What comes before it.
    n_before: usize,
}

impl List {
    fn behind(head: &str) -> Self {
        Self {
            bytes: head.into(),
            n_before: head.len(),
        }
    }

    fn len(&self) -> usize {
        self.bytes.len() - self.n_before
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn item(&mut self, key: &Key) {
        if !self.is_empty() {
            self.bytes.push(b',');
        }
        serde_json::to_writer(&mut self.bytes, key.as_str()).expect("a string becomes JSON");
    }

    fn code(&mut self, key: &Key, code: Code) {
        let code = serde_json::to_string(&code).expect("a code becomes JSON");
        self.member(key, format!("{{\"code\":{code}}}").as_bytes());
    }

    fn member(&mut self, key: &Key, value: &[u8]) {
        self.item(key);
        self.bytes.push(b':');
        self.bytes.extend_from_slice(value);
    }
}
