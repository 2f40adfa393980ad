//! What probes and Prometheus ask a worker.

use std::{
    future::Future,
    net::{SocketAddr, TcpListener},
    time::Duration,
};

use anyhow::Context;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use birb_nest_http::{ADMIN_CONNECTIONS, Bounded, Limit, Patience};
use birb_nest_store::{jetstream::Log, postgres::Database};
use prometheus::{Registry, TextEncoder};
use tokio_util::sync::CancellationToken;

use crate::{config::WorkerConfig, metrics::METRICS};

/// Those who ask know what they want: ten seconds for a request, a minute between two, and half of one to take an answer.
const PATIENCE: Patience = Patience {
    header: Duration::from_secs(10),
    keepalive: Duration::from_secs(60),
};
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct Admin {
    registry: Registry,
    log: Log,
    database: Database,
    stopping: CancellationToken,
}

/// Binds the admin port; the returned future serves it until `stopping`.
pub fn listen(
    config: &WorkerConfig,
    registry: Registry,
    log: Log,
    database: Database,
    stopping: CancellationToken,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>> + use<>> {
    let address = SocketAddr::new(config.worker_admin_host, config.worker_admin_port);
    let listener = TcpListener::bind(address).with_context(|| {
        format!(
            "failed to listen on {address}; WORKER_ADMIN_HOST and WORKER_ADMIN_PORT choose another"
        )
    })?;
    tracing::info!(
        "probes and metrics are on http://{}",
        listener.local_addr()?
    );
    let router = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(Admin {
            registry,
            log,
            database,
            stopping: stopping.clone(),
        });
    let server = axum_server::from_tcp(listener)
        .with_context(|| format!("failed to listen on {address}"))?
        .acceptor(Bounded::new(Limit {
            n: ADMIN_CONNECTIONS,
            setting: "all that WORKER_ADMIN_PORT has room for",
            patience: ANSWER_PATIENCE,
            count_refused: || METRICS.connection_refused(),
        }));
    let server = PATIENCE.bound(server);
    Ok(async move {
        // Probes are answered to the end; the process ends when its work does.
        server
            .serve(router.into_make_service())
            .await
            .context("failed to serve the admin port")
    })
}

/// 200 while it can store: that takes the log and PostgreSQL.
async fn ready(State(admin): State<Admin>) -> Response {
    let missing: Vec<&str> = [
        (admin.stopping.is_cancelled(), "stopping"),
        (admin.log.session().is_none(), "nats"),
        (!admin.database.is_up(), "database"),
    ]
    .into_iter()
    .filter_map(|(is, name)| is.then_some(name))
    .collect();
    let code = if missing.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = serde_json::json!({ "ready": missing.is_empty(), "missing": missing });
    (code, axum::Json(body)).into_response()
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
