//! Warming Redis on request: the keys that are asked for, or as much as fits when it came back empty.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use birb_nest_core::{Key, Range};
use birb_nest_store::{
    Nest,
    jetstream::{Delivery, Job, Request, Session},
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
        Request::Everything => spread(context, nest, session, &delivery)
            .await
            .map(|()| Duration::ZERO),
        Request::Prefix(job) => page(context, nest, session, job).await,
    };
    match done {
        Ok(rest) => {
            delivery.done().await;
            sleep(rest).await;
        }
        // Somebody gets it again, or it is forgotten: reads fill Redis too.
        Err(why) => tracing::debug!(why, "a rehydration request waits"),
    }
}

/// Returns how long to rest before the next request.
async fn warm(context: &Context, nest: &Nest, keys: &[Key]) -> Result<Duration, String> {
    let started = Instant::now();
    let stored_before = context.n_messages_stored.load(Ordering::Relaxed);
    let n_filled = nest.warm(keys).await.map_err(|error| error.to_string())?;
    METRICS.warmed(n_filled);
    let pace = Pace {
        worked: started.elapsed(),
        n_keys: keys.len(),
        n_stored: context.n_messages_stored.load(Ordering::Relaxed) - stored_before,
    };
    tracing::debug!(n_filled, ?pace, "warmed Redis");
    Ok(pace.rest(context.config.worker_rehydrate_rate))
}

/// What one request for keys cost, beside what the worker stored meanwhile.
#[derive(Debug, Clone, Copy)]
struct Pace {
    worked: Duration,
    n_keys: usize,
    /// Messages of the log.
    n_stored: u64,
}

impl Pace {
    /// Writes come first. Warming takes this part of the time when they come at least as fast as keys are warmed; when
    /// there are fewer, it rests in proportion, and not at all when there are none.
    const LEAST_SHARE: f64 = 0.2;
    /// How long to rest before the next request, at no more than `rate` keys per second.
    fn rest(self, rate: u32) -> Duration {
        let n_keys = self.n_keys.max(1) as f64;
        let rated = Duration::from_secs_f64(n_keys / f64::from(rate)).saturating_sub(self.worked);
        let writes_per_key = (self.n_stored as f64 / n_keys).min(1.0);
        let yielded = self
            .worked
            .mul_f64((1.0 / Self::LEAST_SHARE - 1.0) * writes_per_key);
        rated.max(yielded)
    }
}

/// Warms a page of all keys that begin alike, and asks for the next one. Should this worker die before the page is off the
/// queue, another one does it again.
async fn page(
    context: &Context,
    nest: &Nest,
    session: &Session,
    job: &Job,
) -> Result<Duration, String> {
    let page = nest
        .find_page(&job.range, Request::MAX_KEYS as u32)
        .await
        .map_err(|error| error.to_string())?;
    let keys: Vec<Key> = page.keys.into_iter().map(|listed| listed.key).collect();
    let rest = warm(context, nest, &keys).await?;
    let n_done = job.n_done + keys.len() as u64;
    match page.next {
        Some(after) => {
            let next = Job {
                n_done,
                range: Range {
                    after: Some(after),
                    ..job.range.clone()
                },
                id: job.id.clone(),
            };
            session
                .ask_rehydration(&Request::Prefix(next))
                .await
                .map_err(|error| error.to_string())?;
            tracing::debug!(job = job.id, n_done, "warmed a page of a prefix");
        }
        None => tracing::info!(job = job.id, n_done, "warmed Redis with a prefix"),
    }
    Ok(rest)
}

/// Cuts "everything" into requests for keys, newest first, which all workers share.
async fn spread(
    context: &Context,
    nest: &Nest,
    session: &Session,
    delivery: &Delivery,
) -> Result<(), String> {
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
        // The queue is bounded, and perhaps nobody else gets anything off it: what does not fit is done here.
        if session.ask_rehydration(&request).await.is_err() {
            let rest = warm(context, nest, chunk).await?;
            sleep(rest).await;
        }
        delivery.goes_on().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn pace(worked: Duration, n_stored: u64) -> Pace {
        Pace {
            worked,
            n_keys: 500,
            n_stored,
        }
    }

    #[test]
    fn without_writes_only_the_rate_bounds_warming() {
        assert_eq!(pace(100 * MS, 0).rest(20_000), Duration::ZERO);
        assert_eq!(pace(10 * MS, 0).rest(20_000), 15 * MS);
    }

    #[test]
    fn warming_gives_way_in_proportion_to_writes() {
        assert_eq!(pace(100 * MS, 50).rest(20_000), 40 * MS);
        assert_eq!(pace(100 * MS, 500).rest(20_000), 400 * MS);
        assert_eq!(pace(100 * MS, 50_000).rest(20_000), 400 * MS);
        // The two do not add up.
        assert_eq!(pace(10 * MS, 500).rest(10_000), 40 * MS);
    }
}
