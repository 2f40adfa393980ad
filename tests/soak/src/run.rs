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
use reqwest::{Response, StatusCode};

use crate::{
    calm::{GRACE, Pulse, Span, Trouble},
    client::Client,
    cold::{self, Memory},
    faults::{Attack, Fault},
    history::{self, History, Kind, Lost},
    judge::{self, Circumstances, Counts},
    late::Probes,
    site::Site,
};

const N_CLIENTS: usize = 6;
/// Keys of a round whose values expire.
const N_FLEETING: usize = 2;
/// Who looks at the keys of a round that were left alone.
const N_LOOKERS: usize = 4;

/// What a run is to be.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Everything is drawn from it, but how fast things happen.
    pub seed: u64,
    /// Each once, in an order that the seed decides; over and over until the time is up.
    pub faults: Vec<Fault>,
    /// How many keys a round has: the fewer, the more happens at once to each.
    pub n_keys: usize,
    /// How many keys at most a round leaves alone after one change or two, to be judged at its end and in later rounds.
    pub n_cold: usize,
    /// How many rounds at most.
    pub max_rounds: usize,
    /// No round begins after that.
    pub time: Duration,
    /// About how long clients work before, during and after the fault: the seed decides.
    pub phase: Duration,
    /// How long everything may take to be right again from when healing begins.
    pub recovery: Duration,
    /// More variables for the processes.
    pub variables: Vec<(&'static str, String)>,
    /// Where histories are kept.
    pub dir: PathBuf,
    /// The command that makes the same rounds again.
    pub again: String,
}

/// A round, as it is drawn from the seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drawn {
    /// What it is called.
    pub name: String,
    /// What is done in it.
    pub attack: Attack,
    /// What its clients draw from.
    pub seed: u64,
}

/// What a run showed.
#[derive(Debug, Default)]
pub struct Report {
    /// Rounds per kind of fault, and the longest time from when healing began until both APIs served reads and writes of every
    /// shard, and were sure of them.
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
            n_cold: 300,
            max_rounds: Fault::ALL.len(),
            time: Duration::from_secs(3600),
            phase: Duration::from_millis(1000),
            recovery: Duration::from_secs(90),
            variables: Vec::new(),
            dir,
            again: format!("SOAK_SEED={seed} make test-integration T=no_promise"),
        }
    }

    /// Its rounds, whatever happens in them; more than there is time for.
    pub fn rounds(&self) -> impl Iterator<Item = Drawn> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut queue: Vec<Fault> = Vec::new();
        (0..self.max_rounds).map(move |round| {
            if queue.is_empty() {
                queue.clone_from(&self.faults);
                queue.shuffle(&mut random);
            }
            let fault = queue.pop().unwrap_or(Fault::None);
            Drawn {
                name: format!("seed-{}-round-{round}", self.seed),
                attack: Attack::draw(fault, self.phase, &mut random),
                seed: random.random(),
            }
        })
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
    let (mut report, values) = (Report::default(), Arc::new(AtomicI64::new(1)));
    let mut memory = Memory::default();
    for drawn in plan.rounds() {
        if began.elapsed() > plan.time {
            break;
        }
        let history = History::default();
        let Drawn { name, attack, seed } = drawn;
        let round = Round {
            plan,
            attack: &attack,
            name: &name,
            seed,
            history: &history,
        };
        let result = round.make(&mut site, &values, &mut memory).await;
        let (recovery, counts) = result.with_context(|| {
            let path = plan.dir.join(format!("{name}-all.jsonl"));
            let _ = history::save(&history.operations(), &path);
            format!(
                "`{}` makes the same rounds: this is {name}, {attack:?}; the history is in {}\n{}",
                plan.again,
                plan.dir.display(),
                site.last_lines()
            )
        })?;
        let (n, worst) = report.faults.entry(attack.fault).or_default();
        *n += 1;
        *worst = recovery.max(*worst);
        report.counts.add(&counts);
        println!(
            "soak: {name} {:?} for {:.1} s: {} operations, {} calm, {} unknown, {} failed, labels {:?}, {} late, right again after {:.1} s",
            attack.fault,
            attack.length.as_secs_f64(),
            counts.n_operations,
            counts.n_calm,
            counts.n_unknown,
            counts.n_failed,
            counts.n_labelled,
            counts.n_late,
            recovery.as_secs_f64()
        );
    }
    Ok(report)
}

