//! Everything goes down and comes back, in every order; processes are replaced while clients go on.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use birb_nest_stack::{Environment, Process, Role};
use reqwest::{Method, StatusCode};
use tokio::{net::TcpStream, task::JoinHandle};

use crate::{
    shown::metric,
    world::{Answer, Api, PATIENCE, World, breakable, eventually},
};

#[tokio::test]
async fn all_three_servers_down_and_back_in_every_order() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let mut written = std::collections::HashMap::new();
    for (round, order) in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ]
    .iter()
    .enumerate()
    {
        for n in 0..10 {
            let key = format!("k{n}");
            written.insert(
                key.clone(),
                api.write(&key, &format!("[{round},{n}]")).await?,
            );
        }
        let servers = stack.servers();
        for &which in order {
            servers[which].kill().await?;
        }
        let answer = api.get("k0").await?;
        ensure!(
            matches!(
                answer.status,
                StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE
            ),
            "{answer:?}"
        );
        ensure!(
            answer.status != StatusCode::OK || answer.version()? == written["k0"],
            "{answer:?}"
        );
        let refused = api.post("meanwhile", "{\"value\":1}").await?;
        ensure!(
            refused.refused("UNAVAILABLE").is_ok() || refused.refused("UNKNOWN_OUTCOME").is_ok(),
            "{refused:?}"
        );
        for &which in order {
            servers[which].start().await?;
        }
        eventually("all is well again", async || {
            let health = api.send(Method::GET, "/health", None).await?.json()?;
            Ok((health["status"] == "healthy").then_some(()))
        })
        .await?;
        world.all_stored(written.iter()).await?;
        for (key, version) in &written {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(read.version()? == *version, "{order:?} {key}: {read:?}");
        }
    }
    Ok(())
}

/// An API behind a load balancer that asks `/readyz`.
struct Backend {
    api: Api,
    env: Environment,
    ready: AtomicBool,
}

/// What clients saw.
#[derive(Default)]
struct Seen {
    n_ok: AtomicU64,
    n_refused: AtomicU64,
}

