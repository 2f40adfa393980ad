//! Warming Redis on request: the keys that are asked for, or as much as fits when it came back empty.
//!
//! A request that cannot be served comes again some seconds later, to whichever worker asks next. A job (a prefix, or
//! everything) goes on until it is done; keys are given up at last.

use std::{
    pin::pin,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use birb_nest_core::{Backoff, Key, Range};
use birb_nest_store::{
    Nest,
    jetstream::{Delivery, Job, Refill, Request, Session},
    postgres::{Newest, Search},
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::{METRICS, Rehydration},
    owner::Context,
};

/// Keys of a request for everything that are in memory at once: some 30 MB if their names are as long as can be. Each page
/// is a scan of all keys.
const PAGE: u32 = 50_000;

/// How often keys are tried, twelve seconds apart: they are a hint, and reads fill Redis, too.
const MOST_TRIES: u64 = 50;

/// Tries between two lines in the log about a job that waits: a minute.
const TRIES_PER_WARNING: u64 = 5;

/// How long a piece of the table is tried again before the request is given back, and all of the table is looked through anew:
/// PostgreSQL is back sooner after a restart, or has another primary.
const PIECE_PATIENCE: Duration = Duration::from_secs(120);

/// How often the queue is told that somebody is at a request; it waits for half a minute.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// What an entry takes in Redis beside its key, value and metadata, at most: the members around them, and Redis' own.
const ROOM_AROUND_VALUE: u64 = 512;

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
    let (kind, served) = match &delivery.request {
        Request::Keys(keys) => (Rehydration::Keys, warm(context, nest, keys).await),
        Request::Everything(refill) => {
            let served = page_of_everything(context, nest, session, &delivery, refill).await;
            (Rehydration::Everything, served)
        }
        Request::Prefix(job) => (
            Rehydration::Prefix,
            page_of_prefix(context, nest, session, job).await,
        ),
    };
    match served {
        Ok(rest) => {
            METRICS.rehydration(kind, "served");
            delivery.done().await;
            sleep(rest).await;
        }
        Err(why) => wait_or_forget(kind, delivery, &why).await,
    }
}

async fn wait_or_forget(kind: Rehydration, delivery: Delivery, why: &str) {
    let n_tries = delivery.n_tries;
    let tells = n_tries % TRIES_PER_WARNING == 1;
    match &delivery.request {
        Request::Keys(keys) if n_tries >= MOST_TRIES => {
            let n_keys = keys.len();
            tracing::warn!(n_keys, n_tries, why, "gave up warming Redis with keys");
            METRICS.rehydration(kind, "given_up");
            return delivery.done().await;
        }
        Request::Keys(_) => tracing::debug!(why, "a rehydration request waits"),
        Request::Everything(refill) if tells => tracing::warn!(
            n_done = refill.n_done,
            n_tries,
            why,
            "warming Redis with what was written last waits"
        ),
        Request::Prefix(job) if tells => tracing::warn!(
            job = job.id,
            prefix = job.range.prefix,
            n_done = job.n_done,
            n_tries,
            why,
            "warming Redis with a prefix waits"
        ),
        Request::Everything(_) | Request::Prefix(_) => {}
    }
    METRICS.rehydration(kind, "waits");
    delivery.again().await;
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
async fn page_of_prefix(
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
        None => {
            METRICS.rehydration(Rehydration::Prefix, "ended");
            tracing::info!(
                job = job.id,
                prefix = job.range.prefix,
                n_done,
                "warmed Redis with a prefix"
            );
        }
    }
    Ok(rest)
}

