//! A run: rounds of work, faults and judgement, all drawn from a seed.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Stack;
use futures::future::try_join_all;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::Value;

use crate::{
    client::Client,
    faults::{Fault, Site},
    history::{self, History, Kind, Lost},
    judge::{self, Counts},
};

const N_CLIENTS: usize = 6;

/// What a run is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Everything is drawn from it, but how fast things happen.
    pub seed: u64,
    /// Each once, in an order that the seed decides; over and over until the time is up.
    pub faults: Vec<Fault>,
    /// How many keys a round has: the fewer, the more happens at once to each.
    pub n_keys: usize,
    /// How many rounds at most.
    pub max_rounds: usize,
    /// No round begins after that.
    pub time: Duration,
    /// How long clients work before, during and after the fault.
    pub phase: Duration,
    /// How long everything may take to be right again after a fault was healed.
    pub recovery: Duration,
    /// More variables for the processes.
    pub variables: Vec<(&'static str, String)>,
    /// Where histories are kept.
    pub dir: PathBuf,
}

/// What a run showed.
#[derive(Debug, Default)]
pub struct Report {
    /// Rounds per kind of fault, and the longest time until both APIs served reads and writes after it was healed.
    pub faults: BTreeMap<Fault, (usize, Duration)>,
    /// Of all rounds.
    pub counts: Counts,
}

impl Plan {
    /// Every kind of fault once, with short phases.
    #[must_use]
    pub fn short(seed: u64, dir: PathBuf) -> Self {
        Self {
            seed,
            faults: Fault::ALL.to_vec(),
            n_keys: 4,
            max_rounds: Fault::ALL.len(),
            time: Duration::from_secs(3600),
            phase: Duration::from_millis(1200),
            recovery: Duration::from_secs(90),
            variables: Vec::new(),
            dir,
        }
    }
}

/// Makes the rounds of `plan` on a stack of its own.
///
/// # Errors
/// A promise is broken, or something does not come back: with the seed, the round and the fault.
pub async fn run(plan: &Plan) -> Result<Report> {
    std::fs::create_dir_all(&plan.dir)?;
    let began = Instant::now();
    let stack = Stack::fresh().await?;
    let mut site = Site::start(&stack, &plan.variables).await?;
    let mut random = StdRng::seed_from_u64(plan.seed);
    let (mut report, values) = (Report::default(), Arc::new(AtomicI64::new(1)));
    let mut queue: Vec<Fault> = Vec::new();
    for round in 0..plan.max_rounds {
        if began.elapsed() > plan.time {
            break;
        }
        if queue.is_empty() {
            queue.clone_from(&plan.faults);
            queue.shuffle(&mut random);
        }
        let fault = queue.pop().unwrap_or(Fault::None);
        let name = format!("seed-{}-round-{round}", plan.seed);
        let history = History::default();
        let seed = random.random();
        let result = one_round(&mut site, plan, fault, &name, seed, &history, &values).await;
        let (recovery, counts) = result.with_context(|| {
            let _ = history::save(
                &history.operations(),
                &plan.dir.join(format!("{name}-all.jsonl")),
            );
            format!(
                "SOAK_SEED={}, round {round}, {fault:?}; the history is in {}\n{}",
                plan.seed,
                plan.dir.display(),
                site.last_lines()
            )
        })?;
        let (n, worst) = report.faults.entry(fault).or_default();
        *n += 1;
        *worst = recovery.max(*worst);
        report.counts.n_operations += counts.n_operations;
        report.counts.n_unknown += counts.n_unknown;
        report.counts.n_labelled += counts.n_labelled;
        report.counts.worst_staleness = report.counts.worst_staleness.max(counts.worst_staleness);
        println!(
            "soak: seed {} round {round} {fault:?}: {} operations, {} unknown, right again after {:.1} s",
            plan.seed,
            counts.n_operations,
            counts.n_unknown,
            recovery.as_secs_f64()
        );
    }
    Ok(report)
}

