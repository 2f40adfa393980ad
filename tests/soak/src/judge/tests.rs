mod kinds;
mod reasons;
mod rows;

use super::*;
use crate::calm::{GRACE, Late, Span, nanoseconds};

fn operation(kind: Kind, call: u64, end: u64, version: u64) -> Operation {
    Operation {
        client: 0,
        api: 0,
        key: "k".to_owned(),
        kind,
        value: version as i64,
        ttl: 0,
        expected: 0,
        call,
        end,
        outcome: if version == 0 {
            Outcome::Absent
        } else {
            Outcome::Ok
        },
        version,
        found: version as i64,
        label: None,
        is_batched: false,
    }
}

fn wrong(from: u64, to: u64) -> Trouble {
    Trouble {
        fault: Some(Span { from, to }),
        ..Trouble::default()
    }
}

fn always_wrong() -> Trouble {
    wrong(0, 100)
}

fn check(operations: &[Operation]) -> Result<()> {
    let operations: Vec<&Operation> = operations.iter().collect();
    one_value_per_version("k", &operations)?;
    let (trouble, counts) = (always_wrong(), &mut Counts::default());
    read_your_writes("k", &operations, None, &trouble, counts)?;
    nothing_deleted_is_back("k", &operations, None, &trouble, counts)
}

#[test]
fn a_read_that_is_behind_is_found() {
    let (old, new) = (operation(Kind::Set, 0, 1, 5), operation(Kind::Set, 2, 3, 6));
    let read = |call, version| operation(Kind::Plain, call, call + 1, version);
    assert!(check(&[old.clone(), new.clone(), read(4, 6)]).is_ok());
    assert!(check(&[old.clone(), new.clone(), read(2, 5)]).is_ok());
    assert!(check(&[old.clone(), new.clone(), read(4, 5)]).is_err());
    assert!(check(&[old.clone(), new.clone(), read(4, 0)]).is_err());
    let mut delete = operation(Kind::Delete, 3, 4, 0);
    delete.outcome = Outcome::Ok;
    assert!(check(&[old.clone(), new.clone(), delete.clone(), read(5, 0)]).is_ok());
    (delete.call, delete.end) = (0, 1);
    assert!(check(&[old.clone(), new.clone(), delete, read(5, 0)]).is_err());
    let mut other = read(4, 6);
    other.found = 7;
    assert!(check(&[new, other]).is_err());
    let mut labelled = read(4, 5);
    labelled.label = Some(Label::Unconfirmed);
    assert!(check(&[old, operation(Kind::Set, 2, 3, 6), labelled]).is_ok());
}

#[test]
fn what_was_deleted_and_is_read_again_is_found() {
    let write = operation(Kind::Set, 0, 1, 5);
    let mut delete = operation(Kind::Delete, 2, 3, 0);
    delete.outcome = Outcome::Ok;
    let read = |call| operation(Kind::Plain, call, call + 1, 5);
    assert!(check(&[write.clone(), delete.clone(), read(2)]).is_ok());
    assert!(check(&[write.clone(), delete.clone(), read(4)]).is_err());
    // It may have been deleted before it was written.
    delete.call = 0;
    assert!(check(&[write.clone(), delete.clone(), read(4)]).is_ok());
    // Somebody saw it before the delete, though nobody was told that it is written.
    let mut lost = write;
    lost.outcome = Outcome::Unknown;
    lost.version = 0;
    delete.call = 3;
    delete.end = 4;
    assert!(check(&[lost, read(1), delete, read(5)]).is_err());
}

#[test]
fn only_what_was_kept_must_be_there() {
    let writes = [operation(Kind::Set, 0, 1, 5), operation(Kind::Set, 2, 3, 6)];
    let read = operation(Kind::Read, 8, 9, 5);
    let operations = [&writes[0], &writes[1], &read];
    let judged = |from, to| {
        let lost = Some(Lost { from, to });
        read_your_writes(
            "k",
            &operations,
            lost,
            &always_wrong(),
            &mut Counts::default(),
        )
    };
    assert!(judged(2, 4).is_ok());
    assert!(judged(4, 5).is_err(), "acknowledged before the copy");
    assert!(judged(1, 2).is_err(), "acknowledged by the next life");
}

