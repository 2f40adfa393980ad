//! `/`, `/health` for people, `/livez` and `/readyz` for probes.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{router, state::AppState};

const SERVICE: &str = "birb-nest";
const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Serialize, ToSchema)]
struct Info {
    service: &'static str,
    version: &'static str,
    endpoints: Vec<String>,
}

/// GET /: what this is.
#[utoipa::path(get, path = "/", tag = "about", responses((status = 200, description = "name, version, routes", body = Info)))]
pub async fn index() -> Response {
    Json(Info {
        service: SERVICE,
        version: VERSION,
        endpoints: router::endpoints(),
    })
    .into_response()
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Check {
    Ok,
    Down,
}

#[derive(Clone, Copy, Serialize, ToSchema)]
struct Checks {
    database: Check,
    redis: Check,
    nats: Check,
}

#[derive(Serialize, ToSchema)]
struct Health {
    status: &'static str,
    service: &'static str,
    version: &'static str,
    uptime: String,
    checks: Checks,
}

#[derive(Serialize, ToSchema)]
struct Readiness {
    ready: bool,
    /// What is missing: `stopping`, `nats`, `redis`, `database`.
    missing: Vec<&'static str>,
    /// Shards whose log lost its tail: their writes are 503 until workers have stored what is left of it.
    fenced_shards: usize,
}

fn checks(state: &AppState) -> Checks {
    let check = |up| if up { Check::Ok } else { Check::Down };
    Checks {
        database: check(state.nest.database().is_up()),
        redis: check(state.nest.cache().is_up()),
        nats: check(state.nest.log().session().is_some()),
    }
}

/// GET /health: 200 `healthy` or `degraded`, 503 `unhealthy` when writes cannot be taken.
#[utoipa::path(get, path = "/health", tag = "about", responses((status = 200, description = "healthy or degraded", body = Health), (status = 503, description = "unhealthy", body = Health)))]
pub async fn health(State(state): State<AppState>) -> Response {
    let checks = checks(&state);
    let (code, status) = match (checks.nats, checks.redis, checks.database) {
        (Check::Ok, Check::Ok, Check::Ok) => (StatusCode::OK, "healthy"),
        (Check::Ok, _, _) => (StatusCode::OK, "degraded"),
        (Check::Down, _, _) => (StatusCode::SERVICE_UNAVAILABLE, "unhealthy"),
    };
    let uptime = std::time::Duration::from_secs(state.started.elapsed().as_secs());
    let health = Health {
        status,
        service: SERVICE,
        version: VERSION,
        uptime: humantime::format_duration(uptime).to_string(),
        checks,
    };
    uncached(code, Json(health))
}

/// GET /livez: the process answers.
#[utoipa::path(get, path = "/livez", tag = "about", responses((status = 200, description = "the process answers", content_type = "text/plain", body = String)))]
pub async fn live() -> Response {
    uncached(StatusCode::OK, "ok\n")
}

/// GET /readyz: 200 when it can do its job, which takes the log; Redis or PostgreSQL may be down.
#[utoipa::path(get, path = "/readyz", tag = "about", responses((status = 200, description = "ready", body = Readiness), (status = 503, description = "not ready", body = Readiness)))]
pub async fn ready(State(state): State<AppState>) -> Response {
    let checks = checks(&state);
    let stopping = state.stopping.is_cancelled();
    let missing = [
        (stopping, "stopping"),
        (checks.nats == Check::Down, "nats"),
        (checks.redis == Check::Down, "redis"),
        (checks.database == Check::Down, "database"),
    ];
    let ready = !stopping && checks.nats == Check::Ok;
    let readiness = Readiness {
        ready,
        fenced_shards: state
            .nest
            .log()
            .session()
            .map_or(0, |session| session.n_fenced()),
        missing: missing
            .iter()
            .filter(|(is, _)| *is)
            .map(|(_, name)| *name)
            .collect(),
    };
    let code = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    uncached(code, Json(readiness))
}

fn uncached(code: StatusCode, body: impl IntoResponse) -> Response {
    (code, [(header::CACHE_CONTROL, "no-store")], body).into_response()
}
