//! Instruments of HTTP, and `/metrics`.

use std::{sync::LazyLock, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use birb_nest_store::metrics::meter;
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram},
};
use prometheus::{Registry, TextEncoder, proto::MetricFamily};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{error::ApiError, state::AppState};

static REQUESTS: LazyLock<Histogram<f64>> = LazyLock::new(|| {
    meter()
        .f64_histogram("birbnest_http_request_duration")
        .with_description(
            "Time from a request's head to its response's, by route, method and status",
        )
        .with_unit("s")
        .with_boundaries(vec![
            0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
        ])
        .build()
});

static KEYS_NOT_READ: LazyLock<Counter<u64>> = LazyLock::new(|| {
    meter()
        .u64_counter("birbnest_api_keys_not_read")
        .with_description("Times API_KEYS_FILE could not be used, and the keys stayed as they were")
        .build()
});

static CONNECTIONS_REFUSED: LazyLock<Counter<u64>> = LazyLock::new(|| {
    meter()
        .u64_counter("birbnest_api_connections_refused")
        .with_description(
            "Connections that were closed at once, since there were API_MAX_CONNECTIONS",
        )
        .build()
});

static REQUESTS_REFUSED: LazyLock<Counter<u64>> = LazyLock::new(|| {
    meter()
        .u64_counter("birbnest_api_requests_refused")
        .with_description("Requests that were refused, since API_MAX_CONCURRENCY were under way")
        .build()
});

/// Counts a request that had no room.
pub fn request_refused() {
    REQUESTS_REFUSED.add(1, &[]);
}

/// Counts a connection that had no room.
pub fn connection_refused() {
    CONNECTIONS_REFUSED.add(1, &[]);
}

/// Counts a look at the file of keys that led to nothing.
pub fn keys_not_read() {
    KEYS_NOT_READ.add(1, &[]);
}

/// Counts one request. `route` is the template it matched, never its path.
pub fn request(route: String, method: &Method, status: StatusCode, took: Duration) {
    let method = match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    REQUESTS.record(
        took.as_secs_f64(),
        &[
            KeyValue::new("route", route),
            KeyValue::new("method", method),
            KeyValue::new("status", i64::from(status.as_u16())),
        ],
    );
}

#[derive(Serialize, ToSchema)]
struct Summary {
    cache_hits: u64,
    cache_misses: u64,
    cache_hit_rate: f64,
    total_requests: u64,
    total_errors: u64,
    average_latency_ms: f64,
}

/// GET /metrics: Prometheus text, or a summary for who accepts JSON and not text.
#[utoipa::path(get, path = "/metrics", tag = "about", responses((status = 200, description = "Prometheus text, or a summary as JSON", content((String = "text/plain"), (Summary = "application/json")))))]
pub async fn metrics(State(state): State<AppState>, headers: HeaderMap) -> Response {
    let wants_json = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|accept| {
            accept.contains("application/json") && !accept.contains("text/plain")
        });
    if wants_json {
        return Json(summary(&state.registry.gather())).into_response();
    }
    text(&state.registry)
}

fn text(registry: &Registry) -> Response {
    match TextEncoder::new().encode_to_string(&registry.gather()) {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics could not be encoded");
            ApiError::internal().into_response()
        }
    }
}

/// A hit is a read that Redis answered; everything else that was found or not found elsewhere is a miss.
fn summary(families: &[MetricFamily]) -> Summary {
    let metrics = |name: &'static str| {
        families
            .iter()
            .filter(move |family| family.name() == name)
            .flat_map(MetricFamily::get_metric)
    };
    let label = |metric: &prometheus::proto::Metric, name: &str| {
        metric
            .get_label()
            .iter()
            .find(|label| label.name() == name)
            .map(|label| label.value().to_owned())
            .unwrap_or_default()
    };
    let (mut cache_hits, mut reads) = (0, 0);
    for metric in metrics("birbnest_cache_reads_total") {
        let n = metric.get_counter().get_value() as u64;
        reads += n;
        if label(metric, "source") == "redis" {
            cache_hits += n;
        }
    }
    let (mut total_requests, mut total_errors, mut seconds) = (0, 0, 0.0);
    for metric in metrics("birbnest_http_request_duration_seconds") {
        let histogram = metric.get_histogram();
        total_requests += histogram.get_sample_count();
        seconds += histogram.get_sample_sum();
        if label(metric, "status").starts_with('5') {
            total_errors += histogram.get_sample_count();
        }
    }
    let ratio = |part: f64, whole: u64| if whole == 0 { 0.0 } else { part / whole as f64 };
    Summary {
        cache_hits,
        cache_misses: reads - cache_hits,
        cache_hit_rate: ratio(cache_hits as f64, reads),
        total_requests,
        total_errors,
        average_latency_ms: ratio(seconds * 1000.0, total_requests),
    }
}
