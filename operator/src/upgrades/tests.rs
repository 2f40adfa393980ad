use k8s_openapi::jiff::Timestamp;
use kube::runtime::{
    reflector::{
        store,
        store::{Store, Writer},
    },
    watcher::Event,
};
use serde_json::json;

use super::*;
use crate::testing;

const PAUSE: Duration = Duration::from_secs(60);

/// What the status says of a nest: the release that runs, the one that it goes to, and `Ready` with its reason.
#[derive(Clone, Copy)]
struct Look {
    runs: Option<&'static str>,
    goes_to: &'static str,
    ready: Result<(), &'static str>,
    is_degraded: bool,
    /// Something of it is being changed, as when it is scaled.
    is_changing: bool,
    /// Since when `Ready` is what it is, in seconds after it was rolled out in the release that runs.
    since: i64,
    /// When the last change of it began or ended, in the same seconds.
    changed: i64,
}

const OLD: Look = Look {
    runs: Some("1"),
    goes_to: "1",
    ready: Ok(()),
    is_degraded: false,
    is_changing: false,
    since: 3600,
    changed: 0,
};
const MOVING: Look = Look {
    goes_to: "2",
    ..OLD
};
const NEW: Look = Look {
    runs: Some("2"),
    ..MOVING
};
const LOST: Result<(), &str> = Err("PodsNotReady");

fn nest(name: &str, spec: &str, look: Look) -> BirbNest {
    let mut nest = testing::stored(spec);
    nest.metadata.name = Some(name.to_owned());
    nest.metadata.uid = Some(format!("uid of {name}"));
    let at = |second: i64| Timestamp::from_second(1_800_000_000 + second).unwrap();
    let condition = |type_: &str, holds: bool, reason: &str, since: i64| {
        json!({ "type": type_, "status": if holds { "True" } else { "False" }, "reason": reason, "message": "",
                "lastTransitionTime": at(since) })
    };
    let is_moving = look.goes_to != look.runs.unwrap_or(look.goes_to);
    nest.status = Some(
        serde_json::from_value(json!({
            "version": look.runs,
            "versionSince": at(0),
            "resolved": { "image": "it", "version": look.goes_to,
                          "redis": "Managed", "nats": "Managed", "postgres": "Managed" },
            "conditions": [
                condition("Ready", look.ready.is_ok(), look.ready.err().unwrap_or("Available"), look.since),
                condition("Progressing", is_moving || look.is_changing, "AsExpected", look.changed),
                condition("Degraded", look.is_degraded, "PodsNotReady", look.changed),
            ],
        }))
        .unwrap(),
    );
    nest
}

/// An operator of release 2, and what it knows.
struct Line {
    upgrades: Upgrades,
    known: Store<BirbNest>,
    writer: Writer<BirbNest>,
    turns: UnboundedReceiver<ObjectRef<BirbNest>>,
    now: Instant,
}

impl Line {
    /// Each of `nests` had a pass.
    fn of(nests: &[BirbNest]) -> Self {
        let upgrades = Upgrades::new("2".to_owned(), PAUSE);
        let (known, mut writer) = store();
        let turns = upgrades.open(known.clone());
        writer.apply_watcher_event(&Event::Init);
        for nest in nests {
            writer.apply_watcher_event(&Event::InitApply(nest.clone()));
        }
        writer.apply_watcher_event(&Event::InitDone);
        let now = Instant::now();
        for nest in nests {
            upgrades.turn_of(nest, now);
        }
        Self {
            upgrades,
            known,
            writer,
            turns,
            now,
        }
    }

    /// A pass over `nest`, which finds it so and is seen later; whether it may move.
    fn pass(&mut self, nest: &BirbNest) -> bool {
        let turn = self.upgrades.turn_of(nest, self.now);
        let status = nest.status.as_ref().unwrap();
        self.upgrades.reported(nest, status, self.now);
        self.writer.apply_watcher_event(&Event::Apply(nest.clone()));
        turn.release == "2"
    }

    /// Whose turn has come, if somebody's has.
    fn next(&mut self) -> Option<String> {
        self.turns.try_recv().ok().map(|nest| nest.name)
    }

    /// The nest moves, is ready at once, and for long enough.
    fn moves(&mut self, name: &str) {
        assert!(self.pass(&nest(name, "{}", MOVING)));
        self.pass(&nest(name, "{}", NEW));
        self.now += PAUSE;
        self.pass(&nest(name, "{}", NEW));
    }

    /// Who moves, in order, if each is ready at once.
    fn order(mut self) -> String {
        let mut moved = Vec::new();
        while let Some(name) = self.next() {
            for other in self.known.state() {
                if matches!(self.upgrades.stand(&other), Stand::Behind { .. })
                    && other.name_any() != name
                {
                    assert!(!self.pass(&other), "{} beside {name}", other.name_any());
                }
            }
            self.moves(&name);
            moved.push(name);
        }
        assert_eq!(self.upgrades.n_behind(), 0);
        moved.join(" ")
    }
}

