//! `/v1/dead-letters`: writes that PostgreSQL refused for good.

use axum::{
    extract::{FromRequestParts, Path, State},
    http::{HeaderMap, StatusCode, Uri, request::Parts},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use birb_nest_core::{Key, Version};
use birb_nest_store::postgres::Letter;
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::{
    entries::{mark, report},
    error::{ApiError, Code},
    extract::{Query, trace_parent},
    list::{from_cursor, page_size, to_cursor},
    state::AppState,
};

/// Parked letters that one request replays or purges.
const MOST_AT_ONCE: u32 = 100;

#[derive(Serialize, ToSchema)]
struct Letters {
    dead_letters: Vec<DeadLetter>,
    /// Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct DeadLetter {
    id: String,
    key: String,
    version: u64,
    shard: u16,
    /// `waiting` for its next try, or `parked` until somebody replays or purges it.
    state: &'static str,
    sqlstate: String,
    reason: String,
    attempts: u32,
    first_failed_at: String,
    last_failed_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next_try_at: Option<String>,
    /// What would be stored; `null` for a delete, and for a letter that is gone from its stream. Not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<crate::schemas::Entry>)]
    entry: Option<Option<Box<RawValue>>>,
}

#[derive(Serialize, ToSchema)]
struct Replayed {
    replayed: u64,
    complete: bool,
}

#[derive(Serialize, ToSchema)]
struct Purged {
    purged: usize,
    complete: bool,
}

/// GET: a page of dead letters, without their values.
#[utoipa::path(get, path = "/v1/dead-letters", tag = "dead letters", params(("limit" = Option<u32>, Query, description = "rows of a page, 1 to 1000", minimum = 1, maximum = 1000), ("cursor" = Option<String>, Query, description = "of the page before")), responses((status = 200, description = "a page", body = Letters)))]
pub async fn list(State(state): State<AppState>, uri: Uri) -> Result<Response, ApiError> {
    let [limit, cursor] = Query::parse(&uri, ["limit", "cursor"])?.into_values();
    let limit = page_size(limit)?;
    let after = cursor.map(|cursor| {
        from_cursor(&cursor).ok_or_else(|| ApiError::invalid("cursor", "this is no cursor"))
    });
    let letters = state
        .nest
        .letters(after.transpose()?.as_ref(), limit)
        .await?;
    let next = (letters.len() >= limit as usize)
        .then(|| letters.last().map(|letter| to_cursor(&letter.key)))
        .flatten();
    Ok(report(
        StatusCode::OK,
        &Letters {
            dead_letters: letters.into_iter().map(DeadLetter::from).collect(),
            cursor: next,
        },
    ))
}

/// GET: one dead letter, with what it would have stored.
#[utoipa::path(get, path = "/v1/dead-letters/{id}", tag = "dead letters", params(("id" = String, Path, description = "as in lists")), responses((status = 200, description = "the letter, with its value", body = DeadLetter), (status = 404, description = "there is no such letter", body = crate::schemas::Error)))]
pub async fn get(
    State(state): State<AppState>,
    Name(key, version): Name,
) -> Result<Response, ApiError> {
    let (letter, document) = state
        .nest
        .letter(&key, version)
        .await?
        .ok_or_else(no_letter)?;
    let entry = document
        .and_then(|document| document.body)
        .and_then(|body| String::from_utf8(body.to_vec()).ok())
        .and_then(|body| RawValue::from_string(body).ok());
    let mut letter = DeadLetter::from(letter);
    letter.entry = Some(entry);
    Ok(report(StatusCode::OK, &letter))
}

/// POST: one is tried again at once. 202: the shard's worker does it.
#[utoipa::path(post, path = "/v1/dead-letters/{id}/replay", tag = "dead letters", params(("id" = String, Path, description = "as in lists")), responses((status = 202, description = "the worker was asked", body = Replayed), (status = 404, description = "there is no such letter", body = crate::schemas::Error)))]
pub async fn replay(
    State(state): State<AppState>,
    Name(key, version): Name,
) -> Result<Response, ApiError> {
    if !state.nest.replay(&key, version).await? {
        return Err(no_letter());
    }
    let replayed = Replayed {
        replayed: 1,
        complete: true,
    };
    Ok(report(StatusCode::ACCEPTED, &replayed))
}

/// POST: parked ones are tried again at once, a number of them. 202: the shards' workers do it.
#[utoipa::path(post, path = "/v1/dead-letters/replay", tag = "dead letters", responses((status = 202, description = "the workers were asked", body = Replayed)))]
pub async fn replay_all(State(state): State<AppState>) -> Result<Response, ApiError> {
    let replayed = state.nest.replay_parked(MOST_AT_ONCE).await?;
    let replayed = Replayed {
        replayed,
        complete: replayed < u64::from(MOST_AT_ONCE),
    };
    Ok(report(StatusCode::ACCEPTED, &replayed))
}

/// DELETE: one is given up, and its key deleted.
#[utoipa::path(delete, path = "/v1/dead-letters/{id}", tag = "dead letters", params(("id" = String, Path, description = "as in lists")), responses((status = 204, description = "given up"), (status = 404, description = "there is no such letter", body = crate::schemas::Error)))]
pub async fn purge(
    State(state): State<AppState>,
    Name(key, version): Name,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let found = state.nest.letter(&key, version).await?;
    let trace = trace_parent(&headers);
    if found.is_none() {
        return Err(no_letter());
    }
    let purged = state.nest.purge(&key, version, trace.as_ref()).await?;
    let mut response = StatusCode::NO_CONTENT.into_response();
    mark(&mut response, purged.ok_or_else(no_letter)?);
    Ok(response)
}

/// DELETE: parked ones are given up, a number of them, and their keys deleted.
#[utoipa::path(delete, path = "/v1/dead-letters", tag = "dead letters", responses((status = 200, description = "how many were given up", body = Purged)))]
pub async fn purge_all(
    State(state): State<AppState>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let trace = trace_parent(&headers);
    let given_up = state
        .nest
        .purge_parked(MOST_AT_ONCE, trace.as_ref())
        .await?;
    let purged = Purged {
        purged: given_up.n,
        complete: given_up.is_all,
    };
    let mut response = report(StatusCode::OK, &purged);
    mark(&mut response, given_up.told);
    Ok(response)
}

/// A letter's name: its version, and its key in base64url.
fn id(key: &Key, version: Version) -> String {
    format!("{version}.{}", BASE64_URL_SAFE_NO_PAD.encode(key.as_str()))
}

/// A letter's name in the path, taken apart. What is no name names nothing, bytes that are no text included.
pub struct Name(Key, Version);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let segment = Path::<String>::from_request_parts(parts, state).await;
        let Path(id) = segment.map_err(|_| no_letter())?;
        Self::parse(&id).ok_or_else(no_letter)
    }
}

impl Name {
    fn parse(id: &str) -> Option<Self> {
        let (version, key) = id.split_once('.')?;
        Some(Self(
            from_cursor(key)?,
            Version::new(version.parse().ok()?)?,
        ))
    }
}

fn no_letter() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        Code::NotFound,
        "there is no such dead letter; it may have been stored, or its key written again",
    )
}

impl From<Letter> for DeadLetter {
    fn from(letter: Letter) -> Self {
        Self {
            id: id(&letter.key, letter.version),
            key: letter.key.to_string(),
            version: letter.version.get(),
            shard: letter.shard,
            state: if letter.next_try_at.is_some() {
                "waiting"
            } else {
                "parked"
            },
            sqlstate: letter.sqlstate,
            reason: letter.reason,
            attempts: letter.n_attempts,
            first_failed_at: letter.first_failed_at.to_string(),
            last_failed_at: letter.last_failed_at.to_string(),
            next_try_at: letter.next_try_at.map(|at| at.to_string()),
            entry: None,
        }
    }
}
