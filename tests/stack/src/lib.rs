//! Starts the real servers that birb-nest works with, for tests and for `make dev`.
//!
//! A [`Stack`] is a Redis, a NATS with `JetStream` and a PostgreSQL on 127.0.0.1, each a child process with a data directory
//! of its own below the stack's root. Every [`Server`] can be killed, stopped, started again on the same port, paused,
//! copied and put back; a [`Proxy`] in front of one cuts or stalls the connections. An [`Environment`] holds the variables
//! that point the `birb-nest` binary at them, and starts its roles as a [`Process`].
//!
//! ```text
//!   test --> Environment --spawns--> birb-nest api ----> Proxy ----> Redis, NATS, PostgreSQL
//!             (variables)            birb-nest worker    cut, stall    kill, pause, snapshot
//! ```
//!
//! # Guarantees
//! - Nothing depends on a tokio runtime staying alive: work happens on threads of our own or in `spawn_blocking`.
//! - Children die with this process, even if it is killed; what is left over (paused processes, temporary
//!   directories) is removed by the next stack that starts.
//! - Dropping a future never leaves a server half changed: the operation goes on in the background until it is done.

mod binaries;
mod environment;
mod http;
mod nats;
mod nest;
mod ports;
mod postgres;
mod proc_fs;
mod process;
mod proxy;
mod redis;
mod root;
mod server;
mod snapshot;
mod spawner;
mod stack;
mod tls;
mod wait;

pub use environment::{Environment, wrong_clock};
pub use http::wait_http_ok;
pub use nats::NatsOptions;
pub use nest::{Role, nest_binary};
pub use ports::Port;
pub use process::Process;
pub use proxy::Proxy;
pub use redis::RedisOptions;
pub use root::{CleanUp, Root};
pub use server::Server;
pub use snapshot::Snapshot;
pub use spawner::tethered;
pub use stack::{Options, Ports, Stack, shared};
pub use tls::Authority;
pub use wait::{blocking, until};
