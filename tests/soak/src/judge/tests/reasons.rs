use super::*;
use crate::{
    faults::{Fault, Side},
    history::Failure,
    judge::reasons::{failures_without_reason, labels_without_reason},
};

fn attack(fault: Fault, side: Side) -> Attack {
    let mut attack = Attack::draw(fault, Duration::from_secs(1), &mut rand::rng());
    (attack.side, attack.empties) = (side, false);
    attack
}

fn amid(attack: Attack, trouble: Trouble) -> Circumstances {
    let on = trouble.fault.unwrap_or(Span { from: 0, to: 0 });
    Circumstances {
        attack,
        trouble,
        lost: None,
        on,
    }
}

#[test]
fn a_label_has_a_reason() {
    let judged = |fault, trouble, call: f64, label| {
        let mut operation = at(Kind::Set, call, call + 0.1, 6);
        operation.label = Some(label);
        let circumstances = amid(attack(fault, Side::Both), trouble);
        labels_without_reason(&[operation], &circumstances)
    };
    let (pending, wrong) = (Label::Pending, wrong_from_ten_to_twelve);
    assert!(judged(Fault::KillRedis, wrong(), 10.0, pending).is_empty());
    assert!(judged(Fault::KillRedis, wrong(), 12.9, pending).is_empty());
    assert!(judged(Fault::KillRedis, wrong(), 13.1, pending).len() == 1);
    assert!(judged(Fault::KillRedis, wrong(), 9.0, pending).len() == 1);
    assert!(judged(Fault::KillWorker, wrong(), 10.0, pending).len() == 1);
    assert!(judged(Fault::KillRedis, wrong(), 10.0, Label::Unconfirmed).len() == 1);
    assert!(judged(Fault::KillNats, wrong(), 10.0, Label::Unconfirmed).is_empty());
    assert!(judged(Fault::None, Trouble::default(), 10.0, pending).len() == 1);
    let stalled = Trouble {
        stalls: wrong().fault.into_iter().collect(),
        ..Trouble::default()
    };
    assert!(judged(Fault::None, stalled.clone(), 10.0, pending).is_empty());
    assert!(judged(Fault::None, stalled, 13.1, pending).len() == 1);
}

#[test]
fn what_fails_while_nothing_is_wrong_is_found() {
    let judged = |call: f64, end: f64| {
        let history = History::default();
        let mut unknown = at(Kind::Set, call, end, 0);
        unknown.outcome = Outcome::Unknown;
        history.add(unknown.clone());
        let wrong = amid(
            attack(Fault::KillNats, Side::Both),
            wrong_from_ten_to_twelve(),
        );
        let result = failures_without_reason(&history, &wrong, &mut Counts::default());
        let history = History::default();
        history.fail(Failure {
            client: 0,
            api: 0,
            key: "k".to_owned(),
            kind: Kind::Plain,
            call: unknown.call,
            end: unknown.end,
            why: "503".to_owned(),
        });
        let failed = failures_without_reason(&history, &wrong, &mut Counts::default());
        assert_eq!(result.is_empty(), failed.is_empty());
        result.is_empty()
    };
    assert!(judged(9.0, 10.1));
    assert!(judged(12.9, 18.0));
    assert!(!judged(8.0, 9.0));
    assert!(!judged(13.1, 13.2));
}

fn failure(api: usize, kind: Kind, call: f64) -> Failure {
    let [call, end] = [call, call + 0.1].map(|it| nanoseconds(Duration::from_secs_f64(it)));
    Failure {
        client: 0,
        api,
        key: "k".to_owned(),
        kind,
        call,
        end,
        why: "503".to_owned(),
    }
}

