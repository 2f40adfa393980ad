//! Warming Redis on request: the keys that are asked for, or as much as fits when it came back empty.

use std::time::{Duration, Instant};

use birb_nest_core::Key;
use birb_nest_store::{
    Nest,
    jetstream::{Delivery, Request, Session},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{metrics::METRICS, owner::Context};

/// Serves the queue until `stop`.
pub async fn run(context: &Context, nest: &Nest, stop: CancellationToken) {
    let serving = async {
        loop {
            let session = context.log.wait_for_session().await;
            match session.next_rehydration().await {
                Ok(Some(delivery)) => serve(context, nest, &session, delivery).await,
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "no rehydration requests can be read");
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    };
    tokio::select! {
        () = serving => {}
        () = stop.cancelled() => {}
    }
}

async fn serve(context: &Context, nest: &Nest, session: &Session, delivery: Delivery) {
    let done = match &delivery.request {
        Request::Keys(keys) => warm(context, nest, keys).await,
        Request::Everything => spread(context, nest, session).await,
    };
    match done {
        Ok(()) => delivery.done().await,
        // Somebody gets it again, or it is forgotten: reads fill Redis too.
        Err(why) => tracing::debug!(why, "a rehydration request waits"),
    }
}

async fn warm(context: &Context, nest: &Nest, keys: &[Key]) -> Result<(), String> {
    let started = Instant::now();
    let n_filled = nest.warm(keys).await.map_err(|error| error.to_string())?;
    METRICS.warmed(n_filled);
    tracing::debug!(n_keys = keys.len(), n_filled, "warmed Redis");
    // The rate bounds what PostgreSQL and the log have to do for this beside their work.
    let due = Duration::from_secs_f64(
        keys.len() as f64 / f64::from(context.config.worker_rehydrate_rate),
    );
    sleep(due.saturating_sub(started.elapsed())).await;
    Ok(())
}

/// Cuts "everything" into requests for keys, newest first, which all workers share.
async fn spread(context: &Context, nest: &Nest, session: &Session) -> Result<(), String> {
    let started = Instant::now();
    let most = nest.cache().room_for_keys().await.unwrap_or(u64::MAX);
    let most = most.min(u64::from(context.config.worker_rehydrate_max_keys));
    let keys = nest
        .database()
        .newest_keys(most)
        .await
        .map_err(|error| error.to_string())?;
    tracing::info!(
        n_keys = keys.len(),
        "warming Redis with what was written last"
    );
    for chunk in keys.chunks(Request::MAX_KEYS) {
        let request = Request::Keys(chunk.to_vec());
        // The queue is bounded: workers have to get through it.
        while let Err(error) = session.ask_rehydration(&request).await {
            if started.elapsed() > Duration::from_secs(600) {
                return Err(error.to_string());
            }
            sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}
