//! Which nests may move to the operator's release: after an upgrade of the operator, those that name no release move one at a
//! time, the next only when the one before it is ready. A release that does not work stops at its first nest.
//!
//! ```text
//! pass --release_of--> Upgrades --grants--> the next nest's pass
//!      --moved-------->
//! ```
//! What is under way is read from the nests' own status, so that another leader goes on where this one stopped.

use std::{
    cmp::Reverse,
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use kube::{
    ResourceExt,
    runtime::reflector::{ObjectRef, Store},
};
use opentelemetry::global;

use crate::{
    api::{BirbNest, BirbNestStatus, ConditionType, Reason},
    status::before,
};

/// How a nest stands towards the operator's release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stand {
    /// It does as its spec says: it names a release, is not to be changed, or has served nobody yet.
    Free,
    /// It runs another release and has not begun to leave it.
    Behind {
        /// It was on its way to that other release when another operator came.
        is_halfway: bool,
        is_ready: bool,
    },
    /// It is on its way.
    Moving,
    /// It runs it, and is not ready, or not any more.
    NotReady,
    /// It runs it.
    There,
}

impl Stand {
    fn of(nest: &BirbNest, release: &str) -> Self {
        let spec = &nest.spec;
        let status = nest.status.as_ref();
        let Some((status, runs)) = status.and_then(|it| Some((it, it.version.as_ref()?))) else {
            return Self::Free;
        };
        if spec.version.is_some() || spec.paused || nest.metadata.deletion_timestamp.is_some() {
            return Self::Free;
        }
        let is_ready = is_ready(status);
        let goes_to = goes_to(status).unwrap_or(runs);
        if goes_to != release {
            let is_halfway = goes_to != runs;
            Self::Behind {
                is_halfway,
                is_ready,
            }
        } else if runs != release {
            Self::Moving
        } else if is_ready {
            Self::There
        } else {
            Self::NotReady
        }
    }
}

/// The release that the last pass meant it to have.
fn goes_to(status: &BirbNestStatus) -> Option<&String> {
    status.resolved.as_ref()?.version.as_ref()
}

/// Whether it works, or is not to.
fn is_ready(status: &BirbNestStatus) -> bool {
    let is_to_rest = [Reason::ScaledToZero, Reason::Suspended, Reason::Draining];
    before(&status.conditions, ConditionType::Ready)
        .is_some_and(|ready| ready.holds || is_to_rest.contains(&ready.reason))
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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Uid of the nest whose turn it is.
    holder: Option<String>,
    /// All nests, and who is told whose turn it is; once there are passes.
    open: Option<(Store<BirbNest>, UnboundedSender<ObjectRef<BirbNest>>)>,
}

impl Upgrades {
    /// Of an operator of this release.
    pub fn new(release: String) -> Self {
        Self {
            release,
            state: Mutex::default(),
        }
    }

    /// From now on `nests` are those there are; returns those whose turn has come.
    pub fn open(&self, nests: Store<BirbNest>) -> UnboundedReceiver<ObjectRef<BirbNest>> {
        let (granted, turns) = unbounded();
        self.lock().open = Some((nests, granted));
        turns
    }

