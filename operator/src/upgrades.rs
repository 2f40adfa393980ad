//! Which nests may move to the operator's release: after an upgrade of the operator, those that name no release move one at a
//! time, the next only when the one before it has been ready for a while. A release that does not work stops at its first nest.
//!
//! ```text
//! pass --turn_of-->  Upgrades --grants--> the next nest's pass
//!      --reported-->
//! ```
//! What is under way, and what has not been well since it moved, is read from the nests' own status, so that another leader goes
//! on where this one stopped. In memory is only who was told to begin, and since when it is ready.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store},
};
use opentelemetry::global;

use crate::{
    api::{BirbNest, BirbNestStatus, ConditionType, Reason},
    verdict::before,
};

/// How long a nest keeps its turn that was not well before, or whose passes fail before they get anywhere: whatever is the
/// matter with it is not the release's fault.
const PATIENCE: Duration = Duration::from_secs(300);

/// How a nest stands towards the operator's release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// It does as its spec says: it names a release, is not to be changed, or serves nobody yet.
    Free,
    /// It runs another release, and nothing is being changed.
    Behind { is_well: bool },
    /// It is on its way from one release to another.
    Moving,
    /// It runs the release, and its pods are not ready.
    Failing,
    /// It runs the release, and is not ready for another reason. Unproven, it has not been ready for long enough since it moved.
    NotReady { is_unproven: bool },
    /// It runs the release.
    There,
}

impl Stand {
    fn of(nest: &BirbNest, release: &str, pause: Duration) -> Self {
        let spec = &nest.spec;
        let Some(status) = &nest.status else {
            return Self::Free;
        };
        if spec.version.is_some() || spec.paused || nest.metadata.deletion_timestamp.is_some() {
            return Self::Free;
        }
        let is_ready = is_ready(status);
        let goes_to = goes_to(status);
        // Some pods serve though there never were as many as there should be.
        let first = goes_to.filter(|_| is_ready);
        let Some(runs) = status.version.as_ref().or(first) else {
            return Self::Free;
        };
        // What is changed of a nest that was rolled out in its release, as when it is scaled, is no move.
        let is_changing = status.version.is_none() && holds(status, ConditionType::Progressing);
        if goes_to.is_some_and(|goes_to| goes_to != runs) {
            Self::Moving
        } else if runs != release {
            Self::Behind {
                is_well: is_ready && !holds(status, ConditionType::Degraded),
            }
        } else if is_ready && !is_changing {
            Self::There
        } else if reason(status) == Some(Reason::PodsNotReady) {
            Self::Failing
        } else {
            Self::NotReady {
                is_unproven: is_unproven(status, pause),
            }
        }
    }
}

/// The release that the last pass meant it to have.
fn goes_to(status: &BirbNestStatus) -> Option<&String> {
    status.resolved.as_ref()?.version.as_ref()
}

fn holds(status: &BirbNestStatus, type_: ConditionType) -> bool {
    before(&status.conditions, type_).is_some_and(|condition| condition.holds)
}

/// Why it is not ready, if it is not.
fn reason(status: &BirbNestStatus) -> Option<Reason> {
    let ready = before(&status.conditions, ConditionType::Ready)?;
    (!ready.holds).then_some(ready.reason)
}

/// Whether it works, or is not to.
fn is_ready(status: &BirbNestStatus) -> bool {
    let is_to_rest = [Reason::ScaledToZero, Reason::Suspended, Reason::Draining];
    before(&status.conditions, ConditionType::Ready)
        .is_some_and(|ready| ready.holds || is_to_rest.contains(&ready.reason))
}

/// Whether the nest, which is not ready, has not been ready for `pause` since it runs its release.
fn is_unproven(status: &BirbNestStatus, pause: Duration) -> bool {
    let mut all = status.conditions.iter();
    let ready = all.find(|condition| condition.type_ == ConditionType::Ready.as_str());
    let lost = ready.filter(|ready| ready.status == "False");
    // An operator that did not note the time was of another release, and so was the nest.
    let (Some(lost), Some(moved)) = (lost, &status.version_since) else {
        return false;
    };
    let was_ready_for = lost.last_transition_time.0.duration_since(moved.0);
    !Duration::try_from(was_ready_for).is_ok_and(|long| long >= pause)
}

