//! Workers by the backlog of the log (`worker.scaling.mode: Lag`).
//!
//! ```text
//! pass --register--> Scaling <--due, decide-- follow --CONSUMER.INFO--> NATS
//!   ^                   |                       |
//!   +---- the number ---+                       |
//!   +------- only when something changed -------+
//! ```
//! **Invariant:** what is not known of every shard is not a number, and changes none.

pub mod decide;
pub mod follow;
pub mod lag;
mod metrics;
pub mod rate;
mod step;
#[cfg(test)]
mod tests;
pub(crate) mod verdict;

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use kube::runtime::reflector::ObjectRef;

pub use metrics::observe;
pub use step::step;

use self::{
    decide::{Hold, Memory, Policy, Sight, decide},
    lag::Trouble,
    rate::{Rates, Reading},
};
use crate::{api::BirbNest, render::LogAccess};

/// How often another lag is shown in the status at most.
const SHOW_INTERVAL: Duration = Duration::from_secs(30);

/// What a pass knows of a nest whose workers follow the lag.
pub struct Followed {
    /// Which nest.
    pub nest: ObjectRef<BirbNest>,
    /// How its log is reached.
    pub access: LogAccess,
    /// Its bounds and times.
    pub policy: Policy,
    /// How often its lag is read.
    pub poll: Duration,
    /// Workers that its Deployment asks for now.
    pub live: i32,
    /// Workers that are ready.
    pub ready: i32,
}

/// A lag to be read.
pub struct Due {
    /// The nest's uid.
    pub uid: String,
    /// Which connection serves it.
    pub key: String,
    /// How its log is reached.
    pub access: LogAccess,
}

/// What was read and decided last, for the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// The lag, rounded; or why it is not known.
    pub lag: Option<u64>,
    /// Why the lag is not known.
    pub trouble: Option<Trouble>,
    /// The last change of the number.
    pub last_scale: Option<String>,
}

/// The nests in mode Lag, by uid.
pub struct Scaling {
    nests: Mutex<HashMap<String, Scaler>>,
    begun: Instant,
}

struct Scaler {
    followed: Followed,
    key: String,
    memory: Memory,
    rates: Rates,
    hold: Hold,
    last: Option<Result<Reading, Trouble>>,
    shown: Option<(u64, Duration)>,
    last_scale: Option<String>,
    /// Readings since nobody writes to the log any more; none while somebody may.
    n_quiet: Option<u32>,
    /// When to read again; not while a reading is under way.
    due: Option<Duration>,
}

impl Default for Scaling {
    fn default() -> Self {
        Self {
            nests: Mutex::default(),
            begun: Instant::now(),
        }
    }
}

impl Scaling {
    /// Notes how the nest with this uid is now; returns how many workers there should be. The first time that is as many
    /// as there are, within the bounds.
    pub fn register(&self, uid: &str, followed: Followed) -> i32 {
        let now = self.now();
        let key = followed.access.pool_key();
        let mut nests = self.lock();
        match nests.get_mut(uid) {
            Some(scaler) => {
                if scaler.key != key {
                    scaler.due = scaler.due.map(|_| now);
                    scaler.key = key;
                }
                scaler.followed = followed;
                scaler.wanted()
            }
            None => {
                let (nest, live) = (&followed.nest, followed.live);
                tracing::debug!("scaling {nest}: {:.3} begin {live}", now.as_secs_f64());
                let scaler = Scaler {
                    key,
                    memory: Memory::new(followed.live, now),
                    rates: Rates::default(),
                    hold: Hold::Unknown,
                    last: None,
                    shown: None,
                    last_scale: None,
                    n_quiet: None,
                    due: Some(now),
                    followed,
                };
                let wanted = scaler.wanted();
                nests.insert(uid.to_owned(), scaler);
                wanted
            }
        }
    }

