//! What every handler has.

use std::{sync::Arc, time::Instant};

use birb_nest_store::Nest;
use prometheus::Registry;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{body, config::ApiConfig};

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
    pub bodies: Semaphore,
}

impl AppState {
    pub fn new(
        nest: Nest,
        config: ApiConfig,
        registry: Registry,
        stopping: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            permits: Semaphore::new(config.api_max_concurrency as usize),
            bodies: body::room(&config),
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
