//! Instruments of the worker, named once.

use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use birb_nest_core::Shard;
use birb_nest_store::{jetstream::Depth, metrics::meter};
use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Counter, Gauge, Histogram, Meter},
};

pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

pub struct Metrics {
    shards: Shards,
    members: Gauge<u64>,
    batch_messages: Histogram<u64>,
    batch_rows: Histogram<u64>,
    flush_duration: Histogram<f64>,
    rows_changed: Counter<u64>,
    halved: Counter<u64>,
    dead_lettered: Counter<u64>,
    evictions: Counter<u64>,
    reaped: Counter<u64>,
    warmed: Counter<u64>,
    rehydrations: Counter<u64>,
    went_back: Counter<u64>,
    rests: Counter<u64>,
    connections_refused: Counter<u64>,
    lost: Counter<u64>,
    lives: Counter<u64>,
}

/// What a request to warm Redis asks for.
#[derive(Clone, Copy)]
pub enum Rehydration {
    Keys,
    Prefix,
    Everything,
}

/// What is shown of each shard that this worker owns. One that it does not own is not shown at all: a zero would say
/// that all is well with a shard that perhaps nobody looks after.
type Shards = Arc<Mutex<BTreeMap<Shard, Owned>>>;

#[derive(Clone, Copy)]
struct Owned {
    depth: Depth,
    lag: u64,
    dead: (u64, u64),
    /// How old the oldest message in hand was, and when.
    oldest: Option<(Duration, Instant)>,
}

impl Metrics {
    fn new() -> Self {
        let metrics = Self::build();
        // Seen before it counts: an alert on its increase would miss the first.
        metrics.went_back.add(0, &[]);
        metrics
    }

    fn build() -> Self {
        let meter = meter();
        let shards = Shards::default();
        let owned = shards.clone();
        meter
            .u64_observable_gauge("birbnest_worker_shards")
            .with_description("Shards that this worker owns; 0 while it owns none")
            .with_callback(move |observer| {
                observer.observe(lock(&owned).len() as u64, &[]);
            })
            .build();
        gauge(
            &meter,
            &shards,
            "birbnest_shard_owned",
            "1 for each shard this worker owns",
            None,
            |_| 1.0,
        );
        gauge(
            &meter,
            &shards,
            "birbnest_log_messages",
            "Messages in an owned shard's stream, stored but not yet trimmed ones included",
            None,
            |owned| owned.depth.n_messages as f64,
        );
        gauge(
            &meter,
            &shards,
            "birbnest_log_size",
            "Bytes in an owned shard's stream",
            Some("By"),
            |owned| owned.depth.n_bytes as f64,
        );
        gauge(
            &meter,
            &shards,
            "birbnest_log_lag",
            "Messages of an owned shard that are not in PostgreSQL yet, as its owner last saw it",
            None,
            |owned| owned.lag as f64,
        );
        gauge(
            &meter,
            &shards,
            "birbnest_log_oldest_age",
            "Age of the oldest message of an owned shard that is not in PostgreSQL yet; 0 when there is none",
            Some("s"),
            |owned| {
                owned
                    .oldest
                    .map_or(0.0, |(age, seen)| (age + seen.elapsed()).as_secs_f64())
            },
        );
        gauge(
            &meter,
            &shards,
            "birbnest_dead_letters_waiting",
            "Dead letters of an owned shard that are tried again",
            None,
            |owned| owned.dead.0 as f64,
        );
        gauge(
            &meter,
            &shards,
            "birbnest_dead_letters_parked",
            "Dead letters of an owned shard that wait for a person",
            None,
            |owned| owned.dead.1 as f64,
        );
        let sizes = || vec![1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0];
        Self {
            shards,
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
                .with_description(
                    "Rows per batch: fewer than messages where writes to one key came together",
                )
                .with_boundaries(sizes())
                .build(),
            flush_duration: meter
                .f64_histogram("birbnest_worker_flush_duration")
                .with_unit("s")
                .with_description("Time from a closed batch to its commit, by outcome")
                .with_boundaries(vec![
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                    30.0,
                ])
                .build(),
            halved: meter
                .u64_counter("birbnest_worker_batches_halved")
                .with_description("Batches that PostgreSQL refused, and that were halved to find why")
                .build(),
            dead_lettered: meter
                .u64_counter("birbnest_dead_letters")
                .with_description("Writes that PostgreSQL refused for good")
                .build(),
            evictions: meter
                .u64_counter("birbnest_worker_evictions")
                .with_description("Times this worker ended the sessions of one that stood still")
                .build(),
            reaped: meter
                .u64_counter("birbnest_worker_rows_reaped")
                .with_description("Rows of deleted and expired entries that were removed")
                .build(),
            warmed: meter
                .u64_counter("birbnest_worker_keys_warmed")
                .with_description("Keys put into Redis on request")
                .build(),
            rehydrations: meter
                .u64_counter("birbnest_worker_rehydrations")
                .with_description("Requests to warm Redis, by what they asked for and how they went")
                .build(),
            went_back: meter
                .u64_counter("birbnest_postgres_went_back")
                .with_description("Times a shard was found to have less in PostgreSQL than before")
                .build(),
            connections_refused: meter
                .u64_counter("birbnest_worker_connections_refused")
                .with_description(
                    "Connections to the admin port that were closed at once, since there were too many",
                )
                .build(),
            rests: meter
                .u64_counter("birbnest_worker_rests")
                .with_description(
                    "Times this worker left all shards to others, since it could store nothing",
                )
                .build(),
            lost: meter
                .u64_counter("birbnest_worker_shards_lost")
                .with_description("Ownerships that failed, by why; another one goes on")
                .build(),
            lives: meter
                .u64_counter("birbnest_log_lives_begun")
                .with_description(
                    "Times this worker stored a log that had lost its tail to its end, and opened its next life",
                )
                .build(),
            rows_changed: meter
                .u64_counter("birbnest_worker_rows_changed")
                .with_description("Rows inserted or replaced")
                .build(),
        }
    }