    /// The nest is in another mode, or paused.
    pub fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }

    /// How many workers there should be, if that was decided.
    pub fn wanted(&self, uid: &str) -> Option<i32> {
        self.lock().get(uid).map(Scaler::wanted)
    }

    /// Messages that are left in the log of a nest, if that is known and nobody writes any more, as `is_quiet` says. A reading
    /// that was under way when that began does not count.
    pub fn left(&self, uid: &str, is_quiet: bool) -> Option<u64> {
        let mut nests = self.lock();
        let scaler = nests.get_mut(uid)?;
        let n_readings = scaler.n_quiet.take().unwrap_or(0);
        scaler.n_quiet = is_quiet.then_some(n_readings);
        let last = scaler
            .last
            .as_ref()
            .filter(|_| is_quiet && n_readings > 1)?;
        last.as_ref().ok().map(|reading| reading.backlog)
    }

    /// What was read and decided last; nothing before the first reading.
    pub fn view(&self, uid: &str) -> Option<View> {
        let nests = self.lock();
        let scaler = nests.get(uid)?;
        let last = scaler.last.as_ref()?;
        Some(View {
            lag: scaler.shown.map(|(lag, _)| lag),
            trouble: last.as_ref().err().cloned(),
            last_scale: scaler.last_scale.clone(),
        })
    }

    fn retain(&self, is_there: impl Fn(&ObjectRef<BirbNest>, &str) -> bool) {
        self.lock()
            .retain(|uid, scaler| is_there(&scaler.followed.nest, uid));
    }

    fn pool_keys(&self) -> HashSet<String> {
        let nests = self.lock();
        nests.values().map(|scaler| scaler.key.clone()).collect()
    }

    /// The lags to be read now. Each is followed by [`Scaling::decide`].
    fn due(&self) -> Vec<Due> {
        let now = self.now();
        let mut nests = self.lock();
        let due = nests.iter_mut().filter_map(|(uid, scaler)| {
            scaler.due.take_if(|due| *due <= now)?;
            Some(Due {
                uid: uid.clone(),
                key: scaler.key.clone(),
                access: scaler.followed.access.clone(),
            })
        });
        due.collect()
    }

    /// Decides by what was read. Returns the nest if there is something to do or to say.
    fn decide(&self, uid: &str, reading: Result<Reading, Trouble>) -> Option<ObjectRef<BirbNest>> {
        let now = self.now();
        let mut nests = self.lock();
        let scaler = nests.get_mut(uid)?;
        let changed = scaler.decide(reading, now);
        scaler.due = Some(now + scaler.followed.poll);
        changed.then(|| scaler.followed.nest.clone())
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Scaler>> {
        self.nests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scaler {
    fn wanted(&self) -> i32 {
        self.followed.policy.clamp(self.memory.workers)
    }

    fn decide(&mut self, reading: Result<Reading, Trouble>, now: Duration) -> bool {
        let Followed {
            nest,
            policy,
            ready,
            ..
        } = &self.followed;
        self.n_quiet = self.n_quiet.map(|n_readings| n_readings.saturating_add(1));
        let known = reading.as_ref().ok();
        let at_work = (*ready).min(policy.shards);
        self.rates.observe(known, at_work, now);
        let sight = Sight {
            backlog: known.map(|reading| reading.backlog),
            rate: self.rates.per_worker(),
        };
        let before = self.wanted();
        let (memory, hold) = decide(policy, self.memory.clone(), sight, now);
        let after = memory.workers;
        let word = |number: Option<String>| number.unwrap_or_else(|| "-".to_owned());
        // As a line of a trace: src/scaling/traces.
        tracing::debug!(
            "scaling {nest}: {:.3} {} {} {after} {}",
            now.as_secs_f64(),
            word(sight.backlog.map(|backlog| backlog.to_string())),
            word(sight.rate.map(|rate| format!("{rate:.3}"))),
            hold.as_str(),
        );
        (self.memory, self.hold) = (memory, hold);
        if after != before {
            let lag = rounded(sight.backlog.unwrap_or(0));
            let words = format!("from {before} to {after} workers for a lag of {lag}");
            tracing::info!("scaling {nest} {words}");
            self.last_scale = Some(words);
        }
        let trouble = reading.as_ref().err();
        let is_news = match &self.last {
            None => true,
            Some(last) => last.as_ref().err() != trouble,
        };
        if is_news && let Some(trouble) = trouble {
            tracing::warn!(
                "the lag of {nest} is not known, the number of workers stays: {trouble}"
            );
        }
        let shown = self.show(sight.backlog, now);
        self.last = Some(reading);
        is_news || shown || after != before
    }

    /// Whether another lag is to be seen from now on.
    fn show(&mut self, lag: Option<u64>, now: Duration) -> bool {
        let next = lag.map(rounded);
        let before = self.shown;
        self.shown = match (before, next) {
            (Some((shown, at)), Some(lag))
                if shown == lag || now.saturating_sub(at) < SHOW_INTERVAL =>
            {
                before
            }
            (_, Some(lag)) => Some((lag, now)),
            (_, None) => None,
        };
        self.shown != before
    }
}

/// To two digits.
fn rounded(number: u64) -> u64 {
    let digits = number.checked_ilog10().unwrap_or(0);
    let unit = 10_u64.pow(digits.saturating_sub(1));
    (number + unit / 2) / unit * unit
}