/// Cuts a page of "everything" into requests for keys, newest first, which all workers share, and asks for the next page:
/// it comes when they have taken these.
async fn page_of_everything(
    context: &Context,
    nest: &Nest,
    session: &Session,
    delivery: &Delivery,
    refill: &Refill,
) -> Result<Duration, String> {
    // Each delivery of the first page names the same job.
    let job = refill.id.clone();
    let job = job.unwrap_or_else(|| format!("e{}", delivery.place));
    let most = u64::from(context.config.worker_rehydrate_max_keys);
    if most == 0 {
        return Ok(Duration::ZERO);
    }
    let limit = most.saturating_sub(refill.n_done).min(u64::from(PAGE)) as u32;
    let mut keys = Vec::new();
    if !refill.ends && limit > 0 {
        let room = nest.cache().room().await;
        let room = room.map_err(|error| error.to_string())?;
        let search = Search::new(refill.below.clone(), limit);
        keys = find(nest, delivery, &job, search).await?;
        let n_found = keys.len();
        keys.truncate(n_that_fit(&keys, room));
        tracing::info!(
            job,
            n_done = refill.n_done,
            n_next = keys.len(),
            n_left_out = n_found - keys.len(),
            "warming Redis with what was written last"
        );
        // Too few: there are no more, or Redis takes no more.
        if let Some(last) = keys.last() {
            let next = Refill {
                n_done: refill.n_done + keys.len() as u64,
                below: Some((last.version, last.key.clone())),
                ends: keys.len() < limit as usize,
                id: Some(job.clone()),
            };
            let keys: Vec<Key> = keys.iter().map(|newest| newest.key.clone()).collect();
            spread(context, nest, session, delivery, &keys).await?;
            session
                .ask_rehydration(&Request::Everything(next))
                .await
                .map_err(|error| error.to_string())?;
        }
    }
    if keys.is_empty() {
        METRICS.rehydration(Rehydration::Everything, "ended");
        tracing::info!(
            job,
            n_done = refill.n_done,
            "warmed Redis with what was written last"
        );
    }
    Ok(Duration::ZERO)
}

/// Looks through all of the table, piece by piece. A piece that fails is tried again: what was found before it is not found again
/// for nothing.
async fn find(
    nest: &Nest,
    delivery: &Delivery,
    job: &str,
    mut search: Search,
) -> Result<Vec<Newest>, String> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    let (mut n_pieces, mut failing_since) = (0u64, None);
    loop {
        match keeping(delivery, nest.database().go_on_with(&mut search)).await {
            Ok(is_more) => {
                n_pieces += 1;
                tracing::debug!(job, n_pieces, "looked through a piece of the table");
                if !is_more {
                    return Ok(search.found());
                }
                backoff.succeed();
                failing_since = None;
                delivery.goes_on().await;
            }
            Err(error) => {
                let since = *failing_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= PIECE_PATIENCE {
                    return Err(error.to_string());
                }
                tracing::debug!(job, n_pieces, %error, "a piece of the table is looked through again");
                keeping(delivery, sleep(backoff.fail(rand::random()))).await;
            }
        }
    }
}

/// Does `work`, and lets nobody else have the request meanwhile.
async fn keeping<T>(delivery: &Delivery, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    loop {
        match timeout(TELL_EVERY, &mut work).await {
            Ok(done) => return done,
            Err(_) => delivery.goes_on().await,
        }
    }
}

/// How many of `keys`, from the first on, `room` bytes of Redis are enough for.
fn n_that_fit(keys: &[Newest], room: u64) -> usize {
    let mut taken = 0u64;
    keys.iter()
        .take_while(|newest| {
            let key = newest.key.as_str().len() as u64;
            taken = taken.saturating_add(newest.size + key + ROOM_AROUND_VALUE);
            taken <= room
        })
        .count()
}

async fn spread(
    context: &Context,
    nest: &Nest,
    session: &Session,
    delivery: &Delivery,
    keys: &[Key],
) -> Result<(), String> {
    for piece in Request::pieces(keys) {
        let request = Request::Keys(piece.to_vec());
        // The queue is bounded, and perhaps nobody else gets anything off it: what does not fit is done here.
        if session.ask_rehydration(&request).await.is_err() {
            let rest = warm(context, nest, piece).await?;
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

    #[test]
    fn large_values_take_more_of_the_room() {
        let newest = |size| Newest {
            key: Key::parse("k").expect("a key"),
            version: birb_nest_core::Version::new(1).expect("a version"),
            size,
        };
        let keys = [newest(1000), newest(10_000), newest(0)];
        assert_eq!(n_that_fit(&keys, 1500), 0);
        assert_eq!(n_that_fit(&keys, 1513), 1);
        assert_eq!(n_that_fit(&keys, 12_025), 1);
        assert_eq!(n_that_fit(&keys, 12_026), 2);
        assert_eq!(n_that_fit(&keys, u64::MAX), 3);
    }
}