#[test]
fn a_label_excuses_nothing_but_its_own_write() {
    let writes = [4, 5, 6].map(|version| operation(Kind::Set, version, version + 1, version));
    let mut labelled = writes.clone();
    labelled[2].label = Some(Label::Pending);
    let read = operation(Kind::Plain, 8, 9, 5);
    assert!(check(&[&labelled[..], &[read]].concat()).is_ok());
    let read = operation(Kind::Plain, 8, 9, 4);
    assert!(check(&[&labelled[..], &[read]].concat()).is_err());
}

#[test]
fn what_may_be_lost_is_open() {
    let operations = [
        operation(Kind::Set, 0, 1, 5),
        operation(Kind::Set, 2, 8, 6),
        // Nobody is told of this one afterwards.
        operation(Kind::Set, 3, 8, 7),
        operation(Kind::Read, 3, 8, 6),
        operation(Kind::Read, 6, 7, 6),
    ];
    let certain = certain(Some(Lost { from: 5, to: 6 }), &operations);
    let kinds: Vec<_> = certain
        .iter()
        .map(|it| (it.kind, it.outcome, it.version))
        .collect();
    let (ok, open) = (Outcome::Ok, Outcome::Unknown);
    assert_eq!(
        kinds,
        [
            (Kind::Set, ok, 5),
            (Kind::Set, open, 6),
            (Kind::Read, ok, 6)
        ]
    );
}

#[test]
fn what_may_be_lost_is_kept_if_something_that_was_not_stands_on_it() {
    let mut swap = operation(Kind::Swap, 5, 8, 6);
    swap.expected = 5;
    let operations = [
        operation(Kind::Set, 5, 8, 4),
        operation(Kind::Set, 5, 8, 5),
        swap,
        operation(Kind::Read, 9, 10, 6),
    ];
    let certain = certain(Some(Lost { from: 5, to: 9 }), &operations);
    let versions: Vec<u64> = certain.iter().map(|it| it.version).collect();
    assert_eq!(versions, [5, 6, 6]);
}

#[test]
fn a_read_past_redis_is_as_good_as_a_write() {
    let old = operation(Kind::Set, 0, 1, 5);
    let mut perhaps = operation(Kind::Set, 2, 3, 0);
    perhaps.outcome = Outcome::Unknown;
    let past_redis = operation(Kind::Read, 4, 5, 6);
    let read = operation(Kind::Plain, 6, 7, 5);
    assert!(check(&[old.clone(), perhaps.clone(), read.clone()]).is_ok());
    let operations = [old, perhaps, past_redis, read];
    assert!(check(&operations).is_err());
    let mut pending = operations;
    pending[2].label = Some(Label::Pending);
    assert!(check(&pending).is_ok());
}

/// In seconds.
fn at(kind: Kind, call: f64, end: f64, version: u64) -> Operation {
    let [call, end] = [call, end].map(|it| nanoseconds(Duration::from_secs_f64(it)));
    operation(kind, call, end, version)
}

fn wrong_from_ten_to_twelve() -> Trouble {
    let [from, to] = [10, 12].map(|it| nanoseconds(Duration::from_secs(it)));
    wrong(from, to)
}