    /// The shard is owned from now on.
    pub fn owned(&self, shard: Shard, depth: Depth, lag: u64) {
        lock(&self.shards).insert(
            shard,
            Owned {
                depth,
                lag,
                dead: (0, 0),
                oldest: None,
            },
        );
    }

    /// The shard is not owned any more.
    pub fn released(&self, shard: Shard) {
        lock(&self.shards).remove(&shard);
    }

    pub fn depth(&self, shard: Shard, depth: Depth) {
        if let Some(owned) = lock(&self.shards).get_mut(&shard) {
            owned.depth = depth;
        }
    }

    /// `n_messages` are not stored yet; `oldest` is the age of the oldest in hand, if there is one.
    pub fn lag(&self, shard: Shard, n_messages: u64, oldest: Option<Duration>) {
        if let Some(owned) = lock(&self.shards).get_mut(&shard) {
            owned.lag = n_messages;
            owned.oldest = oldest.map(|age| (age, Instant::now()));
        }
    }

    /// The ownership of a shard failed: `log_unreachable`, `log_held`, `log_gap` or `other`.
    pub fn lost(&self, why: &'static str) {
        self.lost.add(1, &[KeyValue::new("why", why)]);
    }

    /// A shard began its next life.
    pub fn life_begun(&self) {
        self.lives.add(1, &[]);
    }

    /// A connection to the admin port had no room.
    pub fn connection_refused(&self) {
        self.connections_refused.add(1, &[]);
    }

    /// This worker leaves all shards to others.
    pub fn rested(&self) {
        self.rests.add(1, &[]);
    }

    /// How many dead letters of the shard wait for another try, and how many are parked.
    pub fn dead_letters(&self, shard: Shard, waiting: u64, parked: u64) {
        if let Some(owned) = lock(&self.shards).get_mut(&shard) {
            owned.dead = (waiting, parked);
        }
    }

    /// A batch was refused as a whole.
    pub fn halved(&self) {
        self.halved.add(1, &[]);
    }

    pub fn dead_lettered(&self, n: usize) {
        self.dead_lettered.add(n as u64, &[]);
    }

    pub fn evicted(&self) {
        self.evictions.add(1, &[]);
    }

    pub fn reaped(&self, n: u64) {
        self.reaped.add(n, &[]);
    }

    pub fn warmed(&self, n: usize) {
        self.warmed.add(n as u64, &[]);
    }

    /// A request was `served` (of a job: one page), `waits` for another try or was `given_up`, or a job `ended`.
    pub fn rehydration(&self, kind: Rehydration, how: &'static str) {
        let kind = match kind {
            Rehydration::Keys => "keys",
            Rehydration::Prefix => "prefix",
            Rehydration::Everything => "everything",
        };
        self.rehydrations
            .add(1, &[KeyValue::new("kind", kind), KeyValue::new("how", how)]);
    }

    pub fn went_back(&self) {
        self.went_back.add(1, &[]);
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

fn gauge(
    meter: &Meter,
    shards: &Shards,
    name: &'static str,
    description: &'static str,
    unit: Option<&'static str>,
    value: fn(&Owned) -> f64,
) {
    let shards = shards.clone();
    let mut gauge = meter
        .f64_observable_gauge(name)
        .with_description(description);
    if let Some(unit) = unit {
        gauge = gauge.with_unit(unit);
    }
    gauge
        .with_callback(move |observer: &dyn AsyncInstrument<f64>| {
            for (shard, owned) in lock(&shards).iter() {
                observer.observe(
                    value(owned),
                    &[KeyValue::new("shard", i64::from(shard.as_i16()))],
                );
            }
        })
        .build();
}

fn lock(shards: &Shards) -> MutexGuard<'_, BTreeMap<Shard, Owned>> {
    shards.lock().unwrap_or_else(PoisonError::into_inner)
}
