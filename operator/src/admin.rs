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
    let router = Router::new()
        .route("/livez", get(live))
        .route("/healthz", get(live))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Admin {
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
    use super::*;

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
