//! Instruments, named once. Labels are closed sets.

use std::{sync::LazyLock, time::Duration};

use opentelemetry::{
    KeyValue, global,
    metrics::{Counter, Gauge, Histogram},
};

use crate::render::Kind;

/// The instruments of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// What is counted.
pub struct Metrics {
    passes: Counter<u64>,
    pass_duration: Histogram<f64>,
    applied: Counter<u64>,
    drift_repaired: Counter<u64>,
    unreadable: Counter<u64>,
    watch_errors: Counter<u64>,
    external_calls: Counter<u64>,
    events: Counter<u64>,
    leader: Gauge<u64>,
}

impl Metrics {
    fn new() -> Self {
        let meter = global::meter("birb-nest-operator");
        Self {
            passes: meter
                .u64_counter("birbnest_operator_reconciles")
                .with_description("Passes over a nest, by result and reason")
                .build(),
            pass_duration: meter
                .f64_histogram("birbnest_operator_reconcile_duration")
                .with_description("How long a pass takes")
                .with_unit("s")
                .with_boundaries(vec![0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0])
                .build(),
            applied: meter
                .u64_counter("birbnest_operator_applies")
                .with_description("Objects applied, by kind and whether that changed them")
                .build(),
            drift_repaired: meter
                .u64_counter("birbnest_operator_drift_repaired")
                .with_description(
                    "Objects put back that somebody else had changed or deleted, by kind",
                )
                .build(),
            unreadable: meter
                .u64_counter("birbnest_operator_unreadable")
                .with_description("Objects watched that do not fit their type, by kind")
                .build(),
            watch_errors: meter
                .u64_counter("birbnest_operator_watch_errors")
                .with_description("Watches that failed and were begun again, by kind")
                .build(),
            external_calls: meter
                .u64_counter("birbnest_operator_external_calls")
                .with_description("Requests to servers of nests, by server and result")
                .build(),
            events: meter
                .u64_counter("birbnest_operator_events")
                .with_description("Events published, by whether the API server took them")
                .build(),
            leader: meter
                .u64_gauge("birbnest_operator_leader")
                .with_description("1 in the process that acts, 0 in those that stand by")
                .build(),
        }
    }

    /// A pass has ended; `result` is `ok`, `blocked` or `error`, and `reason` that of `Ready` or an error's label.
    pub fn pass(&self, result: &'static str, reason: &str, duration: Duration) {
        let labels = [
            KeyValue::new("result", result),
            KeyValue::new("reason", reason.to_owned()),
        ];
        self.passes.add(1, &labels);
        self.pass_duration.record(duration.as_secs_f64(), &[]);
    }

    /// An object was applied.
    pub fn applied(&self, kind: Kind, changed: bool) {
        let labels = [
            KeyValue::new("kind", kind.as_str()),
            KeyValue::new("changed", changed),
        ];
        self.applied.add(1, &labels);
    }

    /// An object was put back.
    pub fn drift_repaired(&self, kind: Kind) {
        self.drift_repaired
            .add(1, &[KeyValue::new("kind", kind.as_str())]);
    }

    /// An object of this kind cannot be read.
    pub fn unreadable(&self, kind: &'static str) {
        self.unreadable.add(1, &[KeyValue::new("kind", kind)]);
    }

    /// The watch of this kind has failed.
    pub fn watch_error(&self, kind: &'static str) {
        self.watch_errors.add(1, &[KeyValue::new("kind", kind)]);
    }

    /// The lag was asked for; `result` is `ok` or a trouble's label.
    pub fn nats_asked(&self, result: &'static str) {
        let labels = [
            KeyValue::new("dependency", "nats"),
            KeyValue::new("result", result),
        ];
        self.external_calls.add(1, &labels);
    }

    /// An event was sent.
    pub fn event(&self, taken: bool) {
        self.events.add(1, &[KeyValue::new("taken", taken)]);
    }

    /// Whether this process acts.
    pub fn leader(&self, leads: bool) {
        self.leader.record(u64::from(leads), &[]);
    }
}