async fn one_round(
    site: &mut Site<'_>,
    plan: &Plan,
    fault: Fault,
    name: &str,
    seed: u64,
    history: &History,
    values: &Arc<AtomicI64>,
) -> Result<(Duration, Counts)> {
    let keys: Vec<String> = (0..plan.n_keys)
        .map(|n| format!("{name}-key-{n}"))
        .collect();
    let stop = AtomicBool::new(false);
    let urls = site.urls();
    let mut clients = (0..N_CLIENTS)
        .map(|id| Client::new(id, seed, urls.clone(), history.clone(), values.clone()))
        .collect::<Result<Vec<_>>>()?;
    let (mut recovery, mut lost) = (Duration::ZERO, None);
    let working = try_join_all(clients.iter_mut().map(|client| client.work(&keys, &stop)));
    let disturbing = async {
        let result = async {
            tokio::time::sleep(plan.phase).await;
            let copied_at = history.now();
            site.prepare(fault).await?;
            // What changes now is what an old copy does not have. Without workers, nobody but a new write puts it right.
            let until_it_begins = match fault {
                Fault::OldRedisAlone => plan.phase,
                _ => plan.phase / 4,
            };
            tokio::time::sleep(until_it_begins).await;
            site.begin(fault).await?;
            tokio::time::sleep(plan.phase).await;
            // It is healed by starting the copy.
            lost = (fault == Fault::LostTail).then(|| Lost {
                from: copied_at,
                to: history.now(),
            });
            site.heal(fault).await?;
            let healed = Instant::now();
            serves(&urls, &format!("{name}-probe"), plan.recovery).await?;
            recovery = healed.elapsed();
            tokio::time::sleep(plan.phase).await;
            anyhow::Ok(())
        }
        .await;
        stop.store(true, Ordering::Relaxed);
        result
    };
    let (worked, disturbed) = tokio::join!(working, disturbing);
    disturbed?;
    worked?;
    agree(&urls, &keys, plan.recovery).await?;
    // What everybody sees in the end belongs to the history.
    let mut last = Client::new(N_CLIENTS, seed, urls, history.clone(), values.clone())?;
    for key in &keys {
        for api in 0..2 {
            for kind in [Kind::Read, Kind::Plain] {
                ensure!(
                    last.ask(kind, key, api).await?,
                    "{key} cannot be read in the end"
                );
            }
        }
    }
    let counts = judge::judge(history, lost, &plan.dir, name)?;
    Ok((recovery, counts))
}

/// Waits until both APIs take a write and read it past Redis.
async fn serves(urls: &[String; 2], key: &str, patience: Duration) -> Result<()> {
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .build()?;
    let deadline = Instant::now() + patience;
    for url in urls {
        let url = format!("{url}/v1/cache/{key}");
        loop {
            let write = http
                .post(&url)
                .header("content-type", "application/json")
                .body("{\"value\":0}");
            let read = http.get(&url).header("cache-control", "no-cache");
            let mut served =
                matches!(write.send().await, Ok(answer) if answer.status().is_success());
            served =
                served && matches!(read.send().await, Ok(answer) if answer.status().is_success());
            if served {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "{url} does not serve {patience:?} after the fault was healed"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

/// Waits until nothing is left to be stored, and Redis has nothing else than PostgreSQL.
async fn agree(urls: &[String; 2], keys: &[String], patience: Duration) -> Result<()> {
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .build()?;
    let deadline = Instant::now() + patience;
    for key in keys {
        loop {
            let url = format!("{}/v1/debug/{key}", urls[0]);
            let found = match http.get(&url).send().await {
                Ok(answer) => answer.json().await.unwrap_or(Value::Null),
                Err(_) => Value::Null,
            };
            if agreed(&found) {
                break;
            }
            ensure!(
                Instant::now() < deadline,
                "the stores do not agree on {key} after {patience:?}: {found}"
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

fn agreed(found: &Value) -> bool {
    let version = |store: &str| found[store]["version"].as_u64();
    let state = |store: &str| found[store]["state"].as_str().unwrap_or("unavailable");
    let stored = version("postgres");
    let drained = match state("log") {
        "nothing" | "pin" => true,
        "entry" | "deleted" => version("log") == stored,
        _ => false,
    };
    let cached = match state("redis") {
        "nothing" | "absent" => true,
        "entry" | "deleted" => version("redis") == stored,
        _ => false,
    };
    drained && cached && state("postgres") != "unavailable"
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.counts;
        writeln!(
            f,
            "{} operations, {} of unknown outcome, {} labelled, worst staleness of a labelled answer {:.2} s",
            counts.n_operations,
            counts.n_unknown,
            counts.n_labelled,
            counts.worst_staleness.as_secs_f64()
        )?;
        for (fault, (n, worst)) in &self.faults {
            writeln!(
                f,
                "{fault:?}: {n} rounds, right again after at most {:.2} s",
                worst.as_secs_f64()
            )?;
        }
        Ok(())
    }
}
