//! The whole URL table.

use std::time::Duration;

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request},
    http::{HeaderName, HeaderValue, Method, StatusCode},
    middleware,
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, AllowOrigin, CorsLayer},
};
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::{
    access::{self, Role},
    batch, dead_letters, debug, entries, envelope,
    error::{ApiError, Code},
    health, list, metrics, openapi, rate, raw, rehydrate, room,
    state::AppState,
};

/// What needs a key, and of which role, where clients need keys: everything under /v1. HEAD is GET.
const GUARDED: &[(&str, &str, Role)] = &[
    ("GET", "/v1/cache/{key}", Role::Read),
    ("POST", "/v1/cache/{key}", Role::Write),
    ("PUT", "/v1/cache/{key}", Role::Write),
    ("PATCH", "/v1/cache/{key}", Role::Write),
    ("DELETE", "/v1/cache/{key}", Role::Write),
    ("POST", "/v1/cache/batch/get", Role::Read),
    ("POST", "/v1/cache/batch/set", Role::Write),
    ("POST", "/v1/cache/batch/delete", Role::Write),
    ("GET", "/v1/raw/{key}", Role::Read),
    ("PUT", "/v1/raw/{key}", Role::Write),
    ("GET", "/v1/cache", Role::Admin),
    ("DELETE", "/v1/cache", Role::Admin),
    ("POST", "/v1/rehydrate", Role::Admin),
    ("GET", "/v1/dead-letters", Role::Admin),
    ("DELETE", "/v1/dead-letters", Role::Admin),
    ("POST", "/v1/dead-letters/replay", Role::Admin),
    ("GET", "/v1/dead-letters/{id}", Role::Admin),
    ("DELETE", "/v1/dead-letters/{id}", Role::Admin),
    ("POST", "/v1/dead-letters/{id}/replay", Role::Admin),
    ("GET", "/v1/debug/{key}", Role::Admin),
];

/// What needs no key.
const OPEN: &[(&str, &str)] = &[
    ("GET", "/"),
    ("GET", "/health"),
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
];

/// What `/` lists.
pub fn endpoints() -> Vec<String> {
    let guarded = GUARDED.iter().map(|(method, path, _)| (method, path));
    let open = OPEN.iter().map(|(method, path)| (method, path));
    guarded
        .chain(open)
        .map(|(method, path)| format!("{method} {path}"))
        .collect()
}

/// The role that a request needs. What is not in the table is for administrators.
pub fn role(request: &Request) -> Role {
    let path = request.extensions().get::<MatchedPath>();
    let path = path.map_or("", MatchedPath::as_str);
    role_of(request.method().as_str(), path).unwrap_or(Role::Admin)
}

/// The role that a route needs; `None` when it is not in the table.
pub fn role_of(method: &str, path: &str) -> Option<Role> {
    let method = if method == "HEAD" { "GET" } else { method };
    let found = GUARDED
        .iter()
        .find(|(known, route, _)| (*known, *route) == (method, path));
    found.map(|(_, _, role)| *role)
}

/// Whether a request writes nothing.
pub fn is_read(request: &Request) -> bool {
    matches!(*request.method(), Method::GET | Method::HEAD) || role(request) == Role::Read
}

/// Everything.
pub fn public(state: AppState) -> Router {
    let v1 = v1()
        // The last one is the first that a request comes to.
        .route_layer(middleware::from_fn_with_state(
            state.clone(),
            envelope::bound,
        ))
        .route_layer(middleware::from_fn_with_state(
            state.clone(),
            access::authorize,
        ))
        .route_layer(middleware::from_fn_with_state(state.clone(), rate::limit))
        .route_layer(middleware::from_fn_with_state(
            state.clone(),
            access::identify,
        ));
    let (router, _) = about().merge(v1).split_for_parts();
    let page = SwaggerUi::new("/docs").config(Config::from("/openapi.json"));
    let router = router.merge(page);
    let origins = &state.config.api_cors_origins;
    let cors = (!origins.is_empty()).then(|| cors(origins));
    let patient = middleware::from_fn_with_state(state.clone(), room::patiently);
    enclose(router.layer(patient), cors).with_state(state)
}

/// What needs a key.
fn v1() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(
            entries::get,
            entries::post,
            entries::put,
            entries::touch,
            entries::delete
        ))
        .routes(routes!(list::list, list::delete))
        .routes(routes!(batch::get))
        .routes(routes!(batch::set))
        .routes(routes!(batch::delete))
        .routes(routes!(rehydrate::ask))
        .routes(routes!(dead_letters::list, dead_letters::purge_all))
        .routes(routes!(dead_letters::replay_all))
        .routes(routes!(dead_letters::get, dead_letters::purge))
        .routes(routes!(dead_letters::replay))
        .routes(routes!(debug::get))
        .route_layer(middleware::from_fn(envelope::answers_json))
        .routes(routes!(raw::get, raw::put))
}

/// What tells about the process.
fn about() -> OpenApiRouter<AppState> {
    probes()
        .routes(routes!(health::index))
        .routes(routes!(health::health))
        .routes(routes!(openapi::document))
}

/// The whole document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let router = OpenApiRouter::with_openapi(openapi::base());
    let (_, document) = router.merge(about()).merge(v1()).split_for_parts();
    openapi::complete(document)
}

/// Which pages of other origins may use the API from a browser. A preflight needs no key.
fn cors(origins: &[String]) -> CorsLayer {
    let layer = CorsLayer::new()
        .allow_methods([
            Method::GET,
            Method::HEAD,
            Method::POST,
            Method::PUT,
            Method::PATCH,
            Method::DELETE,
        ])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(
            [
                "etag",
                "retry-after",
                "x-request-id",
                "birb-source",
                "birb-cache",
                "birb-durability",
                "birb-ttl",
                "x-ratelimit-limit",
                "x-ratelimit-remaining",
                "x-ratelimit-reset",
            ]
            .map(HeaderName::from_static),
        )
        .max_age(Duration::from_secs(600));
    if origins.iter().any(|origin| origin == "*") {
        return layer.allow_origin(AllowOrigin::any());
    }
    let origins = origins
        .iter()
        .filter_map(|origin| HeaderValue::try_from(origin).ok());
    layer.allow_origin(AllowOrigin::list(origins))
}

/// What is served on the admin port.
pub fn admin(state: AppState) -> Router {
    let (router, _) = probes().split_for_parts();
    let patient = middleware::from_fn_with_state(state.clone(), room::patiently);
    enclose(router.layer(patient), None).with_state(state)
}

fn probes() -> OpenApiRouter<AppState> {
    OpenApiRouter::new()
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(metrics::metrics))
}

/// What every route has around it, and what is answered where there is none.
fn enclose<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    cors: Option<CorsLayer>,
) -> Router<S> {
    let router = router
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
        .layer(CatchPanicLayer::custom(envelope::caught_panic));
    // Around the refusals, too: a preflight asks for a method that no route has.
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(middleware::from_fn(envelope::seal))
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
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
        tokio::spawn(async move { axum::serve(listener, enclose(routes, None)).await });
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