#[test]
fn nests_move_one_at_a_time_and_those_that_are_well_first() {
    let degraded = Look {
        is_degraded: true,
        ..OLD
    };
    let unready = Look { ready: LOST, ..OLD };
    // It never had as many pods as it should have, and serves.
    let short = Look { runs: None, ..OLD };
    let new = Look {
        ready: LOST,
        ..short
    };
    let down = Look {
        ready: Err("ServerNotReady"),
        ..NEW
    };
    let line = Line::of(&[
        nest("broken", "{}", unready),
        nest("degraded", "{}", degraded),
        nest("c", "{}", OLD),
        nest("a", "{}", OLD),
        nest("short", "{}", short),
        nest("pinned", "{version: '1'}", OLD),
        nest("paused", "{paused: true}", OLD),
        nest("new", "{}", new),
        nest("there", "{}", NEW),
        nest("down", "{}", down),
    ]);
    assert_eq!(line.order(), "a c short broken degraded");
}

#[test]
fn the_next_waits_until_the_one_before_was_ready_for_a_while() {
    let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    let waits = nest("b", "{}", OLD);
    for ready in [LOST, Err("ServerNotReady"), Ok(()), LOST, Ok(())] {
        let look = Look { ready, ..NEW };
        assert!(line.pass(&nest("a", "{}", look)));
        line.now += PAUSE / 2;
        assert!(line.pass(&nest("a", "{}", look)));
        assert!(!line.pass(&waits) && line.next().is_none(), "{ready:?}");
    }
    line.now += PAUSE / 2;
    line.pass(&nest("a", "{}", NEW));
    assert_eq!(line.next().as_deref(), Some("b"));
    assert!(line.pass(&waits));
}

