//! What probes and Prometheus ask.

use std::{
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus::{Registry, TextEncoder};

use crate::config::Config;

/// Whether this process can do its work: standing by is its work too.
#[derive(Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// From now on it can, or cannot.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }
}

/// Longest time without a beat of a loop that lives. Passes take less than this from one wait to the next; only a thread that
/// is blocked takes more.
const SILENCE: Duration = Duration::from_secs(60);

/// Whether the control loop goes on. A process that stands by has none, and lives.
#[derive(Clone, Default)]
pub struct Liveness(Arc<Mutex<Option<Instant>>>);

impl Liveness {
    /// The loop has come by.
    pub fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn lives(&self, now: Instant) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_none_or(|last| now.saturating_duration_since(last) < SILENCE)
    }
}

#[derive(Clone)]
struct Admin {
    registry: Registry,
    readiness: Readiness,
    liveness: Liveness,
}

/// Binds the admin port; the returned future serves it.
///
/// # Errors
/// If the port cannot be had.
pub async fn listen(
    config: &Config,
    registry: Registry,
    readiness: Readiness,
    liveness: Liveness,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    let address = SocketAddr::new(config.admin_host, config.admin_port);
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| {
            format!("failed to listen on {address}; ADMIN_HOST and ADMIN_PORT choose another")
        })?;
    tracing::info!(
        "probes and metrics are on http://{}",
        listener.local_addr()?
    );
    let router = router(Admin {
        registry,
        readiness,
        liveness,
    });
    Ok(async move {
        axum::serve(listener, router)
            .await
            .context("failed to serve the admin port")
    })
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/livez", get(live))
        .route("/healthz", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(admin)
}

async fn live(State(admin): State<Admin>) -> Response {
    if admin.liveness.lives(Instant::now()) {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        let words = "the control loop has stood still for a minute\n";
        (StatusCode::SERVICE_UNAVAILABLE, words).into_response()
    }
}

async fn ready(State(admin): State<Admin>) -> Response {
    if admin.readiness.0.load(Ordering::Relaxed) {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        let words = "the API server has not answered yet, or this process is ending\n";
        (StatusCode::SERVICE_UNAVAILABLE, words).into_response()
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    match TextEncoder::new().encode_to_string(&admin.registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics could not be encoded");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    /// An admin port that is served, and what its answers hang on.
    async fn served() -> (SocketAddr, Readiness, Liveness) {
        let (readiness, liveness) = (Readiness::default(), Liveness::default());
        let router = router(Admin {
            registry: Registry::new(),
            readiness: readiness.clone(),
            liveness: liveness.clone(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        // It ends with the test.
        tokio::spawn(async move { axum::serve(listener, router).await });
        (address, readiness, liveness)
    }

    /// Status and body of the answer.
    async fn ask(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.0\r\nhost: it\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap();
        (status.parse().unwrap(), body.to_owned())
    }

    async fn check(address: SocketAddr, path: &str, status: u16, words: &str) {
        let (found, body) = ask(address, path).await;
        assert_eq!(found, status, "{path}: {body}");
        assert!(body.contains(words), "{path}: {body}");
    }

    #[tokio::test]
    async fn a_process_is_ready_while_it_says_so_and_no_longer() {
        let (address, readiness, _) = served().await;
        check(address, "/readyz", 503, "has not answered yet").await;
        // It lives, or it would be killed while it waits.
        check(address, "/livez", 200, "ok").await;
        readiness.set(true);
        check(address, "/readyz", 200, "ok").await;
        readiness.set(false);
        check(address, "/readyz", 503, "is ending").await;
    }

    #[tokio::test]
    async fn a_process_is_alive_until_its_loop_has_been_silent_for_too_long() {
        let (address, readiness, liveness) = served().await;
        readiness.set(true);
        let silent_for = |silence: Duration| {
            let last = Instant::now().checked_sub(silence);
            *liveness.0.lock().unwrap() = Some(last.expect("the machine runs for longer"));
        };
        for path in ["/livez", "/healthz"] {
            liveness.beat();
            check(address, path, 200, "ok").await;
            silent_for(SILENCE - Duration::from_secs(10));
            check(address, path, 200, "ok").await;
            silent_for(SILENCE);
            check(address, path, 503, "stood still").await;
            check(address, "/readyz", 200, "ok").await;
            liveness.beat();
            check(address, path, 200, "ok").await;
        }
    }

    #[test]
    fn a_loop_that_stands_still_is_not_alive() {
        let liveness = Liveness::default();
        let start = Instant::now();
        assert!(liveness.lives(start + SILENCE * 2), "standing by");
        liveness.beat();
        assert!(liveness.lives(Instant::now()));
        assert!(!liveness.lives(Instant::now() + SILENCE));
    }
}
