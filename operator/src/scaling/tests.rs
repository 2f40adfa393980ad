use std::{fmt::Write as _, time::Duration};

use proptest::prelude::*;

use super::{
    decide::{Hold, Memory, Policy, Sight, decide},
    rounded,
};

fn policy() -> Policy {
    Policy {
        min: 1,
        max: 5,
        shards: 8,
        target_lag: 5_000,
        drain: Duration::from_secs(30),
        activation_lag: 0,
        window: Duration::from_secs(300),
        cooldown: Duration::from_secs(60),
    }
}

/// Replays a trace: lines `second backlog rate workers hold`, where `-` is unknown; `second begin workers` is an operator that
/// remembers nothing, and `set name=value ...` changes the policy. `second quiet` says that nobody writes from then on. Returns it
/// with the workers and the hold that come out. A change of leader is one of the operator's: who leads NATS' consumers is not seen
/// here, but on three servers, in the test that `docs/OPERATOR.md` names.
fn replay(trace: &str) -> String {
    let mut policy = policy();
    let mut memory = Memory::new(1, Duration::ZERO);
    let mut replayed = String::new();
    for line in trace.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["set", ref settings @ ..] => {
                for setting in settings {
                    set(&mut policy, setting);
                }
                writeln!(replayed, "{line}").unwrap();
            }
            [second, "begin", workers] => {
                memory = Memory::new(workers.parse().unwrap(), seconds(second));
                writeln!(replayed, "{line}").unwrap();
            }
            [second, backlog, rate, ..] if !line.starts_with('#') => {
                let sight = Sight {
                    backlog: backlog.parse().ok(),
                    rate: rate.parse().ok(),
                };
                let hold;
                (memory, hold) = decide(&policy, memory, sight, seconds(second));
                let (workers, hold) = (memory.workers, hold.as_str());
                writeln!(replayed, "{second} {backlog} {rate} {workers} {hold}").unwrap();
            }
            _ => writeln!(replayed, "{line}").unwrap(),
        }
    }
    replayed
}

fn seconds(word: &str) -> Duration {
    Duration::try_from_secs_f64(word.parse().unwrap()).unwrap()
}

fn set(policy: &mut Policy, setting: &str) {
    let (name, value) = setting.split_once('=').unwrap();
    let number = value.parse().unwrap();
    match name {
        "min" => policy.min = number,
        "max" => policy.max = number,
        "shards" => policy.shards = number,
        "targetLag" => policy.target_lag = number,
        "activationLag" => policy.activation_lag = number,
        "drain" => policy.drain = seconds(value),
        "window" => policy.window = seconds(value),
        "cooldown" => policy.cooldown = seconds(value),
        _ => panic!("no setting {name}"),
    }
}

/// Fails unless nothing changes in `trace` while the backlog is not known, and no number that was given up is asked for
/// again within the window in which it counts: that is what flapping would look like. And unless what waits is drained within the
/// target: there are as many workers as that takes, and when nobody writes any more, it is gone in time.
fn judge(trace: &str) {
    let (mut policy, mut workers, mut lowered) = (policy(), None, None);
    let mut drain = Drain::default();
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (at, backlog, rate, next, hold) = match words[..] {
            ["set", ref settings @ ..] => {
                settings
                    .iter()
                    .for_each(|setting| set(&mut policy, setting));
                // Other bounds may ask for anything.
                (workers, lowered) = (None, None);
                continue;
            }
            [_, "quiet"] => {
                drain.is_quiet = true;
                continue;
            }
            [at, backlog, rate, next, hold] => (
                seconds(at),
                backlog,
                rate,
                next.parse::<i32>().unwrap(),
                hold,
            ),
            _ => continue,
        };
        if let Some(before) = workers.replace(next) {
            assert!(
                backlog != "-" || next == before,
                "changed by what is not known: {line}"
            );
            if next < before {
                lowered = Some(at);
            }
            let is_soon = lowered.is_some_and(|lowered| at - lowered < policy.window);
            assert!(next <= before || !is_soon, "it flaps: {line}");
        }
        let (backlog, rate) = (backlog.parse::<f64>().ok(), rate.parse::<f64>().ok());
        if let (Some(backlog), Some(rate)) = (backlog, rate) {
            let most = policy.max.min(policy.shards);
            // A tenth is tolerated, and words are rounded.
            let in_time = f64::from(next) * rate * policy.drain.as_secs_f64() * 1.11;
            assert!(
                backlog <= in_time || next == most || hold == "step",
                "too few to drain it in time: {line}"
            );
        }
        drain.observe(&policy, at, backlog, rate, line);
    }
    assert!(!drain.is_quiet, "what waits is not gone at the end");
}

