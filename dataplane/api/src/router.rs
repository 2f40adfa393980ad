//! The whole URL table.

use axum::{
    Router,
    extract::DefaultBodyLimit,
    http::StatusCode,
    middleware,
    routing::{get, post},
};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    batch, entries, envelope,
    error::{ApiError, Code},
    health, metrics,
    state::AppState,
};

/// The one POST under /v1 that writes nothing.
pub const BATCH_GET: &str = "/v1/cache/batch/get";

/// What `/` lists.
pub const ENDPOINTS: &[&str] = &[
    "POST /v1/cache/{key}",
    "PUT /v1/cache/{key}",
    "GET /v1/cache/{key}",
    "HEAD /v1/cache/{key}",
    "DELETE /v1/cache/{key}",
    "POST /v1/cache/batch/get",
    "GET /health",
    "GET /livez",
    "GET /readyz",
    "GET /metrics",
];

/// Everything.
pub fn public(state: AppState) -> Router {
    let v1 = Router::new()
        .route(
            "/v1/cache/{key}",
            get(entries::get)
                .post(entries::post)
                .put(entries::put)
                .delete(entries::delete),
        )
        .route(BATCH_GET, post(batch::get))
        .route_layer(middleware::from_fn_with_state(
            state.clone(),
            envelope::bound,
        ));
    let router = probes()
        .route("/", get(health::index))
        .route("/health", get(health::health))
        .merge(v1);
    finish(router, state)
}

/// What is served on the admin port.
pub fn admin(state: AppState) -> Router {
    finish(probes(), state)
}

fn probes() -> Router<AppState> {
    Router::new()
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::metrics))
}

fn finish(router: Router<AppState>, state: AppState) -> Router {
    router
        .fallback(async || {
            ApiError::new(
                StatusCode::NOT_FOUND,
                Code::NotFound,
                "there is no such route; `/` lists them",
            )
        })
        .method_not_allowed_fallback(async || {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                Code::MethodNotAllowed,
                "the route does not have this method; `Allow` lists those it has",
            )
        })
        // Bodies are bounded where they are read.
        .layer(DefaultBodyLimit::disable())
        .layer(CatchPanicLayer::custom(envelope::caught_panic))
        .layer(middleware::from_fn(envelope::seal))
        .with_state(state)
}