/// The release that a nest is to have now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Which one.
    pub release: String,
    /// The operator's, if it is to move there later.
    pub later: Option<String>,
}

/// Whose turn it is.
pub struct Upgrades {
    release: String,
    /// How long a nest is to be ready before the next one moves.
    pause: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    holder: Option<Holder>,
    /// Uids of those that had their turn in vain.
    in_vain: HashSet<String>,
    /// All nests, and who is told whose turn it is; once there are passes.
    open: Option<(Store<BirbNest>, UnboundedSender<ObjectRef<BirbNest>>)>,
}

/// The nest whose turn it is.
struct Holder {
    uid: String,
    since: Instant,
    was_well: bool,
    /// A pass came to its end since.
    has_begun: bool,
    ready_since: Option<Instant>,
}

impl Holder {
    fn new(uid: String, was_well: bool, now: Instant) -> Self {
        Self {
            uid,
            since: now,
            was_well,
            has_begun: false,
            ready_since: None,
        }
    }
}

impl Upgrades {
    /// Of an operator of this release.
    pub fn new(release: String, pause: Duration) -> Self {
        Self {
            release,
            pause,
            state: Mutex::default(),
        }
    }

    /// From now on `nests` are those there are; returns those whose turn has come.
    pub fn open(&self, nests: Store<BirbNest>) -> UnboundedReceiver<ObjectRef<BirbNest>> {
        let (granted, turns) = unbounded();
        self.lock().open = Some((nests, granted));
        turns
    }

    /// The release that `nest`, which was just read, is to have at `now` if it names none.
    pub fn turn_of(&self, nest: &BirbNest, now: Instant) -> Turn {
        let uid = nest.uid().unwrap_or_default();
        let mut state = self.lock();
        let stand = self.stand(nest);
        match stand {
            Stand::Free => self.leave(&mut state, &uid, now),
            Stand::Moving if state.holder.is_none() && !state.in_vain.contains(&uid) => {
                state.holder = Some(Holder::new(uid.clone(), true, now));
            }
            Stand::Behind { .. } => self.grant(&mut state, None, now),
            Stand::Moving | Stand::There | Stand::Failing | Stand::NotReady { .. } => {}
        }
        let is_behind = matches!(stand, Stand::Behind { .. });
        let waits = is_behind && state.holder.as_ref().is_none_or(|holder| holder.uid != uid);
        let status = nest.status.as_ref();
        let stays = status.and_then(|status| goes_to(status).or(status.version.as_ref()));
        match stays.filter(|_| waits || nest.spec.paused) {
            Some(stays) => Turn {
                release: stays.clone(),
                later: waits.then(|| self.release.clone()),
            },
            None => Turn {
                release: self.release.clone(),
                later: None,
            },
        }
    }

    /// `nest` has that status at `now`. Returns when to look at it again, if it must be looked at for the others' sake.
    pub fn reported(
        &self,
        nest: &BirbNest,
        status: &BirbNestStatus,
        now: Instant,
    ) -> Option<Duration> {
        let uid = nest.uid().unwrap_or_default();
        let nest = BirbNest {
            status: Some(status.clone()),
            ..nest.clone()
        };
        let is_there = self.stand(&nest) == Stand::There;
        let mut state = self.lock();
        let Some(holder) = state.holder.as_mut().filter(|holder| holder.uid == uid) else {
            if is_there {
                // It may have been what stopped the others.
                self.grant(&mut state, Some(&uid), now);
            }
            return None;
        };
        holder.has_begun = true;
        if !is_there {
            holder.ready_since = None;
            self.grant(&mut state, None, now);
            return Some(PATIENCE);
        }
        let ready_for = now.saturating_duration_since(*holder.ready_since.get_or_insert(now));
        let left = self.pause.saturating_sub(ready_for);
        if left.is_zero() {
            self.leave(&mut state, &uid, now);
            return None;
        }
        Some(left)
    }