/// How a fault went.
struct Disturbed {
    /// From when healing began until everything was right again.
    recovery: Duration,
    /// From when until when something was wrong.
    fault: Span,
    /// From when until when it was on.
    on: Span,
    /// What the log lost.
    lost: Option<Lost>,
}

/// What is done in one.
struct Round<'a> {
    plan: &'a Plan,
    attack: &'a Attack,
    name: &'a str,
    seed: u64,
    history: &'a History,
}

impl Round<'_> {
    /// Makes and judges it; tells how long it took until everything was right again.
    async fn make(
        &self,
        site: &mut Site<'_>,
        values: &Arc<AtomicI64>,
        memory: &mut Memory,
    ) -> Result<(Duration, Counts)> {
        let (plan, history) = (self.plan, self.history);
        let named = |kind, n| -> Vec<String> {
            (0..n)
                .map(|n| format!("{}-{kind}-{n}", self.name))
                .collect()
        };
        let (keys, fleeting) = (named("key", plan.n_keys), named("fleeting", N_FLEETING));
        let stop = AtomicBool::new(false);
        let urls = site.urls();
        let client = |id| {
            let (urls, history) = (urls.clone(), history.clone());
            Client::new(id, self.seed, urls, history, values.clone())
        };
        let mut clients = (0..N_CLIENTS).map(client).collect::<Result<Vec<_>>>()?;
        let (mut leaver, mut random) = (client(N_CLIENTS)?, StdRng::seed_from_u64(self.seed));
        let left = format!("{}-cold", self.name);
        let leaving = cold::leave_behind(
            &mut leaver,
            (&left, plan.n_cold),
            memory,
            &mut random,
            &stop,
        );
        let pulse = Pulse::start(history, &plan.dir)?;
        let probes = Probes::start(history, &urls, &site.redis_urls())?;
        let working = clients.iter_mut();
        let working = try_join_all(working.map(|it| it.work(&keys, &fleeting, &stop)));
        let disturbing = async {
            let disturbed = self.disturb(site).await;
            stop.store(true, Ordering::Relaxed);
            disturbed
        };
        let (worked, left, disturbed) = tokio::join!(working, leaving, disturbing);
        let Disturbed {
            recovery,
            fault,
            on,
            lost,
        } = disturbed?;
        site.all_run()?;
        worked?;
        let cold = left?;
        let trouble = Trouble {
            fault: (self.attack.fault != Fault::None).then_some(fault),
            stalls: pulse.stalls(),
            late: probes.late(),
        };
        let rows = site.all_is_stored(plan.recovery).await?;
        judge::rows_are_what_was_acknowledged(
            &history.operations(),
            lost,
            &trouble,
            (&rows, history.now()),
        )?;
        let rows = site.stores_agree(plan.recovery).await?;
        memory.is_in(&rows)?;
        for url in &urls {
            memory.is_served(url, &mut random).await?;
        }
        // What everybody sees in the end belongs to the history.
        let mut last = client(N_CLIENTS + 1)?;
        for key in keys.iter().chain(&fleeting) {
            for api in 0..2 {
                for kind in [Kind::Read, Kind::Plain] {
                    last.make_sure(kind, key, api).await?;
                }
            }
        }
        for api in 0..2 {
            last.make_sure_of_many(&cold, api).await?;
        }
        let look = async |(n, keys): (usize, &[String])| -> Result<()> {
            let mut looker = client(N_CLIENTS + 2 + n)?;
            for (n, key) in keys.iter().enumerate() {
                looker.make_sure(Kind::Read, key, n % 2).await?;
            }
            Ok(())
        };
        let parts = cold.chunks(cold.len().div_ceil(N_LOOKERS).max(1));
        try_join_all(parts.enumerate().map(look)).await?;
        judge::rows_are_what_was_seen(&history.operations(), &rows)?;
        let circumstances = Circumstances {
            attack: *self.attack,
            trouble: Trouble {
                stalls: pulse.stalls(),
                late: probes.late(),
                ..trouble
            },
            lost,
            on,
        };
        let counts = judge::judge(history, &circumstances, &plan.dir, self.name)?;
        memory.keep(keys.into_iter().chain(cold), &rows, &history.operations());
        Ok((recovery, counts))
    }

    /// Lets the fault come and go.
    async fn disturb(&self, site: &mut Site<'_>) -> Result<Disturbed> {
        let (plan, attack, history) = (self.plan, self.attack, self.history);
        tokio::time::sleep(attack.onset).await;
        let from = history.now();
        site.prepare(attack).await?;
        // What changes now is what an old copy does not have.
        tokio::time::sleep(attack.warning).await;
        let begun = history.now();
        site.begin(attack).await?;
        tokio::time::sleep(attack.length).await;
        site.bites(attack).await?;
        // It is healed by starting the copy.
        let lost = (attack.fault == Fault::LostTail).then(|| Lost {
            from,
            to: history.now(),
        });
        let (healing, healed) = (Instant::now(), history.now());
        site.heal(attack).await?;
        serves(site, plan.recovery).await?;
        let (to, recovery) = (history.now(), healing.elapsed());
        tokio::time::sleep(GRACE + plan.phase / 2).await;
        // On a slow machine it takes longer until there is something to judge.
        while judge::is_enough(&history.operations()).is_err()
            && healing.elapsed() < plan.recovery + GRACE
        {
            tokio::time::sleep(GRACE / 10).await;
        }
        Ok(Disturbed {
            recovery,
            fault: Span { from, to },
            on: Span {
                from: begun,
                to: healed,
            },
            lost,
        })
    }
}