#[test]
fn a_release_that_breaks_a_nest_later_stops_there_until_it_is_mended() {
    let mut line = Line::of(&["a", "b", "c"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    line.moves("a");
    assert_eq!(line.next().as_deref(), Some("b"));
    line.pass(&nest("a", "{}", Look { ready: LOST, ..NEW }));
    line.moves("b");
    assert_eq!(line.next(), None);
    assert!(!line.pass(&nest("c", "{}", OLD)));
    line.now += PATIENCE * 10;
    assert!(!line.pass(&nest("c", "{}", OLD)));
    line.pass(&nest("a", "{}", NEW));
    assert_eq!(line.next().as_deref(), Some("c"));
}

#[test]
fn who_was_not_well_before_loses_its_turn_after_a_while() {
    let unready = Look { ready: LOST, ..OLD };
    let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", unready)));
    assert_eq!(line.next().as_deref(), Some("a"));
    let stuck = nest(
        "a",
        "{}",
        Look {
            ready: LOST,
            ..MOVING
        },
    );
    assert!(line.pass(&stuck));
    line.now += PATIENCE - Duration::from_secs(1);
    assert!(line.pass(&stuck));
    assert_eq!(line.next(), None);
    line.now += Duration::from_secs(1);
    // It goes on, and so does the next.
    assert!(line.pass(&stuck));
    assert_eq!(line.next().as_deref(), Some("b"));
    line.moves("b");
    assert_eq!(line.next(), None);
}

#[test]
fn a_nest_that_was_well_keeps_its_turn_however_long_it_takes() {
    let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    for _ in 0..3 {
        line.now += PATIENCE;
        assert!(line.pass(&nest("a", "{}", MOVING)));
        assert!(!line.pass(&nest("b", "{}", OLD)));
    }
    assert_eq!(line.next(), None);
}

#[test]
fn a_nest_whose_passes_fail_loses_its_turn() {
    let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    line.now += PATIENCE;
    assert!(line.pass(&nest("b", "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("b"));
}

#[test]
fn another_leader_goes_on_with_the_nest_that_is_on_its_way() {
    let mut line = Line::of(&[nest("a", "{}", OLD), nest("b", "{}", MOVING)]);
    assert!(!line.pass(&nest("a", "{}", OLD)));
    line.moves("b");
    let granted: Vec<_> = std::iter::from_fn(|| line.next()).collect();
    assert_eq!(granted.last().map(String::as_str), Some("a"));
}

/// Whoever was told to begin is forgotten with the leader that told it.
#[test]
fn another_leader_waits_for_the_nest_that_is_there_and_was_not_ready_since() {
    let long = i64::try_from(PAUSE.as_secs()).unwrap();
    for (since, is_waited_for) in [(-5, true), (long - 1, true), (long, false)] {
        let down = nest(
            "b",
            "{}",
            Look {
                ready: Err("ServerNotReady"),
                since,
                ..NEW
            },
        );
        let mut line = Line::of(&[nest("a", "{}", OLD), down.clone()]);
        assert_ne!(line.pass(&nest("a", "{}", OLD)), is_waited_for, "{since}");
        if !is_waited_for {
            continue;
        }
        assert_eq!(line.next().as_deref(), Some("b"));
        line.pass(&down);
        assert!(line.next().is_none());
        if since < 0 {
            // It was not well before either, for all that is known.
            line.now += PATIENCE;
            line.pass(&down);
        } else {
            line.pass(&nest("b", "{}", NEW));
            line.now += PAUSE;
            assert!(!line.pass(&nest("a", "{}", OLD)));
            line.pass(&nest("b", "{}", NEW));
        }
        assert_eq!(line.next().as_deref(), Some("a"));
        assert!(line.pass(&nest("a", "{}", OLD)));
    }
}

#[test]
fn a_nest_that_is_scaled_holds_nobody_up() {
    let scaled = Look {
        is_changing: true,
        ..NEW
    };
    let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    assert!(line.pass(&nest("a", "{}", NEW)));
    line.now += PAUSE;
    // However long that takes, and whether or not it comes to an end.
    line.pass(&nest("a", "{}", scaled));
    assert_eq!(line.next().as_deref(), Some("b"));

    // It moved long ago, was scaled, and lost its servers at once.
    let lost = nest(
        "b",
        "{}",
        Look {
            ready: Err("ServerNotReady"),
            since: 3605,
            changed: 3600,
            ..NEW
        },
    );
    let mut line = Line::of(&[nest("a", "{}", OLD), lost]);
    assert!(line.pass(&nest("a", "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
}

/// That is not seen by the release that was rolled out last: none ever was.
#[test]
fn a_nest_that_never_had_all_of_its_pods_is_waited_for_while_it_moves() {
    let short = Look { runs: None, ..OLD };
    let moving = Look {
        runs: None,
        is_changing: true,
        ..MOVING
    };
    let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", short)));
    assert_eq!(line.next().as_deref(), Some("a"));
    for _ in 0..3 {
        assert!(line.pass(&nest("a", "{}", moving)));
        line.now += PAUSE;
        assert!(!line.pass(&nest("b", "{}", short)));
    }
    line.pass(&nest("a", "{}", NEW));
    line.now += PAUSE;
    line.pass(&nest("a", "{}", NEW));
    assert_eq!(line.next().as_deref(), Some("b"));
}

/// It cannot be held where it is, half in one release and half in the other.
#[test]
fn a_nest_that_was_paused_on_its_way_goes_on_and_the_line_waits_for_it_too() {
    let mut line = Line::of(&["a", "b", "c"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    assert!(line.pass(&nest("a", "{}", MOVING)));
    line.pass(&nest("a", "{paused: true}", MOVING));
    assert_eq!(line.next().as_deref(), Some("b"));
    assert!(line.pass(&nest("b", "{}", MOVING)));
    assert!(line.pass(&nest("a", "{}", MOVING)));
    line.moves("b");
    assert_eq!(line.next().as_deref(), Some("a"));
    assert!(!line.pass(&nest("c", "{}", OLD)));
    line.moves("a");
    assert_eq!(line.next().as_deref(), Some("c"));
}

#[test]
fn a_nest_that_was_paused_before_its_turn_waits_for_it_again() {
    let mut line = Line::of(&["a", "b", "c"].map(|name| nest(name, "{}", OLD)));
    assert_eq!(line.next().as_deref(), Some("a"));
    line.pass(&nest("a", "{paused: true}", OLD));
    assert_eq!(line.next().as_deref(), Some("b"));
    assert!(line.pass(&nest("b", "{}", MOVING)));
    assert!(!line.pass(&nest("a", "{}", OLD)));
    line.moves("b");
    assert_eq!(line.next().as_deref(), Some("a"));
    line.moves("a");
    assert_eq!(line.next().as_deref(), Some("c"));
}

#[test]
fn a_release_that_is_asked_for_no_more_is_left_at_once() {
    // `spec.version: 9` was taken back.
    let wrong = Look {
        goes_to: "9",
        ..OLD
    };
    let mut line = Line::of(&[nest("a", "{}", OLD), nest("b", "{}", wrong)]);
    assert!(line.pass(&nest("b", "{}", wrong)));
}

#[test]
fn a_paused_nest_stays_where_it_is() {
    let line = Line::of(&[]);
    let paused = nest("a", "{paused: true}", OLD);
    let turn = line.upgrades.turn_of(&paused, line.now);
    assert_eq!((turn.release.as_str(), turn.later), ("1", None));
}

#[test]
fn whoever_is_pinned_or_gone_gives_its_turn_to_the_next() {
    for is_deleted in [false, true] {
        let mut line = Line::of(&["a", "b"].map(|name| nest(name, "{}", OLD)));
        assert_eq!(line.next().as_deref(), Some("a"));
        if is_deleted {
            line.upgrades.gone("uid of a");
        } else {
            line.pass(&nest("a", "{version: '1'}", OLD));
        }
        assert_eq!(line.next().as_deref(), Some("b"));
    }
}
