//! Instruments of the worker, named once.

use std::{sync::LazyLock, time::Duration};

use birb_nest_core::Shard;
use birb_nest_store::{jetstream::Depth, metrics::meter};
use opentelemetry::{
    KeyValue,
    metrics::{Counter, Gauge, Histogram},
};

pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

pub struct Metrics {
    log_messages: Gauge<u64>,
    log_bytes: Gauge<u64>,
    log_lag: Gauge<u64>,
    log_oldest_age: Gauge<f64>,
    owned: Gauge<u64>,
    members: Gauge<u64>,
    batch_messages: Histogram<u64>,
    batch_rows: Histogram<u64>,
    flush_duration: Histogram<f64>,
    rows_changed: Counter<u64>,
}

impl Metrics {
    fn new() -> Self {
        let meter = meter();
        let sizes = || vec![1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];
        Self {
            log_messages: meter
                .u64_gauge("birbnest_log_messages")
                .with_description("Messages in a shard's stream, stored but not yet trimmed ones included")
                .build(),
            log_bytes: meter
                .u64_gauge("birbnest_log_size")
                .with_unit("By")
                .with_description("Bytes in a shard's stream")
                .build(),
            log_lag: meter
                .u64_gauge("birbnest_log_lag")
                .with_description("Messages of a shard that are not in PostgreSQL yet, as its owner last saw it")
                .build(),
            log_oldest_age: meter
                .f64_gauge("birbnest_log_oldest_age")
                .with_unit("s")
                .with_description("Age of the oldest message of a shard that is not in PostgreSQL yet; 0 when there is none")
                .build(),
            owned: meter
                .u64_gauge("birbnest_shard_owned")
                .with_description("1 while this worker owns the shard")
                .build(),
            members: meter
                .u64_gauge("birbnest_worker_members")
                .with_description("Workers that are there, as this one last counted")
                .build(),
            batch_messages: meter
                .u64_histogram("birbnest_worker_batch_messages")
                .with_description("Messages per batch")
                .with_boundaries(sizes())
                .build(),
            batch_rows: meter
                .u64_histogram("birbnest_worker_batch_rows")
                .with_description("Rows per batch: fewer than messages where writes to one key came together")
                .with_boundaries(sizes())
                .build(),
            flush_duration: meter
                .f64_histogram("birbnest_worker_flush_duration")
                .with_unit("s")
                .with_description("Time from a closed batch to its commit, by outcome")
                .with_boundaries(vec![
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
                ])
                .build(),
            rows_changed: meter
                .u64_counter("birbnest_worker_rows_changed")
                .with_description("Rows inserted or replaced")
                .build(),
        }
    }

    pub fn depth(&self, shard: Shard, depth: Depth) {
        self.log_messages.record(depth.n_messages, &of(shard));
        self.log_bytes.record(depth.n_bytes, &of(shard));
    }

    pub fn lag(&self, shard: Shard, n_messages: u64, oldest: Duration) {
        self.log_lag.record(n_messages, &of(shard));
        self.log_oldest_age.record(oldest.as_secs_f64(), &of(shard));
    }

    pub fn owned(&self, shard: Shard, owned: bool) {
        self.owned.record(u64::from(owned), &of(shard));
    }

    pub fn members(&self, n: usize) {
        self.members.record(n as u64, &[]);
    }

    pub fn batch(&self, n_messages: usize, n_rows: usize, n_changed: u64) {
        self.batch_messages.record(n_messages as u64, &[]);
        self.batch_rows.record(n_rows as u64, &[]);
        self.rows_changed.add(n_changed, &[]);
    }

    pub fn flush(&self, took: Duration, outcome: &'static str) {
        self.flush_duration
            .record(took.as_secs_f64(), &[KeyValue::new("outcome", outcome)]);
    }
}

fn of(shard: Shard) -> [KeyValue; 1] {
    [KeyValue::new("shard", i64::from(shard.as_i16()))]
}
