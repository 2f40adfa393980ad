//! Keeping a session: one that is lost or fails its check is replaced.

use std::{sync::Arc, time::Duration};

use birb_nest_core::Backoff;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::session::{Emptied, Session, Shared, server_name};
use crate::{clock::Clock, config::RedisConfig, metrics::METRICS};

/// How often a session is checked.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Publishes to `sender` the session that can be used now, until `stop`.
pub(super) async fn run(
    config: RedisConfig,
    clock: Arc<Clock>,
    emptied: Emptied,
    sender: watch::Sender<Shared>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let present = sender.borrow().clone();
        METRICS.dependency_up("redis", present.is_some());
        let wait = if let Some(session) = present {
            let lost = tokio::select! {
                () = session.closed.cancelled() => "connection lost".to_owned(),
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CHECK_EVERY) => match session.check(&config, &clock).await {
                    Ok(()) => continue,
                    Err(error) => error.to_string(),
                },
            };
            tracing::warn!(why = lost, "lost {}", server_name(&config));
            sender.send_replace(None);
            Duration::ZERO
        } else {
            match Session::open(&config, &clock, &emptied).await {
                Ok(session) => {
                    tracing::info!("{} is ready", server_name(&config));
                    backoff.succeed();
                    sender.send_replace(Some(Arc::new(session)));
                    continue;
                }
                Err(error) => {
                    if backoff.n_failures() == 0 || error.is_refusal() {
                        tracing::warn!(%error, "Redis is not ready");
                    }
                    backoff.fail(rand::random())
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
    }
}