    /// The release that `nest`, which was just read, is to have if it names none.
    pub fn turn_of(&self, nest: &BirbNest) -> Turn {
        let uid = nest.uid().unwrap_or_default();
        let mut state = self.lock();
        let stand = Stand::of(nest, &self.release);
        match stand {
            Stand::Free | Stand::There => self.leave(&mut state, &uid),
            Stand::Moving => {
                state.holder.get_or_insert_with(|| uid.clone());
            }
            // Who had a turn keeps it until it is ready. Who had none, and lost its readiness later, is in nobody's way.
            Stand::NotReady => {}
            Stand::Behind { .. } => self.grant(&mut state),
        }
        let is_behind = matches!(stand, Stand::Behind { .. });
        let waits = is_behind && state.holder.as_ref() != Some(&uid);
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

    /// The nest with this uid has that status now.
    pub fn reported(&self, nest: &BirbNest, status: &BirbNestStatus) {
        let nest = BirbNest {
            status: Some(status.clone()),
            ..nest.clone()
        };
        if Stand::of(&nest, &self.release) == Stand::There {
            self.gone(&nest.uid().unwrap_or_default());
        }
    }

    /// There is no such nest any more, or it has moved.
    pub fn gone(&self, uid: &str) {
        self.leave(&mut self.lock(), uid);
    }

    fn leave(&self, state: &mut State, uid: &str) {
        if state.holder.take_if(|holder| holder == uid).is_some() {
            self.grant_but(state, Some(uid));
        }
    }

    fn grant(&self, state: &mut State) {
        self.grant_but(state, None);
    }

    /// Gives the turn to the next nest, unless one has it. What is known of `left` may be old.
    fn grant_but(&self, state: &mut State, left: Option<&str>) {
        let Some((nests, granted)) = &state.open else {
            return;
        };
        let nests = nests.state();
        let nests: HashMap<String, &Arc<BirbNest>> = nests
            .iter()
            .filter_map(|nest| Some((nest.uid()?, nest)))
            .filter(|(uid, _)| Some(uid.as_str()) != left)
            .collect();
        let stand = |nest: &BirbNest| Stand::of(nest, &self.release);
        // What was granted is not seen before the pass that moves it has ended.
        let is_under_way = |uid: &String| {
            let found = nests.get(uid).map(|nest| stand(nest));
            matches!(
                found,
                Some(Stand::Moving | Stand::NotReady | Stand::Behind { .. })
            )
        };
        if state.holder.as_ref().is_some_and(is_under_way) {
            return;
        }
        state.holder = None;
        if let Some((uid, _)) = nests.iter().find(|(_, nest)| stand(nest) == Stand::Moving) {
            state.holder = Some(uid.clone());
            return;
        }
        let rank = |nest: &Arc<BirbNest>| match stand(nest) {
            Stand::Behind {
                is_halfway,
                is_ready,
            } => Some((
                Reverse(is_halfway),
                Reverse(is_ready),
                nest.namespace(),
                nest.name_any(),
            )),
            _ => None,
        };
        let behind = nests
            .iter()
            .filter_map(|(uid, nest)| Some((rank(nest)?, uid, nest)));
        let Some((_, uid, next)) = behind.min_by(|(one, ..), (other, ..)| one.cmp(other)) else {
            return;
        };
        let next = ObjectRef::from_obj(next.as_ref());
        tracing::info!("nest {next} moves to release {}", self.release);
        state.holder = Some(uid.clone());
        // Nobody listens any more when the process ends.
        let _ = granted.unbounded_send(next);
    }

    fn n_behind(&self) -> usize {
        let state = self.lock();
        let nests = state.open.iter().flat_map(|(nests, _)| nests.state());
        let stands = nests.map(|nest| Stand::of(&nest, &self.release));
        stands
            .filter(|stand| matches!(stand, Stand::Behind { .. }))
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
        .with_description(
            "Nests that name no release and wait for their turn to move to the operator's",
        )
        .with_callback(move |observer| {
            observer.observe(upgrades.n_behind().try_into().unwrap_or(u64::MAX), &[]);
        })
        .build();
}

#[cfg(test)]
mod tests {
    use kube::runtime::{reflector::store, watcher::Event};
    use serde_json::json;

    use super::*;
    use crate::testing;

    /// A nest of that name that runs `runs`, was last to have `goes_to`, and is ready or not.
    fn nest(name: &str, spec: &str, runs: Option<&str>, goes_to: &str, is_ready: bool) -> BirbNest {
        let mut nest = testing::stored(spec);
        nest.metadata.name = Some(name.to_owned());
        nest.metadata.uid = Some(format!("uid of {name}"));
        let status = if is_ready { "True" } else { "False" };
        nest.status = Some(
            serde_json::from_value(json!({
                "version": runs,
                "resolved": { "image": "it", "version": goes_to, "redis": "Managed", "nats": "Managed", "postgres": "Managed" },
                "conditions": [{ "type": "Ready", "status": status, "reason": "PodsNotReady", "message": "",
                                 "lastTransitionTime": "2026-01-01T00:00:00Z" }],
            }))
            .unwrap(),
        );
        nest
    }

    /// An operator of release 2 that knows these nests, each of which had a pass; returns who has moved, in order, when each
    /// is ready at once, and who is left behind.
    fn order(nests: Vec<BirbNest>, becomes_ready: impl Fn(&str) -> bool) -> (Vec<String>, usize) {
        let upgrades = Upgrades::new("2".to_owned());
        let (known, mut writer) = store();
        let mut turns = upgrades.open(known.clone());
        writer.apply_watcher_event(&Event::Init);
        for nest in &nests {
            writer.apply_watcher_event(&Event::InitApply(nest.clone()));
        }
        writer.apply_watcher_event(&Event::InitDone);
        for nest in &nests {
            upgrades.turn_of(nest);
        }
        let mut moved = Vec::new();
        while let Ok(next) = turns.try_recv() {
            let now = known.get(&next).unwrap();
            let turn = upgrades.turn_of(&now);
            assert_eq!((turn.release.as_str(), turn.later), ("2", None));
            let others = nests.iter().filter(|other| other.uid() != now.uid());
            for other in others.filter_map(|other| known.get(&ObjectRef::from_obj(other))) {
                if matches!(Stand::of(&other, "2"), Stand::Behind { .. }) {
                    assert_eq!(upgrades.turn_of(&other).later, Some("2".to_owned()));
                }
            }
            moved.push(next.name.clone());
            for is_ready in [false, becomes_ready(&next.name)] {
                let runs = if is_ready { "2" } else { "1" };
                let now = nest(&next.name, "{}", Some(runs), "2", is_ready);
                // What a pass reports is seen later.
                upgrades.reported(&now, now.status.as_ref().unwrap());
                writer.apply_watcher_event(&Event::Apply(now));
            }
        }
        (moved, upgrades.n_behind())
    }

    #[test]
    fn nests_move_one_at_a_time_and_those_that_work_first() {
        let nests = vec![
            nest("broken", "{}", Some("1"), "1", false),
            nest("c", "{}", Some("1"), "1", true),
            nest("a", "{}", Some("1"), "1", true),
            nest("halfway", "{}", Some("0"), "1", false),
            nest("pinned", "{version: '1'}", Some("1"), "1", true),
            nest("paused", "{paused: true}", Some("1"), "1", true),
            nest("new", "{}", None, "1", false),
            nest("there", "{}", Some("2"), "2", true),
            nest("lost", "{}", Some("2"), "2", false),
        ];
        let (moved, n_behind) = order(nests, |_| true);
        assert_eq!(
            (moved.join(" ").as_str(), n_behind),
            ("halfway a c broken", 0)
        );
    }

    #[test]
    fn a_paused_nest_stays_where_it_is() {
        let upgrades = Upgrades::new("2".to_owned());
        let paused = nest("a", "{paused: true}", Some("1"), "1", true);
        let turn = upgrades.turn_of(&paused);
        assert_eq!((turn.release.as_str(), turn.later), ("1", None));
    }

    #[test]
    fn a_release_that_does_not_work_stops_at_its_first_nest() {
        let nests = ["a", "b", "c"].map(|name| nest(name, "{}", Some("1"), "1", true));
        let (moved, n_behind) = order(nests.to_vec(), |name| name != "b");
        assert_eq!((moved.join(" ").as_str(), n_behind), ("a b", 1));
    }

    #[test]
    fn another_leader_goes_on_with_the_nest_that_is_on_its_way() {
        let nests = vec![
            nest("a", "{}", Some("1"), "1", true),
            nest("b", "{}", Some("1"), "2", false),
        ];
        let (moved, n_behind) = order(nests, |_| true);
        assert_eq!((moved.len(), n_behind), (0, 1));
    }

    #[test]
    fn whoever_is_pinned_or_gone_gives_its_turn_to_the_next() {
        for is_deleted in [false, true] {
            let upgrades = Upgrades::new("2".to_owned());
            let (known, mut writer) = store();
            let mut turns = upgrades.open(known);
            let nests = ["a", "b"].map(|name| nest(name, "{}", Some("1"), "1", true));
            for nest in &nests {
                writer.apply_watcher_event(&Event::Apply(nest.clone()));
            }
            upgrades.turn_of(&nests[1]);
            assert_eq!(turns.try_recv().unwrap().name, "a");
            if is_deleted {
                upgrades.gone("uid of a");
            } else {
                upgrades.turn_of(&nest("a", "{version: '1'}", Some("1"), "1", true));
            }
            assert_eq!(turns.try_recv().unwrap().name, "b");
        }
    }
}
