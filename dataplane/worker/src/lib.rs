//! Workers: each owns some shards of the log and stores what is written to them in PostgreSQL.
//!
//! [`run()`] keeps the worker's share of the shards: [`owner`] is one owned shard from claim to release, [`trim`] says
//! what may leave the log, [`dead_letters`] what happens to a write that PostgreSQL refuses, [`lives`] what happens when a log loses its tail, [`rehydrate`] warms Redis, [`janitor`] reaps what is long gone, [`stalls`] notices owners that hang, [`admin`] is what probes and Prometheus ask.

pub mod config;

mod admin;
mod dead_letters;
mod failures;
mod janitor;
mod lives;
mod metrics;
mod owner;
mod rehydrate;
mod run;
mod share;
mod stalls;
mod trim;

pub use self::{config::WorkerConfig, run::run};