/// The end of what waits when nobody writes any more.
#[derive(Default)]
struct Drain {
    is_quiet: bool,
    last: Duration,
    is_unknown: bool,
    due: Option<Duration>,
}

impl Drain {
    fn observe(
        &mut self,
        policy: &Policy,
        at: Duration,
        backlog: Option<f64>,
        rate: Option<f64>,
        line: &str,
    ) {
        let poll = at - std::mem::replace(&mut self.last, at);
        let was_unknown = std::mem::replace(&mut self.is_unknown, backlog.is_none());
        if was_unknown || self.is_unknown {
            // Nobody stores while NATS is away, which it may have been ever since the reading before.
            self.due = self.due.map(|due| due + poll);
        }
        match (backlog, rate) {
            (Some(0.0), _) => (self.is_quiet, self.due) = (false, None),
            (Some(backlog), Some(rate)) if self.is_quiet => {
                // Workers that are added begin later, and what is gone is seen later.
                let due = *self.due.get_or_insert_with(|| {
                    let most = f64::from(policy.max.min(policy.shards));
                    let fastest = Duration::from_secs_f64(backlog / (rate * most));
                    at + policy.drain.max(fastest).mul_f64(1.1) + 3 * poll
                });
                assert!(at <= due, "not drained in time: {line}");
            }
            _ => {}
        }
    }
}

#[test]
fn a_trace_that_shows_what_may_not_be_is_refused() {
    for (why, trace) in [
        (
            "changed by what is not known",
            "0 100 - 1 none\n10 - - 2 unknown",
        ),
        (
            "it flaps",
            "0 20000 - 4 none\n10 0 - 1 none\n20 20000 - 4 none",
        ),
        ("too few to drain it in time", "0 12000 100 3 none"),
        (
            "not drained in time",
            "0 100 - 1 none\n1 quiet\n10 100 100 1 none\n74 1 100 1 none",
        ),
        (
            "not drained in time",
            "0 100 - 1 none\n1 quiet\n10 100 100 1 none\n20 100 100 1 none\n30 - 100 1 unknown\n40 100 100 1 none\n94 1 100 1 none",
        ),
        (
            "not gone at the end",
            "0 100 100 1 none\n1 quiet\n10 1 100 1 none",
        ),
    ] {
        let refused = std::panic::catch_unwind(|| judge(trace)).expect_err(why);
        let words = refused.downcast_ref::<String>().cloned();
        let words = words.or_else(|| refused.downcast_ref::<&str>().map(ToString::to_string));
        assert!(words.is_some_and(|words| words.contains(why)), "{why}");
    }
    // The same, but that NATS was away for as long as it took longer.
    judge(
        "0 100 - 1 none\n1 quiet\n10 100 100 1 none\n20 100 100 1 none\n30 - 100 1 unknown\n40 100 100 1 none\n93 1 100 1 none\n94 0 100 1 none",
    );
    judge(
        "0 12000 100 5 max\n1 quiet\n10 7000 100 5 none\n20 2000 100 5 window\n30 0 100 5 window",
    );
}

macro_rules! traces {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            let trace = include_str!(concat!("traces/", stringify!($name), ".txt"));
            judge(trace);
            let replayed = replay(trace);
            assert!(trace == replayed, "it replays to\n{replayed}");
        }
    )*};
}

mod traces {
    use super::{judge, replay};

