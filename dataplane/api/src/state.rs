//! What every handler has.

use std::{sync::Arc, time::Instant};

use birb_nest_store::Nest;
use prometheus::Registry;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;

use crate::{access::Keyring, batch, config::ApiConfig, rate::Rate, room};

/// Built once per process; cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

pub struct Inner {
    pub nest: Nest,
    pub config: ApiConfig,
    pub registry: Registry,
    pub started: Instant,
    /// Cancelled when the process was told to stop: it is not ready any more.
    pub stopping: CancellationToken,
    /// A permit per request under /v1.
    pub permits: Semaphore,
    /// A permit per byte of their bodies.
    pub room: Semaphore,
    /// Of their own: who does not take an answer keeps nobody from writing.
    pub answers: room::Answers,
    pub parts: batch::Parts,
    /// Keys of clients, if they need one.
    pub keys: Option<watch::Receiver<Keyring>>,
    /// How many requests a client may make, if that is limited.
    pub rate: Option<Rate>,
}

impl AppState {
    pub fn new(
        nest: Nest,
        config: ApiConfig,
        keys: Option<watch::Receiver<Keyring>>,
        registry: Registry,
        stopping: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            permits: Semaphore::new(config.api_max_concurrency as usize),
            room: room::of_all(&config),
            answers: room::Answers::new(&config),
            parts: batch::Parts::new(),
            rate: Rate::new(
                config.api_rate_limit_requests,
                config.api_rate_limit_duration,
            ),
            keys,
            nest,
            config,
            registry,
            started: Instant::now(),
            stopping,
        }))
    }
}

impl std::ops::Deref for AppState {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}