#[test]
fn a_failure_has_a_reason() {
    let is_odd = |fault, side, api, kind| {
        let circumstances = amid(attack(fault, side), wrong_from_ten_to_twelve());
        let (failed, unknown) = (History::default(), History::default());
        failed.fail(failure(api, kind, 11.0));
        let mut operation = at(kind, 11.0, 11.1, 0);
        (operation.outcome, operation.api) = (Outcome::Unknown, api);
        unknown.add(operation);
        let [failed, unknown] = [failed, unknown].map(|history| {
            failures_without_reason(&history, &circumstances, &mut Counts::default()).len()
        });
        assert_eq!(failed, unknown);
        failed == 1
    };
    // Without Redis, and without workers, everything goes on.
    for fault in [Fault::KillRedis, Fault::PauseRedis, Fault::KillWorker] {
        for kind in [Kind::Set, Kind::Swap, Kind::Read, Kind::Plain] {
            assert!(is_odd(fault, Side::Both, 0, kind));
        }
    }
    // One API is of no concern to the other.
    assert!(!is_odd(Fault::KillApi, Side::First, 0, Kind::Set));
    assert!(is_odd(Fault::KillApi, Side::First, 1, Kind::Set));
    assert!(is_odd(Fault::CutNats, Side::Second, 0, Kind::Read));
    assert!(!is_odd(Fault::CutNats, Side::Both, 0, Kind::Read));
    // Without PostgreSQL, what has no condition goes on.
    for kind in [Kind::Set, Kind::Delete] {
        assert!(is_odd(Fault::KillPostgres, Side::First, 0, kind));
        assert!(is_odd(Fault::CutPostgres, Side::First, 0, kind));
        assert!(!is_odd(Fault::FullLog, Side::First, 0, kind));
    }
    assert!(!is_odd(Fault::KillPostgres, Side::First, 1, Kind::Swap));
    assert!(!is_odd(Fault::CutPostgres, Side::First, 0, Kind::Read));
    assert!(is_odd(Fault::CutPostgres, Side::First, 1, Kind::Read));
    // The machine stood still.
    let mut stalled = wrong_from_ten_to_twelve();
    stalled.stalls.extend(stalled.fault);
    let history = History::default();
    history.fail(failure(0, Kind::Set, 11.0));
    let circumstances = amid(attack(Fault::KillRedis, Side::Both), stalled);
    assert!(failures_without_reason(&history, &circumstances, &mut Counts::default()).is_empty());
}

/// A quick answer at API 0, a few seconds after everything was right again.
fn odd(call: f64) -> Operation {
    let mut write = at(Kind::Set, call, call + 0.01, 6);
    write.label = Some(Label::Pending);
    write
}

fn late(api: usize, from: f64, to: f64) -> Late {
    let [from, to] = [from, to].map(|it| nanoseconds(Duration::from_secs_f64(it)));
    let span = Span { from, to };
    Late { api, span }
}

fn judged(operations: &[Operation], failures: &[Failure], late: &[Late]) -> Option<Counts> {
    let history = History::default();
    operations.iter().cloned().for_each(|it| history.add(it));
    failures.iter().cloned().for_each(|it| history.fail(it));
    let trouble = Trouble {
        late: late.to_vec(),
        ..wrong_from_ten_to_twelve()
    };
    let circumstances = amid(attack(Fault::KillWorker, Side::Both), trouble);
    let mut counts = Counts::default();
    let judged = exceptions_have_reasons(&history, &circumstances, &mut counts);
    judged.is_ok().then_some(counts)
}

#[test]
fn what_no_fault_explains_needs_somebody_who_was_late() {
    for call in [11.0, 20.0] {
        let is_right = |late: &[Late]| judged(&[odd(call)], &[], late).is_some();
        assert!(!is_right(&[]), "not a single one without a reason");
        assert!(is_right(&[late(0, call - 0.5, call - 0.4)]));
        assert!(is_right(&[late(0, call, call + 0.1)]));
        assert!(!is_right(&[late(1, call, call + 0.1)]), "another API");
        assert!(!is_right(&[late(0, call - 2.0, call - 1.1)]), "long ago");
        assert!(!is_right(&[late(0, call + 0.1, call + 0.2)]), "later");
    }
    assert!(judged(&[], &[failure(0, Kind::Set, 20.0)], &[]).is_some());
    let mut quick = failure(0, Kind::Set, 20.0);
    quick.end = quick.call + 1;
    assert!(judged(&[], &[quick.clone()], &[]).is_none());
    let redis = late(0, 19.5, 19.6);
    let counts = judged(&[], &[quick.clone()], &[redis]);
    assert_eq!(counts.map(|it| it.n_late), Some(1));
    // A request that takes long says so, too, but not what a fault may have held up.
    let slow = |call: f64| at(Kind::Plain, call, call + 0.07, 5);
    assert!(judged(&[slow(19.5), odd(20.0)], &[], &[]).is_some());
    assert!(judged(&[slow(10.5), odd(11.0)], &[], &[]).is_none());
    // Of those, too, there are few.
    let many = |n: usize| vec![odd(20.0); n];
    assert!(judged(&many(3), &[], &[redis]).is_some());
    assert!(judged(&many(4), &[], &[redis]).is_none());
    // Unless somebody was as late as the deadline, and just then.
    let counts = judged(&many(9), &[], &[late(0, 19.9, 20.03)]);
    assert_eq!(counts.map(|it| it.n_late), Some(9));
    assert!(judged(&many(4), &[], &[late(0, 19.8, 19.95)]).is_none());
    assert!(judged(&many(4), &[], &[late(0, 19.9, 20.02)]).is_none());
}