    traces!(
        burst,
        sawtooth,
        slow_growth,
        nats_outage,
        leader_change,
        hot_key,
        few_shards,
        activation_and_steps,
        recorded_backlog,
        recorded_burst,
        recorded_sawtooth,
        recorded_slow_growth,
        recorded_nats_outage,
        recorded_leader_change,
        recorded_hot_key
    );
}

#[test]
fn a_lag_is_shown_with_two_digits() {
    for (exact, shown) in [
        (0, 0),
        (7, 7),
        (99, 99),
        (104, 100),
        (105, 110),
        (12_345, 12_000),
        (99_700, 100_000),
    ] {
        assert_eq!(rounded(exact), shown, "{exact}");
    }
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (
        (1..8, 0..8, 1..9),
        (1..20_000, 1..100u64, 0..3_000),
        (0..400u64, 0..100u64),
    )
        .prop_map(
            |((min, more, shards), (target_lag, drain, activation_lag), (window, cooldown))| {
                Policy {
                    min,
                    max: min + more,
                    shards,
                    target_lag,
                    drain: Duration::from_secs(drain),
                    activation_lag,
                    window: Duration::from_secs(window),
                    cooldown: Duration::from_secs(cooldown),
                }
            },
        )
}

fn any_sight() -> impl Strategy<Value = Sight> {
    let backlog = prop_oneof![
        Just(None),
        any::<u64>().prop_map(Some),
        (0..100_000u64).prop_map(Some)
    ];
    (backlog, proptest::option::of(0.1..10_000.0))
        .prop_map(|(backlog, rate)| Sight { backlog, rate })
}

/// Sights, each some seconds after the one before.
fn any_history() -> impl Strategy<Value = Vec<(u64, Sight)>> {
    proptest::collection::vec((1..60u64, any_sight()), 0..60)
}

/// Plays `history` for one who begins with `workers`; `each` sees the number before and after each decision.
fn play(
    policy: &Policy,
    workers: i32,
    history: &[(u64, Sight)],
    mut each: impl FnMut(i32, Sight, i32, Hold),
) -> (Memory, Duration) {
    let mut now = Duration::ZERO;
    let mut memory = Memory::new(workers, now);
    for (pause, sight) in history {
        now += Duration::from_secs(*pause);
        let before = memory.workers;
        let hold;
        (memory, hold) = decide(policy, memory, *sight, now);
        each(before, *sight, memory.workers, hold);
    }
    (memory, now)
}