/// Waits until both APIs take a write of every shard, read it in every way, know what is not there, and are sure of all that.
async fn serves(site: &Site<'_>, patience: Duration) -> Result<()> {
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .build()?;
    let deadline = Instant::now() + patience;
    let urls = site.urls();
    let probes = site.probes().iter();
    let probes = probes.flat_map(|keys| urls.iter().map(move |url| (url, keys)));
    let served = probes.map(|(url, keys)| {
        let (http, [written, never]) = (&http, keys);
        let urls = [written, never].map(|key| format!("{url}/v1/cache/{key}"));
        async move {
            while !is_served(http, &urls).await {
                ensure!(
                    Instant::now() < deadline,
                    "{} is not served {patience:?} after healing began",
                    urls[0]
                );
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        }
    });
    try_join_all(served).await?;
    Ok(())
}

/// Bytes of the value that is written to see whether writes are taken: more room than a full log has left ([`Site::begin`]), for
/// something smaller may be taken once and nothing after it.
const N_ASKED: usize = 10_000;

async fn is_served(http: &reqwest::Client, [written, never]: &[String; 2]) -> bool {
    let is = |answer: reqwest::Result<Response>, status: StatusCode| {
        answer.is_ok_and(|it| it.status() == status && !it.headers().contains_key("birb-cache"))
    };
    let write = http
        .post(written)
        .header("content-type", "application/json")
        .body(format!("{{\"value\":\"{}\"}}", "x".repeat(N_ASKED)));
    let past_redis = |url: &str| http.get(url).header("cache-control", "no-cache").send();
    is(write.send().await, StatusCode::CREATED)
        && is(past_redis(written).await, StatusCode::OK)
        && is(http.get(written).send().await, StatusCode::OK)
        // Of this one nobody but PostgreSQL knows.
        && is(past_redis(never).await, StatusCode::NOT_FOUND)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = &self.counts;
        writeln!(
            f,
            "{} operations, {} while nothing was wrong, {} of unknown outcome, {} reads of what earlier rounds left behind, {} failed, labels {:?}, {} of both because somebody was late, {} because a key kept being written, worst staleness of a labelled answer {:.2} s",
            counts.n_operations,
            counts.n_calm,
            counts.n_unknown,
            counts.n_looks,
            counts.n_failed,
            counts.n_labelled,
            counts.n_late,
            counts.n_overtaken,
            counts.worst_staleness.as_secs_f64()
        )?;
        for ((kind, is_batched), n) in &counts.n_done {
            let together = if *is_batched { " in batches" } else { "" };
            writeln!(f, "{kind:?}{together}: {n} done")?;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(plan: &Plan) -> Vec<Drawn> {
        plan.rounds().collect()
    }

    #[test]
    fn a_seed_draws_the_same_rounds_again() {
        let plan = |seed| Plan {
            max_rounds: 100,
            ..Plan::short(seed, PathBuf::new())
        };
        let rounds = drawn(&plan(7));
        assert_eq!(drawn(&plan(7)), rounds);
        assert_ne!(drawn(&plan(8)), rounds);
        // It is of no concern how many of them there is time for, and each kind comes in its turn.
        let mut fewer = plan(7);
        fewer.max_rounds = 40;
        assert_eq!(drawn(&fewer), rounds[..40]);
        for turn in rounds.chunks_exact(Fault::ALL.len()) {
            let mut kinds: Vec<Fault> = turn.iter().map(|it| it.attack.fault).collect();
            kinds.sort_unstable();
            assert_eq!(kinds, Fault::ALL);
        }
    }
}
