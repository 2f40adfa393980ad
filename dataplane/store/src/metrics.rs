//! Every instrument of the stores, named once. The API and the workers have their own beside these.
//!
//! Names follow `birbnest_<area>_<what>`; the Prometheus reader appends units and `_total`. Labels come from closed
//! sets: never a key, never an error's text.

use std::sync::LazyLock;

use opentelemetry::{
    KeyValue, global,
    metrics::{Counter, Gauge, Meter},
};

/// The instruments; they count into whatever meter provider was installed before their first use.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics::new(&meter()));

/// The meter all of birb-nest's instruments belong to.
#[must_use]
pub fn meter() -> Meter {
    global::meter("birb-nest")
}

/// Instruments of the stores.
pub struct Metrics {
    reads: Counter<u64>,
    rehydrations: Counter<u64>,
    writes: Counter<u64>,
    errors: Counter<u64>,
    redis_flushes: Counter<u64>,
    repairs_pending: Gauge<u64>,
    dependency_up: Gauge<u64>,
    pool_connections: Gauge<u64>,
    clock_skew: Gauge<f64>,
    shards_fenced: Gauge<u64>,
    redis_debts: Counter<u64>,
}

impl Metrics {
    fn new(meter: &Meter) -> Self {
        let metrics = Self::build(meter);
        // Seen before it counts: an alert on its increase would miss the first.
        metrics.count_errors(0, "log_lost_its_tail");
        metrics
    }

    fn build(meter: &Meter) -> Self {
        Self {
            reads: meter
                .u64_counter("birbnest_cache_reads")
                .with_description(
                    "Lookups by the store that answered and whether the key has a value",
                )
                .build(),
            rehydrations: meter
                .u64_counter("birbnest_cache_rehydrations")
                .with_description(
                    "Entries put back into Redis after a miss, by the store they came from",
                )
                .build(),
            writes: meter
                .u64_counter("birbnest_cache_writes")
                .with_description("Acknowledged writes and deletes, by whether Redis was told")
                .build(),
            errors: meter
                .u64_counter("birbnest_errors")
                .with_description("Failed operations on a server")
                .build(),
            redis_flushes: meter
                .u64_counter("birbnest_redis_flushes")
                .with_description(
                    "Times the Redis database was emptied because it could not be trusted",
                )
                .build(),
            repairs_pending: meter
                .u64_gauge("birbnest_redis_repairs_pending")
                .with_description(
                    "Keys whose older value in Redis this process still has to delete",
                )
                .build(),
            dependency_up: meter
                .u64_gauge("birbnest_dependency_up")
                .with_description("1 while the server is connected, checked and usable")
                .build(),
            pool_connections: meter
                .u64_gauge("birbnest_postgres_pool_connections")
                .with_description("Connections of the lookup pool by state")
                .build(),
            shards_fenced: meter
                .u64_gauge("birbnest_shards_fenced")
                .with_description(
                    "Shards that take no writes until workers have stored what is left of a log that lost its tail",
                )
                .build(),
            redis_debts: meter
                .u64_counter("birbnest_redis_debts")
                .with_description(
                    "Times a shard stored what Redis could not be told of (incurred), or Redis was emptied for it (paid)",
                )
                .build(),
            clock_skew: meter
                .f64_gauge("birbnest_clock_skew")
                .with_unit("s")
                .with_description("How far the followed clock is ahead of this machine's")
                .build(),
        }
    }

    /// One lookup ended: `source` is `redis`, `log`, `postgres` or `none`.
    pub fn read(&self, source: &'static str, found: bool) {
        self.reads.add(
            1,
            &[
                KeyValue::new("source", source),
                KeyValue::new("found", found),
            ],
        );
    }

    /// One entry (or the knowledge that there is none) was put back into Redis.
    pub fn rehydrated(&self, source: &'static str) {
        self.rehydrations.add(1, &[KeyValue::new("source", source)]);
    }

    /// One write was acknowledged: `operation` is `set` or `delete`, `cache` is `installed` or `pending`.
    pub fn wrote(&self, operation: &'static str, cache: &'static str) {
        self.writes.add(
            1,
            &[
                KeyValue::new("operation", operation),
                KeyValue::new("cache", cache),
            ],
        );
    }

    /// One `operation` failed, e.g. `log_publish` or `redis_install`.
    pub fn error(&self, operation: &'static str) {
        self.count_errors(1, operation);
    }

    fn count_errors(&self, n: u64, operation: &'static str) {
        self.errors.add(n, &[KeyValue::new("operation", operation)]);
    }

    /// The Redis database was emptied.
    pub fn redis_flushed(&self) {
        self.redis_flushes.add(1, &[]);
    }

    /// How many keys await repair.
    pub fn repairs_pending(&self, n: usize) {
        self.repairs_pending.record(n as u64, &[]);
    }

    /// `dependency` is `redis`, `nats` or `postgres`.
    pub fn dependency_up(&self, dependency: &'static str, up: bool) {
        self.dependency_up
            .record(u64::from(up), &[KeyValue::new("dependency", dependency)]);
    }

    /// The lookup pool's connections.
    pub fn pool(&self, n_idle: usize, n_used: usize) {
        for (state, n) in [("idle", n_idle), ("used", n_used)] {
            self.pool_connections
                .record(n as u64, &[KeyValue::new("state", state)]);
        }
    }

    /// How many shards are fenced, as this process knows.
    pub fn shards_fenced(&self, n: usize) {
        self.shards_fenced.record(n as u64, &[]);
    }

    /// Redis could not be told of what a shard stored (`incurred`), or was emptied for it (`paid`).
    pub fn redis_debt(&self, what: &'static str, n: usize) {
        self.redis_debts
            .add(n as u64, &[KeyValue::new("what", what)]);
    }

    /// The followed clock's lead in seconds.
    pub fn clock_skew(&self, seconds: f64) {
        self.clock_skew.record(seconds, &[]);
    }
}
