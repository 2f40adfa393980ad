//! A fence that one process has noticed and another one has not.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use birb_nest_core::{Key, Shard};
use birb_nest_store::LogConfig;
use reqwest::{Method, StatusCode};

use crate::{
    lost_tail::{bases, takes_writes},
    world::{Answer, Api, PATIENCE, World, eventually, write_all},
};

/// Keys that each of two clients has for itself, and keys that both write.
const N_KEYS: u64 = 16;

/// Whether it is the newest that is served, or nothing.
fn is_newest_or_refused(read: &Answer, newest: u64) -> Result<()> {
    if read.status == StatusCode::SERVICE_UNAVAILABLE {
        return read.refused("UNAVAILABLE");
    }
    let read = read.clone().expect(StatusCode::OK)?;
    ensure!(read.version()? == newest, "{newest} is newest: {read:?}");
    Ok(())
}

/// How many changes of a shard's life an API has noticed.
fn n_noticed(api: &Api) -> Result<usize> {
    Ok(api.process.log()?.matches("changed its life").count())
}

/// Somebody fenced all shards, and a worker opened their next lives. Of two APIs one knows, since it writes; the other was not
/// told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_has_not_noticed_a_fence_serves_nothing_old() -> Result<()> {
    let world = World::shared().await?;
    let (api, other) = (
        Arc::new(world.api().await?),
        Arc::new(Api::start(&world.env.replica()?).await?),
    );
    let mut versions = write_all(&api, "k", 100).await?;
    versions.extend(write_all(&other, "other", 100).await?);
    let old_bases = bases(&world).await?;
    world.fence_all().await?;
    let refused = api.post("probe0", "{\"value\":1}").await?;
    refused.refused("UNAVAILABLE")?;
    // What is in the fenced log is still read.
    world.flush_redis().await?;
    for (key, version) in versions.iter().take(20) {
        for api in [&api, &other] {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == *version, "{version} is newest: {read:?}");
        }
    }
    let worker = world.worker().await?;
    takes_writes(&api).await?;
    ensure!(
        bases(&world)
            .await?
            .iter()
            .zip(&old_bases)
            .all(|(new, old)| new > old)
    );
    // From here on what is written is in the log of the next life alone.
    worker.terminate(PATIENCE).await?;
    versions.extend(write_all(&api, "k", 100).await?);
    world.flush_redis().await?;
    let shards = world.config::<LogConfig>()?.nats_shards;
    let of_shards = |shards_of: std::ops::Range<u16>| {
        let of_shards = shards_of.map(|shard| {
            let is_of = |key: &&String| {
                let key = Key::parse(key).unwrap();
                key.as_str().starts_with('k') && shards.shard_of(&key) == Shard::from_index(shard)
            };
            versions
                .keys()
                .find(is_of)
                .cloned()
                .context("a key of each shard")
        });
        of_shards.collect::<Result<Vec<String>>>()
    };
    // A shard is noticed by its first read or write.
    ensure!(n_noticed(&other)? == 0, "it has noticed before");
    for key in of_shards(0..4)? {
        is_newest_or_refused(&other.get(&key).await?, versions[&key])?;
    }
    ensure!(n_noticed(&other)? <= 4, "it has noticed all at once");
    let unnoticed = of_shards(7..8)?.remove(0);
    other
        .post(&unnoticed, "{\"value\":\"late\"}")
        .await?
        .refused("UNAVAILABLE")?;
    is_newest_or_refused(&other.get(&unnoticed).await?, versions[&unnoticed])?;
    takes_writes(&other).await?;
    versions.extend(write_all(&other, "other", 100).await?);
    let _worker = world.worker().await?;
    world.all_stored(versions.iter()).await?;
    world.flush_redis().await?;
    for (key, version) in &versions {
        for api in [&api, &other] {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == *version, "{version} is newest: {read:?}");
        }
    }
    Ok(())
}

/// A client of one API, which writes its own keys and those of all.
struct Client {
    name: &'static str,
    api: Api,
    n_acknowledged: AtomicU64,
}

/// The greatest version of each key.
#[derive(Default)]
struct Versions(Mutex<HashMap<String, u64>>);

impl Versions {
    fn note(&self, key: &str, version: u64) {
        let mut versions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = versions.entry(key.to_owned()).or_default();
        *known = version.max(*known);
    }

    fn now(&self) -> HashMap<String, u64> {
        let versions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        versions.clone()
    }
}

