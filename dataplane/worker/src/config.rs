//! Settings of a worker. Each field's comment is its manual.

use std::{net::IpAddr, time::Duration};

use birb_nest_core::BatchLimits;
use birb_nest_store::config::{bytes, duration};
use clap::Args;

/// A worker process.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Worker")]
pub struct WorkerConfig {
    /// Address of the port for probes and metrics.
    #[arg(long, default_value = "0.0.0.0")]
    pub worker_admin_host: IpAddr,
    /// Port for /livez, /readyz and /metrics.
    #[arg(long, default_value_t = 9091)]
    pub worker_admin_port: u16,
    /// Most messages stored in one transaction. More make PostgreSQL faster and failures dearer.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub worker_batch_size: u32,
    /// Most bytes stored in one transaction.
    #[arg(long, default_value = "8MiB", value_parser = bytes)]
    pub worker_batch_bytes: usize,
    /// How long the first message of a batch waits for others: what a lone write waits for its row.
    #[arg(long, default_value = "10ms", value_parser = duration)]
    pub worker_batch_timeout: Duration,
    /// How often a worker counts the others, takes free shards and gives back what is above its share.
    #[arg(long, default_value = "1s", value_parser = duration)]
    pub worker_rebalance_interval: Duration,
    /// How long a shard that has messages may stand still before another worker ends its owner's sessions, and how long a worker may
    /// be silent before its shards and its share go to the others.
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub worker_stall_timeout: Duration,
    /// How long a stored message stays in the log: a PostgreSQL that comes back with older data within this time is
    /// brought up to date from there.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub log_trim_lag: Duration,
    /// How often stored messages are dropped from the log; oftener costs writes some of their speed.
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub log_trim_interval: Duration,
    /// How long a write that PostgreSQL refused for good waits for its first retry; each further wait is twice as long,
    /// up to an hour. `NATS_DLQ_MAX_RETRIES` bounds their number.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub worker_dead_letter_retry: Duration,
    /// How often one of the workers walks through all keys and removes the rows of deleted and expired entries.
    #[arg(long, default_value = "10m", value_parser = duration)]
    pub worker_janitor_interval: Duration,
    /// How long such a row is kept after its entry was deleted or expired.
    #[arg(long, default_value = "1h", value_parser = duration)]
    pub worker_janitor_grace: Duration,
    /// Keys per second that a worker puts into Redis on request, at most.
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub worker_rehydrate_rate: u32,
    /// Keys that are put into Redis after it came back empty, newest first; Redis's maxmemory bounds them too.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(0..=100_000_000))]
    pub worker_rehydrate_max_keys: u32,
    /// How long a worker may take after SIGTERM to finish the batches in hand.
    #[arg(long, default_value = "20s", value_parser = duration)]
    pub worker_shutdown_timeout: Duration,
}

impl WorkerConfig {
    /// When a batch is closed.
    #[must_use]
    pub const fn batch_limits(&self) -> BatchLimits {
        BatchLimits {
            max_messages: self.worker_batch_size as usize,
            max_bytes: self.worker_batch_bytes,
            linger: self.worker_batch_timeout,
        }
    }

    /// How long another worker may be silent and is still counted on.
    #[must_use]
    pub fn member_patience(&self) -> Duration {
        // Who counts seldom is heard of seldom.
        self.worker_stall_timeout
            .max(3 * self.worker_rebalance_interval)
    }
}
