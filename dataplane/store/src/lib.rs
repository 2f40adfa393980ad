//! The three servers of a nest and the order in which they are asked.
//!
//! **JetStream is the log; Redis and PostgreSQL are projections of it.** [`jetstream`], [`redis`] and [`postgres`] are
//! one adapter each and know nothing of each other; [`nest`] holds the use cases (read, write, delete) and is the only
//! place that knows in which order the adapters are asked; [`setup`] prepares all three.
//!
//! Every adapter keeps a *session*: connections that were checked before anybody may use them. A session that breaks
//! is dropped as a whole, with all that was queued in it, and a supervisor dials and checks a new one. While there is
//! none, calls fail at once.

pub mod clock;
pub mod config;
pub mod jetstream;
mod keeper;
pub mod metrics;
pub mod nest;
pub mod postgres;
pub mod redis;
pub mod refusal;
pub mod reshard;
pub mod sabotage;
pub mod setup;
pub mod trace;

pub use clock::Clock;
pub use config::{LogConfig, PostgresConfig, RedisConfig, Secret};
pub use nest::Nest;
pub use refusal::OpenError;