/// What several clients wrote and were told.
#[derive(Default)]
struct Known {
    acknowledged: Versions,
    /// Without those that Redis could not be told of: they may be missed for a while.
    readable: Versions,
    is_over: AtomicBool,
}

impl Client {
    /// Writes one key after the other until it is over. What is refused is taken for not written, what is of unknown outcome for
    /// anything.
    async fn write(&self, known: &Known) -> Result<()> {
        for n in 0.. {
            if known.is_over.load(Ordering::Relaxed) {
                break;
            }
            let whose = if n % 3 == 0 { "both" } else { self.name };
            let key = format!("{whose}{}", n % N_KEYS);
            let answer = self.api.post(&key, format!("{{\"value\":{n}}}")).await?;
            if answer.status == StatusCode::CREATED {
                let version = answer.version()?;
                known.acknowledged.note(&key, version);
                if answer.header("birb-cache").is_empty() {
                    known.readable.note(&key, version);
                }
                self.n_acknowledged.fetch_add(1, Ordering::Relaxed);
            } else if answer.refused("UNKNOWN_OUTCOME").is_err() {
                answer.refused("UNAVAILABLE")?;
            }
        }
        Ok(())
    }

    /// Reads what anybody was acknowledged until it is over, by turns from wherever it is and past Redis: never anything older.
    async fn read(&self, known: &Known) -> Result<()> {
        let no_cache = ("cache-control", "no-cache");
        while !known.is_over.load(Ordering::Relaxed) {
            let keys: Vec<String> = known.readable.now().into_keys().collect();
            for (n, key) in keys.iter().enumerate() {
                let before = known.readable.now()[key];
                let headers = if n % 2 == 0 { &[][..] } else { &[no_cache][..] };
                let read = self.api.ask(Method::GET, key, headers).await?;
                if read.status == StatusCode::SERVICE_UNAVAILABLE {
                    continue;
                }
                let read = read.expect(StatusCode::OK)?;
                ensure!(
                    read.version()? >= before || read.header("birb-cache") == "unconfirmed",
                    "{}: {key} had {before} before it was read: {read:?}",
                    self.name
                );
            }
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Waits until another 50 of its writes were acknowledged.
    async fn goes_on(&self) -> Result<()> {
        let before = self.n_acknowledged.load(Ordering::Relaxed);
        eventually("writes are acknowledged", async || {
            let n = self.n_acknowledged.load(Ordering::Relaxed);
            Ok((n >= before + 50).then_some(()))
        })
        .await
    }
}

/// Both write all the time, also the one that has not noticed the fence while the other one has; or it is stopped over it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_apis_of_which_one_has_not_noticed_a_fence_lose_no_acknowledged_write() -> Result<()> {
    let world = World::shared().await?;
    let _worker = world.worker().await?;
    let client = async |name, env| {
        anyhow::Ok(Client {
            name,
            api: Api::start(env).await?,
            n_acknowledged: AtomicU64::new(0),
        })
    };
    let one = client("one", &world.env).await?;
    let other = client("other", &world.env.replica()?).await?;
    let known = Known::default();
    let fencing = async {
        for is_stopped in [false, true, false, true] {
            tokio::try_join!(one.goes_on(), other.goes_on())?;
            let before = bases(&world).await?;
            if is_stopped {
                other.api.process.pause().await?;
            }
            world.fence_all().await?;
            eventually("every shard lives on", async || {
                let now = bases(&world).await?;
                let are_open = world
                    .subjects()
                    .await?
                    .iter()
                    .all(|subject| subject.contains(".w."));
                let are_new = before.iter().zip(&now).all(|(old, new)| new > old);
                Ok((are_open && are_new).then_some(()))
            })
            .await?;
            one.goes_on().await?;
            if is_stopped {
                other.api.process.resume().await?;
            }
            tokio::try_join!(one.goes_on(), other.goes_on())?;
        }
        known.is_over.store(true, Ordering::Relaxed);
        Ok(())
    };
    tokio::try_join!(
        fencing,
        one.write(&known),
        other.write(&known),
        one.read(&known),
        other.read(&known)
    )?;
    let acknowledged = known.acknowledged.now();
    ensure!(acknowledged.len() as u64 > 2 * N_KEYS, "{acknowledged:?}");
    world.all_stored(acknowledged.iter()).await?;
    world.flush_redis().await?;
    for (key, version) in &acknowledged {
        for client in [&one, &other] {
            let read = client.api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(
                read.version()? >= *version,
                "{key}: {version} was acknowledged: {read:?}"
            );
        }
    }
    Ok(())
}