#[test]
fn what_earlier_rounds_left_is_read_with_labels_for_a_reason() {
    let history = History::default();
    let mut look = odd(20.0);
    (look.kind, look.label) = (Kind::Plain, Some(Label::Unconfirmed));
    history.look(look);
    let circumstances = amid(attack(Fault::KillNats, Side::Both), Trouble::default());
    let mut counts = Counts::default();
    assert!(exceptions_have_reasons(&history, &circumstances, &mut counts).is_err());
    let mut allowed = circumstances;
    allowed.trouble = wrong(0, u64::MAX);
    assert!(exceptions_have_reasons(&history, &allowed, &mut counts).is_ok());
    assert_eq!((counts.n_looks, counts.n_labelled.len()), (1, 1));
}

#[test]
fn who_is_overtaken_all_the_time_may_give_up() {
    let writes =
        |n: u64| -> Vec<Operation> { (0..n).map(|n| at(Kind::Set, 20.0, 20.01, n + 1)).collect() };
    let failed = |kind| {
        let mut failed = failure(0, kind, 20.0);
        failed.end = failed.call + nanoseconds(Duration::from_millis(50));
        [failed]
    };
    let counts = judged(&writes(12), &failed(Kind::Swap), &[]);
    assert_eq!(counts.map(|it| (it.n_overtaken, it.n_late)), Some((1, 0)));
    assert!(judged(&writes(11), &failed(Kind::Swap), &[]).is_none());
    assert!(judged(&writes(12), &failed(Kind::Set), &[]).is_none());
}

#[test]
fn a_fault_that_nobody_noticed_is_found() {
    let [from, to] = [10, 12].map(|it| nanoseconds(Duration::from_secs(it)));
    let noticed = |attack: &Attack, operations: &[Operation], failures: &[Failure]| {
        let history = History::default();
        operations.iter().cloned().for_each(|it| history.add(it));
        failures.iter().cloned().for_each(|it| history.fail(it));
        was_noticed(attack, Span { from, to }, &history).is_ok()
    };
    let nats = attack(Fault::PauseNats, Side::Both);
    let quick = at(Kind::Set, 10.5, 10.6, 5);
    assert!(!noticed(&nats, &[], &[]));
    assert!(!noticed(&nats, std::slice::from_ref(&quick), &[]));
    assert!(noticed(&nats, &[at(Kind::Set, 10.5, 11.6, 5)], &[]));
    assert!(
        !noticed(&nats, &[at(Kind::Set, 11.5, 12.6, 5)], &[]),
        "later"
    );
    assert!(noticed(&nats, &[], &[failure(0, Kind::Set, 11.0)]));
    assert!(!noticed(&nats, &[], &[failure(0, Kind::Set, 13.0)]));
    let mut unknown = quick.clone();
    unknown.outcome = Outcome::Unknown;
    assert!(noticed(&nats, &[unknown], &[]));
    let redis = attack(Fault::CutRedis, Side::Second);
    let mut pending = quick.clone();
    pending.label = Some(Label::Pending);
    assert!(!noticed(&redis, std::slice::from_ref(&pending), &[]));
    pending.api = 1;
    assert!(noticed(&redis, &[pending], &[]));
    let mut links = attack(Fault::SlowLinks, Side::Both);
    links.delay = Duration::from_millis(40);
    assert!(noticed(&links, std::slice::from_ref(&quick), &[]));
    links.delay = Duration::from_millis(60);
    assert!(!noticed(&links, std::slice::from_ref(&quick), &[]));
    assert!(noticed(&attack(Fault::KillWorker, Side::Both), &[], &[]));
}

#[test]
fn a_round_in_which_little_was_done_is_found() {
    let round = |n: u64, n_writes: u64, n_deletes: u64, apis: usize| {
        let operation = |n| {
            let kind = match n {
                n if n < n_writes => Kind::Set,
                n if n < n_writes + n_deletes => Kind::Delete,
                _ => Kind::Plain,
            };
            operation(kind, n, n + 1, n + 1)
        };
        let one: Vec<Operation> = (0..n).map(operation).collect();
        let mut all = Vec::new();
        for api in 0..apis {
            all.extend(one.iter().cloned().map(|it| Operation { api, ..it }));
        }
        is_enough(&all).is_ok()
    };
    assert!(round(60, 20, 5, 2));
    assert!(!round(60, 20, 5, 1), "one API did nothing");
    assert!(!round(40, 20, 5, 2) && !round(60, 5, 5, 2) && !round(60, 20, 0, 2));
}