async fn probe(backend: Arc<Backend>, done: Arc<AtomicBool>) {
    while !done.load(Ordering::Relaxed) {
        let answer = backend.api.send(Method::GET, "/readyz", None).await;
        backend.ready.store(
            answer.is_ok_and(|answer| answer.status == StatusCode::OK),
            Ordering::Relaxed,
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn client(
    backends: Vec<Arc<Backend>>,
    n: usize,
    done: Arc<AtomicBool>,
    seen: Arc<Seen>,
) -> Result<()> {
    let mut round = 0usize;
    let mut versions: HashMap<String, u64> = HashMap::new();
    while !done.load(Ordering::Relaxed) {
        round += 1;
        let Some(backend) = backends
            .iter()
            .cycle()
            .skip(round + n)
            .take(2)
            .find(|backend| backend.ready.load(Ordering::Relaxed))
        else {
            bail!("no API is ready");
        };
        let key = format!("c{n}-{}", round % 10);
        // Nobody else writes this key.
        let acknowledged = versions.get(&key).copied().unwrap_or(0);
        let answer = if round.is_multiple_of(3) {
            backend
                .api
                .post(&key, format!("{{\"value\":{round}}}"))
                .await?
        } else {
            backend.api.get(&key).await?
        };
        match answer.status {
            StatusCode::OK | StatusCode::CREATED => {
                let version = answer.version()?;
                ensure!(
                    version >= acknowledged,
                    "{acknowledged} was acknowledged: {answer:?}"
                );
                // What Redis could not be told of may be missed for a while.
                if answer.header("birb-cache").is_empty() {
                    versions.insert(key, version);
                }
                seen.n_ok.fetch_add(1, Ordering::Relaxed)
            }
            StatusCode::NOT_FOUND if acknowledged == 0 => seen.n_ok.fetch_add(1, Ordering::Relaxed),
            // Certainly not written; an unknown outcome is no clean refusal.
            StatusCode::SERVICE_UNAVAILABLE
                if !answer.header("retry-after").is_empty()
                    && answer.json()?["code"] == "UNAVAILABLE" =>
            {
                seen.n_refused.fetch_add(1, Ordering::Relaxed)
            }
            _ => bail!("{answer:?}"),
        };
    }
    Ok(())
}

/// What a deadline that passed is called, where a request waits for somebody.
const LATE: [&str; 3] = ["no answer", "no place in the queue", "timed out"];

/// Why the process failed requests, as its log has it.
fn refusals(process: &Process) -> Result<Vec<String>> {
    let log = process.log()?;
    let failed = log.lines().filter(|line| line.contains("request failed"));
    Ok(failed.map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_under_load_fails_no_request() -> Result<()> {
    let world = World::shared().await?;
    let mut backends = Vec::new();
    let mut workers = Vec::new();
    for _ in 0..2 {
        let mut env = world.env.replica()?;
        // Until then each probe and client has to have learned of it.
        env.set("API_SHUTDOWN_DELAY", "3s")
            .set("WORKER_REBALANCE_INTERVAL", "100ms");
        backends.push(Arc::new(Backend {
            api: Api::start(&env).await?,
            env: env.clone(),
            ready: AtomicBool::new(true),
        }));
        workers.push((env.start(Role::Worker).await?, env));
    }
    let (done, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Seen::default()));
    let probes: Vec<_> = backends
        .iter()
        .map(|backend| tokio::spawn(probe(backend.clone(), done.clone())))
        .collect();
    let clients: Vec<_> = (0..8)
        .map(|n| tokio::spawn(client(backends.clone(), n, done.clone(), seen.clone())))
        .collect();
    let mut heirs = Vec::new();
    for backend in &backends {
        let before = seen.n_ok.load(Ordering::Relaxed);
        let status = backend
            .api
            .process
            .terminate(Duration::from_secs(30))
            .await?;
        ensure!(
            status.code() == Some(0),
            "{}",
            backend.api.process.last_lines(20)
        );
        let heir = backend.env.start(Role::Api).await?;
        eventually("it is used again", async || {
            Ok((backend.ready.load(Ordering::Relaxed)
                && seen.n_ok.load(Ordering::Relaxed) > before + 100)
                .then_some(()))
        })
        .await?;
        heirs.push(heir);
    }
    for (worker, env) in &workers {
        let before = seen.n_ok.load(Ordering::Relaxed);
        let status = worker.terminate(Duration::from_secs(30)).await?;
        ensure!(status.code() == Some(0), "{}", worker.last_lines(20));
        heirs.push(env.start(Role::Worker).await?);
        ensure!(
            seen.n_ok.load(Ordering::Relaxed) > before,
            "nothing was served meanwhile"
        );
    }
    done.store(true, Ordering::Relaxed);
    for client in clients {
        client.await??;
    }
    for probe in probes {
        probe.await?;
    }
    let mut why = Vec::new();
    for process in backends
        .iter()
        .map(|backend| &backend.api.process)
        .chain(&heirs)
    {
        why.extend(refusals(process)?);
    }
    // A machine that is busy with something else may let a deadline pass. A restart does not, nor is it a reason.
    let n_refused = seen.n_refused.load(Ordering::Relaxed);
    ensure!(
        n_refused * 100 <= seen.n_ok.load(Ordering::Relaxed)
            && n_refused == why.len() as u64
            && why
                .iter()
                .all(|why| LATE.iter().any(|late| why.contains(late))),
        "{n_refused} requests were refused: {why:#?}"
    );
    println!(
        "{} requests answered, {} refused",
        seen.n_ok.load(Ordering::Relaxed),
        seen.n_refused.load(Ordering::Relaxed)
    );
    Ok(())
}

/// A write that is on its way until some worker stores it.
async fn under_way(world: &World<'_>, api: &Arc<Api>) -> Result<JoinHandle<Result<Answer>>> {
    let (_, before) = world.log_depth().await?;
    let waiting = api.clone();
    let write = tokio::spawn(async move {
        let stored = [("birb-durability", "database")];
        waiting.post_if("k", &stored, "1").await
    });
    eventually("it is in the log", async || {
        Ok((world.log_depth().await?.1 > before).then_some(()))
    })
    .await?;
    Ok(write)
}

/// What has begun is ended, however long it takes, and what comes while others still send it is taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_is_told_to_stop_ends_what_it_has_begun() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_REQUEST_TIMEOUT", "2m")
        .set("API_DURABILITY_TIMEOUT", "1m")
        .set("API_SHUTDOWN_DELAY", "3s")
        .set("API_SHUTDOWN_TIMEOUT", "1m");
    let api = Arc::new(Api::start(&env).await?);
    let write = under_way(&world, &api).await?;
    let ends = async {
        let status = api.process.terminate(2 * PATIENCE).await?;
        ensure!(status.code() == Some(0), "{status}");
        Ok(())
    };
    let goes_on = async {
        let ready = eventually("it says that it is stopping", async || {
            let ready = api.send(Method::GET, "/readyz", None).await?;
            Ok((ready.status != StatusCode::OK).then_some(ready))
        })
        .await?;
        ensure!(ready.status == StatusCode::SERVICE_UNAVAILABLE, "{ready:?}");
        ensure!(ready.json()?["missing"][0] == "stopping", "{ready:?}");
        api.get("none").await?.expect(StatusCode::NOT_FOUND)?;
        let address = api.url.trim_start_matches("http://");
        eventually("nobody is let in any more", async || {
            Ok(TcpStream::connect(address).await.err().map(|_| ()))
        })
        .await?;
        ensure!(!write.is_finished());
        let _worker = world.worker().await?;
        let written = write.await??.expect(StatusCode::CREATED)?;
        ensure!(
            written.header("birb-durability") == "database",
            "{written:?}"
        );
        anyhow::Ok(())
    };
    tokio::try_join!(ends, goes_on).map(|_| ())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_api_that_is_told_to_stop_waits_for_nobody_for_ever() -> Result<()> {
    let world = World::shared().await?;
    let mut env = world.env.replica()?;
    env.set("API_REQUEST_TIMEOUT", "10m")
        .set("API_DURABILITY_TIMEOUT", "5m")
        .set("API_SHUTDOWN_TIMEOUT", "1s");
    let api = Arc::new(Api::start(&env).await?);
    let write = under_way(&world, &api).await?;
    let status = api.process.terminate(PATIENCE / 2).await?;
    ensure!(status.code() == Some(0), "{}", api.process.last_lines(20));
    let cut_off = write.await?;
    ensure!(cut_off.is_err(), "{cut_off:?}");
    Ok(())
}

/// PostgreSQL hangs while a batch is in hand: the worker ends in time without it, and the next one stores it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_is_told_to_stop_does_not_wait_for_a_server_that_hangs() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let link = world.stack.postgres.proxy()?;
    let mut env = world.env.replica()?;
    env.through(&link)
        .set("POSTGRES_TIMEOUT", "10m")
        .set("WORKER_BATCH_TIMEOUT", "1h")
        .set("WORKER_SHUTDOWN_TIMEOUT", "1s");
    let worker = env.start(Role::Worker).await?;
    let version = api.write("k", "1").await?;
    eventually("it is in hand", async || {
        let ages = metric(&env.worker_url(), "birbnest_log_oldest_age_seconds").await?;
        Ok(ages.values().any(|age| *age > 0.0).then_some(()))
    })
    .await?;
    link.stall();
    // Without a limit it would wait for ten minutes.
    let status = worker.terminate(PATIENCE).await?;
    let log = worker.log()?;
    ensure!(status.code() == Some(0), "{log}");
    ensure!(log.contains("batches in hand were not stored"), "{log}");
    link.cut();
    ensure!(world.row("k").await?.is_none());
    let _heir = world.worker().await?;
    world.stored("k", version).await
}
