//! `/v1/cache?prefix=`: all keys that begin alike.

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode, Uri},
    response::Response,
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use birb_nest_core::{Key, Place, Range};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    durability::Durability,
    entries::{mark, report},
    error::ApiError,
    extract::{Query, refuse_conditions, trace_parent},
    state::AppState,
};

/// Rows of a page, if the client does not say, and at most.
const PAGE: (u32, u32) = (100, 1000);

#[derive(Serialize, ToSchema)]
struct Listing {
    keys: Vec<Listed>,
    /// Absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
    /// What is not in PostgreSQL yet is not listed.
    persisted_only: bool,
}

#[derive(Serialize, ToSchema)]
struct Listed {
    key: String,
    version: u64,
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
}

#[derive(Serialize, ToSchema)]
struct Swept {
    deleted: usize,
    complete: bool,
    /// Absent when it is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    cursor: Option<String>,
}

/// GET: a page of keys.
#[utoipa::path(get, path = "/v1/cache", tag = "prefixes", params(("prefix" = Option<String>, Query, description = "what keys begin with"), ("limit" = Option<u32>, Query, description = "rows of a page, 1 to 1000", minimum = 1, maximum = 1000), ("cursor" = Option<String>, Query, description = "of the page before")),
    responses((status = 200, description = "a page", body = Listing)))]
pub async fn list(State(state): State<AppState>, uri: Uri) -> Result<Response, ApiError> {
    let [prefix, limit, cursor] = Query::parse(&uri, ["prefix", "limit", "cursor"])?.into_values();
    let range = range(prefix.unwrap_or_default(), cursor)?;
    let page = state.nest.list_page(&range, page_size(limit)?).await?;
    Ok(report(
        StatusCode::OK,
        &Listing {
            keys: page
                .keys
                .into_iter()
                .map(|listed| Listed {
                    key: listed.key.to_string(),
                    version: listed.version.get(),
                    size: listed.size,
                    expires_at: listed.expires_at.map(|at| at.to_string()),
                })
                .collect(),
            cursor: page.next.as_ref().map(Place::to_token),
            persisted_only: true,
        },
    ))
}

/// DELETE: takes the values of a page of keys away, and says where to go on.
#[utoipa::path(delete, path = "/v1/cache", tag = "prefixes", params(("prefix" = Option<String>, Query, description = "what keys begin with"), ("all" = Option<String>, Query, description = "`true` in place of a prefix: every key"), ("limit" = Option<u32>, Query, description = "rows of a page, 1 to 1000", minimum = 1, maximum = 1000), ("cursor" = Option<String>, Query, description = "of the page before")),
    responses((status = 200, description = "what was deleted, and where to go on", body = Swept)))]
pub async fn delete(
    State(state): State<AppState>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let [prefix, all, limit, cursor] =
        Query::parse(&uri, ["prefix", "all", "limit", "cursor"])?.into_values();
    let prefix = match (prefix.unwrap_or_default(), all.as_deref()) {
        (prefix, None) if !prefix.is_empty() => prefix,
        (prefix, Some("true")) if prefix.is_empty() => prefix,
        (_, None) => {
            return Err(ApiError::invalid(
                "prefix",
                "the parameter `prefix` is missing or empty; `all=true` deletes every key",
            ));
        }
        (_, Some(_)) => {
            return Err(ApiError::invalid(
                "all",
                "`all=true` takes the place of `prefix`; nothing else is meaningful",
            ));
        }
    };
    refuse_conditions(&headers)?;
    if Durability::asked(&headers)? == Some(Durability::Database) {
        return Err(ApiError::invalid(
            "birb-durability",
            "deletes of many keys are answered when they are in the log",
        ));
    }
    let (is_first, limit) = (cursor.is_none(), page_size(limit)?);
    let range = range(prefix, cursor)?;
    // Pages are of PostgreSQL: what was written before is there when the first one is taken.
    if is_first
        && !state
            .nest
            .catches_up(state.config.durability_timeout())
            .await
    {
        return Err(ApiError::unavailable(
            "PostgreSQL has not stored yet what was written before this request; nothing was deleted",
            std::time::Duration::from_secs(5),
        ));
    }
    let trace = trace_parent(&headers);
    let swept = state
        .nest
        .delete_page(&range, limit, trace.as_ref())
        .await?;
    let mut response = report(
        StatusCode::OK,
        &Swept {
            deleted: swept.n_deleted,
            complete: swept.next.is_none(),
            cursor: swept.next.as_ref().map(Place::to_token),
        },
    );
    mark(&mut response, swept.told);
    Ok(response)
}

/// How many a page has.
///
/// # Errors
/// 400.
pub fn page_size(limit: Option<String>) -> Result<u32, ApiError> {
    let (usual, most) = PAGE;
    let Some(limit) = limit else { return Ok(usual) };
    limit
        .parse()
        .ok()
        .filter(|limit| (1..=most).contains(limit))
        .ok_or_else(|| ApiError::invalid("limit", format!("a limit is a number from 1 to {most}")))
}

fn range(prefix: String, cursor: Option<String>) -> Result<Range, ApiError> {
    check_prefix(&prefix)?;
    let after = cursor
        .map(|cursor| {
            Place::from_token(&cursor)
                .filter(|place| place.as_str().starts_with(&prefix))
                .ok_or_else(|| {
                    ApiError::invalid("cursor", "this is no cursor of a page with this prefix")
                })
        })
        .transpose()?;
    Ok(Range { prefix, after })
}

/// Refuses (400) what no key begins with.
pub fn check_prefix(prefix: &str) -> Result<(), ApiError> {
    if prefix.len() > Key::MAX_BYTES || prefix.chars().any(char::is_control) {
        return Err(ApiError::invalid(
            "prefix",
            "no key begins like that: keys are up to 512 bytes without control characters",
        ));
    }
    Ok(())
}

/// Opaque to clients: a page begins behind this key.
pub fn to_cursor(key: &Key) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(key.as_str())
}

/// The key in a cursor.
pub fn from_cursor(cursor: &str) -> Option<Key> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok()?;
    Key::parse(std::str::from_utf8(&bytes).ok()?).ok()
}