#[test]
fn nobody_is_behind_for_longer_than_anything_was_wrong() {
    assert_eq!(GRACE, Duration::from_secs(1));
    let judged_amid = |trouble: &Trouble, written: f64, read: f64| {
        let mut write = at(Kind::Set, written - 0.1, written, 6);
        write.label = Some(Label::Pending);
        let read = at(Kind::Plain, read, read + 0.1, 5);
        let old = at(Kind::Set, 1.0, 2.0, 5);
        let operations = [&old, &write, &read];
        read_your_writes("k", &operations, None, trouble, &mut Counts::default())
    };
    let judged = |written, read| judged_amid(&wrong_from_ten_to_twelve(), written, read);
    assert!(judged(10.5, 11.0).is_ok());
    assert!(judged(10.5, 13.9).is_ok());
    assert!(judged(10.5, 14.1).is_err(), "it was to be repaired by then");
    assert!(judged(9.5, 11.0).is_ok(), "not stored when it began");
    assert!(judged(5.0, 11.0).is_err(), "long before it began");
    assert!(judged(3.0, 4.0).is_err(), "nothing was wrong");
    // Whoever was late explains the label, and what is read because of it.
    let span = wrong_from_ten_to_twelve().fault;
    let late = span.map(|span| Late { api: 0, span });
    let trouble = Trouble {
        late: late.into_iter().collect(),
        ..Trouble::default()
    };
    assert!(judged_amid(&trouble, 10.5, 11.0).is_ok());
    assert!(judged_amid(&trouble, 3.0, 4.0).is_err());
}

#[test]
fn what_expires_is_there_before_and_gone_after() {
    let judged = |read: f64, version| {
        let mut write = at(Kind::Set, 10.0, 11.0, 6);
        write.ttl = 2;
        let operations = [
            at(Kind::Set, 1.0, 2.0, 5),
            write,
            at(Kind::Plain, read, read + 0.1, version),
        ];
        let operations: Vec<&Operation> = operations.iter().collect();
        let (trouble, counts) = (always_wrong(), &mut Counts::default());
        read_your_writes("k", &operations, None, &trouble, counts)
            .and_then(|()| nothing_expired_is_back("k", &operations))
            .is_ok()
    };
    assert!(!judged(11.1, 0), "too early");
    assert!(judged(11.1, 6));
    for read in [11.5, 13.4] {
        assert!(judged(read, 0) && judged(read, 6), "{read}: perhaps");
    }
    assert!(judged(13.6, 0));
    assert!(!judged(13.6, 6), "too late");
    assert!(!judged(13.6, 5), "what was there before");
}

#[test]
fn what_expires_takes_with_it_what_it_replaced() {
    let mut brief = at(Kind::Set, 10.0, 10.1, 6);
    brief.ttl = 1;
    let judged = |written: f64| {
        let mut write = at(Kind::Set, written, written + 0.1, 5);
        write.ttl = 9;
        let absent = at(Kind::Plain, 12.0, 12.1, 0);
        let operations = [&write, &brief, &absent];
        let (trouble, counts) = (always_wrong(), &mut Counts::default());
        read_your_writes("k", &operations, None, &trouble, counts).is_ok()
    };
    assert!(judged(9.0) && judged(10.05));
    assert!(!judged(10.2), "it came later");
}

#[test]
fn what_is_read_around_the_end_of_a_value_proves_nothing() {
    let mut write = at(Kind::Set, 10.0, 11.0, 6);
    write.ttl = 2;
    let ends: Vec<Operation> = write.expiry().into_iter().collect();
    // From half a second before it can be over until half a second after it must be.
    for (call, proves) in [(11.3, true), (11.6, false), (13.4, false), (13.6, true)] {
        let mut read = at(Kind::Read, call, call + 0.1, 6);
        assert_eq!(is_proof(&read, &ends), proves, "{call}");
        read.outcome = Outcome::Absent;
        assert_eq!(is_proof(&read, &ends), proves, "{call}");
        let set = at(Kind::Set, call, call + 0.1, 7);
        assert!(is_proof(&set, &ends));
    }
    let mut other = at(Kind::Read, 12.0, 12.1, 6);
    other.key = "other".to_owned();
    assert!(is_proof(&other, &ends));
}

