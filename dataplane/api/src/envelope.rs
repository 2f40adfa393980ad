//! What happens to every request around its handler.

use std::{sync::LazyLock, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use birb_nest_core::Warning;
use tokio::time::timeout;
use tracing::Instrument;

use crate::{error::ApiError, extract::check_accepts_json, metrics, router, state::AppState};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest request id that is taken over from a caller.
const MAX_REQUEST_ID: usize = 128;

static REFUSED: LazyLock<Warning> = LazyLock::new(Warning::default);

/// Outermost: gives the request its id, counts it, and turns an error into its body.
pub async fn seal(request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request
        .headers()
        .get(X_REQUEST_ID)
        .filter(|id| id.len() <= MAX_REQUEST_ID && id.to_str().is_ok_and(|text| !text.is_empty()))
        .cloned()
        .unwrap_or_else(|| {
            HeaderValue::try_from(format!("{:032x}", rand::random::<u128>()))
                .expect("hexadecimal digits")
        });
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let method = request.method().clone();
    let id_text = id.to_str().unwrap_or_default();
    let span = tracing::debug_span!("request", id = id_text, %method, route);

    let mut response = next.run(request).instrument(span).await;
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        if error.status.is_server_error() {
            // Whoever watches the server that is down has said so once; here it would be once per request.
            let (status, cause) = (error.status.as_u16(), error.cause.as_deref());
            tracing::debug!(request.id = id_text, %method, route, status, cause, "request failed: {}", error.message);
        }
        // What layers said besides: `Allow`, `WWW-Authenticate`, rate limits. The empty body's length is not the new one's.
        let mut said = std::mem::take(response.headers_mut());
        said.remove(header::CONTENT_LENGTH);
        response = error.render(id_text);
        response.headers_mut().extend(said);
    }
    metrics::request(route, &method, response.status(), started.elapsed());
    response.headers_mut().insert(X_REQUEST_ID, id);
    response
}

/// Around everything under /v1: bounds how many requests are worked on and for how long.
pub async fn bound(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let Ok(_permit) = state.permits.try_acquire() else {
        metrics::request_refused();
        if let Some(n_refused) = REFUSED.note(Instant::now()) {
            let limit = state.config.api_max_concurrency;
            tracing::warn!(
                n_refused,
                limit,
                "refusing requests: API_MAX_CONCURRENCY are under way"
            );
        }
        let error = ApiError::unavailable(
            "too many requests are being worked on; this one changed nothing",
            std::time::Duration::from_secs(1),
        );
        return error.into_response();
    };
    let is_read = router::is_read(&request);
    match timeout(state.config.api_request_timeout, next.run(request)).await {
        Ok(response) => response,
        Err(_) if is_read => ApiError::new(
            axum::http::StatusCode::GATEWAY_TIMEOUT,
            crate::error::Code::Timeout,
            "the answer took too long",
        )
        .into_response(),
        Err(_) => ApiError::unknown_outcome().into_response(),
    }
}

/// Around routes whose answers are JSON.
pub async fn answers_json(request: Request, next: Next) -> Response {
    match check_accepts_json(request.headers()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// A handler that panicked: a 500 like any other, and the process lives on.
pub fn caught_panic(panic: Box<dyn std::any::Any + Send>) -> Response {
    let what = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = what, "a handler panicked");
    ApiError::internal().into_response()
}