    /// There is no nest with this uid any more.
    pub fn gone(&self, uid: &str) {
        self.leave(&mut self.lock(), uid, Instant::now());
    }

    fn leave(&self, state: &mut State, uid: &str, now: Instant) {
        if state.holder.take_if(|holder| holder.uid == uid).is_some() {
            self.grant(state, Some(uid), now);
        }
    }

    /// Gives the turn to the next nest, unless one has it. What is known of `left` may be old.
    fn grant(&self, state: &mut State, left: Option<&str>, now: Instant) {
        let Some((nests, granted)) = &state.open else {
            return;
        };
        let nests = nests.state();
        let stands: HashMap<String, (Stand, &Arc<BirbNest>)> = nests
            .iter()
            .filter_map(|nest| Some((nest.uid()?, (self.stand(nest), nest))))
            .filter(|(uid, _)| Some(uid.as_str()) != left)
            .collect();
        if let Some(holder) = &state.holder {
            let is_late = now.saturating_duration_since(holder.since) >= PATIENCE;
            match stands.get(&holder.uid).map(|(stand, _)| stand) {
                None | Some(Stand::Free) => {}
                // What was granted is not seen before the pass that moves it has ended.
                Some(_) if is_late && !(holder.was_well && holder.has_begun) => {
                    state.in_vain.insert(holder.uid.clone());
                }
                Some(_) => return,
            }
            state.holder = None;
        }
        if stands.values().any(|(stand, _)| *stand == Stand::Failing) {
            return;
        }
        let rank = |uid: &String, stand, nest: &Arc<BirbNest>| {
            // Who is on its way goes on first; those that were not well before come last. Another leader moved what is there
            // and was never well: perhaps it was not before either.
            let (is_moving, is_well) = match stand {
                Stand::Moving => (true, true),
                Stand::NotReady { is_unproven: true } => (true, false),
                Stand::Behind { is_well } => (false, is_well),
                _ => return None,
            };
            let name = (nest.namespace(), nest.name_any());
            let has_tried = state.in_vain.contains(uid);
            let rank = (has_tried, Reverse(is_moving), Reverse(is_well), name);
            (!(has_tried && is_moving)).then_some((rank, is_well))
        };
        let ranked = stands
            .iter()
            .filter_map(|(uid, (stand, nest))| Some((rank(uid, *stand, nest)?, uid, nest)));
        let first = ranked.min_by(|((one, _), ..), ((other, _), ..)| one.cmp(other));
        let Some(((_, is_well), uid, next)) = first else {
            return;
        };
        let is_there = matches!(self.stand(next), Stand::NotReady { .. });
        let next = ObjectRef::from_obj(next.as_ref());
        if is_there {
            tracing::info!(
                "nest {next} moved to release {} and is not ready: others wait",
                self.release
            );
        } else {
            tracing::info!("nest {next} moves to release {}", self.release);
        }
        state.holder = Some(Holder::new(uid.clone(), is_well, now));
        // Nobody listens any more when the process ends.
        let _ = granted.unbounded_send(next);
    }

    fn stand(&self, nest: &BirbNest) -> Stand {
        Stand::of(nest, &self.release, self.pause)
    }

    fn n_behind(&self) -> usize {
        let state = self.lock();
        let nests = state.open.iter().flat_map(|(nests, _)| nests.state());
        let stands = nests.map(|nest| self.stand(&nest));
        stands
            .filter(|stand| matches!(stand, Stand::Behind { .. } | Stand::Moving))
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets the meter look at `upgrades`.
pub fn observe(upgrades: &Arc<Upgrades>) {
    let upgrades = Arc::clone(upgrades);
    global::meter("birb-nest-operator")
        .u64_observable_gauge("birbnest_operator_nests_behind")
        .with_description("Nests that name no release and do not run the operator's yet")
        .with_callback(move |observer| {
            observer.observe(upgrades.n_behind().try_into().unwrap_or(u64::MAX), &[]);
        })
        .build();
}

#[cfg(test)]
mod tests;
