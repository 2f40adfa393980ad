//! `POST /v1/rehydrate`: keys or a prefix are put into Redis by the workers.

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    body::{self, Wanted},
    entries::report,
    error::ApiError,
    extract::check_sends_json,
    room,
    state::AppState,
};

#[derive(Serialize, ToSchema)]
struct Asked {
    /// Keys that the workers were asked for; of a prefix those that have a value, 0 if they could not be counted in time.
    requested: u64,
    /// Of a prefix: there are more than were counted, or may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<bool>,
    /// Of a prefix: its name in the workers' logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<String>,
}

/// 202: it is done when the workers get to it.
#[utoipa::path(post, path = "/v1/rehydrate", tag = "administration", request_body = crate::schemas::Wanted,
    responses((status = 202, description = "the workers were asked", body = Asked), (status = 415, description = "the body is not JSON", body = crate::schemas::Error)))]
pub async fn ask(
    State(state): State<AppState>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    check_sends_json(&headers)?;
    let limit = state.config.api_max_batch_bytes;
    let body = room::read(&state, &headers, body, limit).await?;
    let asked = match body::parse_wanted(&body, &state.config)? {
        Wanted::Keys(keys) => {
            state.nest.rehydrate(&keys).await?;
            Asked {
                requested: keys.len() as u64,
                more: None,
                job: None,
            }
        }
        Wanted::Prefix(prefix) => {
            let asked = state.nest.rehydrate_prefix(prefix).await?;
            Asked {
                requested: asked.n_keys,
                more: Some(asked.has_more),
                job: Some(asked.job),
            }
        }
    };
    Ok(report(StatusCode::ACCEPTED, &asked))
}
