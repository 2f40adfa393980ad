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
    batch, dead_letters, debug, entries, envelope,
    error::{ApiError, Code},
    health, list, metrics, raw, rehydrate,
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
    "PATCH /v1/cache/{key}",
    "GET /v1/cache?prefix=",
    "DELETE /v1/cache?prefix=",
    "POST /v1/cache/batch/get",
    "POST /v1/cache/batch/set",
    "POST /v1/cache/batch/delete",
    "GET /v1/raw/{key}",
    "HEAD /v1/raw/{key}",
    "PUT /v1/raw/{key}",
    "POST /v1/rehydrate",
    "GET /v1/dead-letters",
    "DELETE /v1/dead-letters",
    "POST /v1/dead-letters/replay",
    "GET /v1/dead-letters/{id}",
    "DELETE /v1/dead-letters/{id}",
    "POST /v1/dead-letters/{id}/replay",
    "GET /v1/debug/{key}",
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
                .patch(entries::touch)
                .delete(entries::delete),
        )
        .route("/v1/cache", get(list::list).delete(list::delete))
        .route(BATCH_GET, post(batch::get))
        .route("/v1/cache/batch/set", post(batch::set))
        .route("/v1/cache/batch/delete", post(batch::delete))
        .route("/v1/rehydrate", post(rehydrate::ask))
        .route(
            "/v1/dead-letters",
            get(dead_letters::list).delete(dead_letters::purge_all),
        )
        .route("/v1/dead-letters/replay", post(dead_letters::replay_all))
        .route(
            "/v1/dead-letters/{id}",
            get(dead_letters::get).delete(dead_letters::purge),
        )
        .route("/v1/dead-letters/{id}/replay", post(dead_letters::replay))
        .route("/v1/debug/{key}", get(debug::get))
        .route_layer(middleware::from_fn(envelope::answers_json))
        .route("/v1/raw/{key}", get(raw::get).put(raw::put))
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
    enclose(router).with_state(state)
}

/// What every route has around it, and what is answered where there is none.
fn enclose<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
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
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// Sends a request on a connection that stays open, and returns the response's status line and body.
    async fn ask(connection: &mut TcpStream, path: &str) -> (String, String) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nx-request-id: seven\r\n\r\n");
        connection
            .write_all(request.as_bytes())
            .await
            .expect("sent");
        let mut response = String::new();
        loop {
            if let Some((head, body)) = response.split_once("\r\n\r\n") {
                let length: usize = head
                    .lines()
                    .find_map(|line| line.strip_prefix("content-length: "))
                    .and_then(|length| length.parse().ok())
                    .expect("a length");
                if body.len() == length {
                    let status = head.lines().next().unwrap_or_default();
                    return (status.to_owned(), body.to_owned());
                }
            }
            let mut bytes = [0; 1024];
            let n = connection.read(&mut bytes).await.expect("received");
            assert!(n > 0, "the connection was closed after {response:?}");
            response.push_str(std::str::from_utf8(&bytes[..n]).expect("text"));
        }
    }

    #[tokio::test]
    async fn a_handler_that_panics_costs_its_own_request_alone() {
        let routes = Router::new()
            .route(
                "/panics",
                get(async || -> &'static str { panic!("on purpose") }),
            )
            .route("/works", get(async || "fine"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move { axum::serve(listener, enclose(routes)).await });
        let mut connection = TcpStream::connect(address).await.expect("connected");
        for _ in 0..3 {
            let (status, body) = ask(&mut connection, "/panics").await;
            assert_eq!(status, "HTTP/1.1 500 Internal Server Error");
            assert!(body.contains("\"code\":\"INTERNAL_ERROR\""), "{body}");
            assert!(body.contains("\"request_id\":\"seven\""), "{body}");
            assert!(!body.contains("on purpose"), "{body}");
            let (status, body) = ask(&mut connection, "/works").await;
            assert_eq!(
                (status.as_str(), body.as_str()),
                ("HTTP/1.1 200 OK", "fine")
            );
        }
    }
}