#[test]
fn what_nobody_wrote_is_found() {
    let judged = |operations: &[Operation]| {
        let operations: Vec<&Operation> = operations.iter().collect();
        nothing_is_read_that_nobody_wrote("k", &operations)
    };
    let (write, read) = (
        operation(Kind::Set, 0, 1, 5),
        operation(Kind::Plain, 2, 3, 5),
    );
    assert!(judged(&[write.clone(), read.clone()]).is_ok());
    assert!(judged(&[operation(Kind::Plain, 2, 3, 0)]).is_ok());
    assert!(
        judged(std::slice::from_ref(&read)).is_err(),
        "certainly not written"
    );
    let changed = |change: fn(&mut Operation)| {
        let mut write = write.clone();
        change(&mut write);
        judged(&[write, read.clone()]).is_ok()
    };
    assert!(!changed(|it| it.version = 4), "under another version");
    assert!(!changed(|it| it.value = 4), "another value");
    assert!(!changed(|it| it.outcome = Outcome::Mismatch));
    assert!(!changed(|it| (it.call, it.end) = (4, 5)), "not yet");
    assert!(changed(
        |it| (it.outcome, it.version) = (Outcome::Unknown, 0)
    ));
}

#[test]
fn a_delete_of_unknown_outcome_excuses_what_it_can_have_deleted() {
    let mut delete = at(Kind::Delete, 10.5, 11.0, 0);
    delete.outcome = Outcome::Unknown;
    let judged = |operations: &[Operation]| {
        let mut all: Vec<&Operation> = operations.iter().collect();
        all.push(&delete);
        let trouble = wrong_from_ten_to_twelve();
        read_your_writes("k", &all, None, &trouble, &mut Counts::default()).is_ok()
    };
    let write = |call: f64, version| at(Kind::Set, call, call + 0.1, version);
    let absent = |call: f64| at(Kind::Plain, call, call + 0.1, 0);
    assert!(judged(&[write(9.0, 5), absent(20.0)]));
    assert!(judged(&[write(12.9, 5), absent(20.0)]), "it came late");
    assert!(!judged(&[write(13.1, 5), absent(20.0)]), "too late");
    assert!(!judged(&[write(9.0, 5), absent(10.0)]), "not yet");
    assert!(judged(&[write(9.0, 5), absent(11.5), absent(20.0)]));
    // It happens once.
    let twice = [write(9.0, 5), absent(11.5), write(11.7, 6), absent(20.0)];
    assert!(!judged(&twice));
    let mut other = delete.clone();
    other.call += 1;
    assert!(judged(&[&twice[..], &[other]].concat()), "they were two");
    let mut unsure = twice;
    unsure[1].label = Some(Label::Unconfirmed);
    assert!(judged(&unsure), "the first answer proves nothing");
}

#[test]
fn a_write_of_unknown_outcome_that_expires_excuses_what_it_can_have_replaced() {
    let mut brief = at(Kind::Set, 10.5, 11.0, 0);
    (brief.outcome, brief.ttl, brief.value) = (Outcome::Unknown, 1, 7);
    let judged = |written: f64| {
        let (write, absent) = (
            at(Kind::Set, written, written + 0.1, 5),
            at(Kind::Plain, 20.0, 20.1, 0),
        );
        let operations = [&brief, &write, &absent];
        let trouble = wrong_from_ten_to_twelve();
        read_your_writes("k", &operations, None, &trouble, &mut Counts::default()).is_ok()
    };
    assert!(judged(9.0) && judged(12.9));
    assert!(!judged(13.1));
}

#[test]
fn redis_may_know_until_the_next_life_what_the_log_has_lost() {
    let judged = |seen: f64, absent: f64, from: f64| {
        let mut delete = at(Kind::Delete, 10.2, 10.3, 0);
        delete.outcome = Outcome::Ok;
        let operations = [
            at(Kind::Set, 9.0, 9.1, 5),
            delete,
            at(Kind::Read, seen, seen + 0.1, 5),
            at(Kind::Plain, absent, absent + 0.1, 0),
        ];
        let operations: Vec<&Operation> = operations.iter().collect();
        let [from, to] = [from, 11.0].map(|it| nanoseconds(Duration::from_secs_f64(it)));
        let (lost, trouble) = (Some(Lost { from, to }), wrong_from_ten_to_twelve());
        read_your_writes("k", &operations, lost, &trouble, &mut Counts::default()).is_ok()
    };
    assert!(judged(11.5, 11.8, 10.0));
    assert!(!judged(11.5, 11.8, 10.5), "the copy has it");
    assert!(!judged(13.1, 13.3, 10.0), "the next life is known");
}