proptest! {
    #[test]
    fn the_number_stays_within_its_bounds(policy in any_policy(), workers in 0..20, history in any_history()) {
        let (least, most) = (policy.min.min(policy.shards), policy.max.min(policy.shards));
        play(&policy, workers, &history, |_, _, after, _| {
            assert!((least..=most).contains(&after), "{after}");
        });
    }

    #[test]
    fn a_backlog_up_to_the_activation_lag_asks_for_nobody_and_one_more_does(
        policy in any_policy(), workers in 0..20, history in any_history(), rate in proptest::option::of(0.1..10_000.0),
    ) {
        let (memory, now) = play(&policy, workers, &history, |_, _, _, _| {});
        let sight = |backlog| Sight { backlog: Some(backlog), rate };
        let activation = u64::try_from(policy.activation_lag).unwrap();
        let before = policy.clamp(memory.workers);
        let (after, hold) = decide(&policy, memory, sight(activation), now + Duration::from_secs(1));
        prop_assert!(after.workers <= before && hold != Hold::Step, "{hold:?}");
        // Where each message asks for a worker of its own, the first that counts asks for all of them.
        let policy = Policy { target_lag: 1, activation_lag: policy.activation_lag + 100, ..policy };
        let idle = || Memory::new(policy.min, Duration::ZERO);
        let with = |backlog| decide(&policy, idle(), sight(backlog), now).0.workers;
        prop_assert_eq!(with(activation + 100), policy.clamp(0));
        prop_assert!(with(activation + 101) > policy.min || policy.max.min(policy.shards) <= policy.min);
    }

    #[test]
    fn a_reading_at_most_doubles_the_number_or_adds_four(
        policy in any_policy(), most in 1..200, workers in 0..20, history in any_history(),
    ) {
        let policy = Policy { max: policy.min + most, shards: 200, ..policy };
        play(&policy, workers, &history, |before, _, after, hold| {
            let before = policy.clamp(before);
            let step = before + before.max(4);
            assert!(after <= step, "from {before} to {after}");
            assert!(hold != Hold::Step || after == step, "from {before} to {after}, held by {hold:?}");
        });
    }

    #[test]
    fn more_backlog_never_means_fewer_workers(
        policy in any_policy(), history in any_history(), pause in 1..400u64,
        low in any::<u64>(), high in any::<u64>(), rate in proptest::option::of(0.1..10_000.0),
    ) {
        let (memory, now) = play(&policy, 1, &history, |_, _, _, _| {});
        let with = |backlog| {
            let sight = Sight { backlog: Some(backlog), rate };
            decide(&policy, memory.clone(), sight, now + Duration::from_secs(pause)).0.workers
        };
        prop_assert!(with(low.min(high)) <= with(low.max(high)));
    }

    #[test]
    fn unknown_neither_lowers_nor_raises(policy in any_policy(), workers in 0..20, history in any_history()) {
        play(&policy, workers, &history, |before, sight, after, hold| {
            if sight.backlog.is_none() {
                assert_eq!((after, hold), (policy.clamp(before), Hold::Unknown));
            }
        });
    }

    #[test]
    fn nothing_goes_down_within_a_window_of_not_knowing(policy in any_policy(), history in any_history()) {
        let (memory, now) = play(&policy, 1, &history, |_, _, _, _| {});
        let unknown = Sight { backlog: None, rate: None };
        let (memory, _) = decide(&policy, memory, unknown, now);
        let before = memory.workers;
        let soon = now + policy.window.saturating_sub(Duration::from_nanos(1));
        let empty = Sight { backlog: Some(0), rate: None };
        let (memory, _) = decide(&policy, memory, empty, soon);
        prop_assert!(policy.window.is_zero() || memory.workers == before);
    }

    #[test]
    fn a_sawtooth_does_not_flap(
        low in 0..30_000u64, high in 0..30_000u64, teeth in 2..20usize, readings in 1..14u64,
    ) {
        // A tooth is at most 2 * 14 readings of 10 s, which is less than the window.
        let policy = policy();
        let sight = |backlog| (10, Sight { backlog: Some(backlog), rate: None });
        let tooth = (0..readings).map(|_| sight(high)).chain((0..readings).map(|_| sight(low)));
        let history: Vec<_> = tooth.collect::<Vec<_>>().repeat(teeth);
        let mut lowered = 0;
        play(&policy, 1, &history, |before, _, after, _| lowered += i32::from(after < before));
        prop_assert_eq!(lowered, 0);
    }

    #[test]
    fn a_burst_is_drained_in_time(burst in 0..1_000_000u64, rate in 100..20_000u64, started in 0..3u64) {
        // Workers that are added begin `started` readings later.
        let policy = Policy { max: 64, shards: 64, ..policy() };
        let (mut backlog, mut now, poll) = (burst, Duration::ZERO, 10);
        let mut memory = Memory::new(1, now);
        let mut ordered = vec![1; usize::try_from(started).unwrap() + 1];
        while backlog > 0 {
            let sight = Sight { backlog: Some(backlog), rate: Some(rate as f64) };
            (memory, _) = decide(&policy, memory, sight, now);
            ordered.push(memory.workers);
            let at_work = ordered[ordered.len() - 1 - usize::try_from(started).unwrap()];
            backlog = backlog.saturating_sub(rate * poll * u64::try_from(at_work).unwrap());
            now += Duration::from_secs(poll);
        }
        let enough = burst.div_ceil(rate * 30) <= 58;
        // Four readings for the steps to 64, a tenth for the tolerance.
        let limit = Duration::from_secs(33 + poll * (4 + started));
        prop_assert!(!enough || now <= limit, "{now:?}");
    }
}
