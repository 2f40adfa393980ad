//! Deletes of a version, and touches.

use super::*;

fn remove(call: u64, end: u64, expected: u64) -> Operation {
    let mut remove = operation(Kind::Remove, call, end, 0);
    (remove.outcome, remove.expected) = (Outcome::Ok, expected);
    remove
}

fn touch(call: u64, end: u64, value: i64, version: u64) -> Operation {
    let mut touch = operation(Kind::Touch, call, end, version);
    (touch.value, touch.found) = (99, value);
    touch
}

fn read(call: u64, value: i64, version: u64) -> Operation {
    let mut read = operation(Kind::Plain, call, call + 1, version);
    read.found = value;
    read
}

#[test]
fn a_delete_of_a_version_takes_nothing_newer_away() {
    let write = |call, version| operation(Kind::Set, call, call + 1, version);
    let absent = read(8, 0, 0);
    assert!(check(&[write(0, 5), remove(2, 3, 5), absent.clone()]).is_ok());
    assert!(check(&[write(0, 5), remove(2, 3, 5), read(4, 5, 5)]).is_err());
    assert!(check(&[write(0, 5), write(2, 6), remove(3, 4, 6), absent.clone()]).is_ok());
    // They race, so that by their times alone either may have come first.
    let writes = [write(0, 5), write(2, 6)];
    let late = |expected| [&writes[..], &[remove(1, 5, expected), absent.clone()]].concat();
    assert!(check(&late(6)).is_ok());
    assert!(check(&late(5)).is_err(), "it was another version");
    let mut kept = remove(2, 3, 4);
    (kept.outcome, kept.version) = (Outcome::Mismatch, 5);
    assert!(check(&[write(0, 5), kept.clone(), read(4, 5, 5)]).is_ok());
    assert!(check(&[write(0, 5), kept, absent]).is_err());
}

#[test]
fn a_touch_is_a_write_of_the_same_value() {
    let write = operation(Kind::Set, 0, 1, 5);
    let touched = touch(2, 3, 5, 6);
    let judged = |operations: &[Operation]| {
        let all: Vec<&Operation> = operations.iter().collect();
        check(operations).and_then(|()| nothing_is_read_that_nobody_wrote("k", &all))
    };
    let after = |read| [write.clone(), touched.clone(), read];
    assert!(judged(&after(read(4, 5, 6))).is_ok());
    assert!(judged(&after(read(4, 5, 5))).is_err(), "it is behind");
    assert!(judged(&after(read(4, 0, 0))).is_err(), "it is lost");
    assert!(judged(&after(read(4, 7, 6))).is_err(), "another value");
    assert!(judged(&after(read(4, 5, 7))).is_err(), "another version");
    let mut perhaps = touch(2, 3, 0, 0);
    perhaps.outcome = Outcome::Unknown;
    for version in [5, 6] {
        let seen = [write.clone(), perhaps.clone(), read(4, 5, version)];
        assert!(judged(&seen).is_ok());
        assert!(judged(&seen[1..]).is_err(), "nobody wrote it");
    }
    // A touch makes nothing older.
    let older = nothing_is_read_that_nobody_wrote("k", &[&write, &perhaps, &read(4, 5, 4)]);
    assert!(older.is_err());
}

#[test]
fn what_a_touch_or_a_delete_needed_is_kept() {
    let window = Some(Lost { from: 2, to: 20 });
    let kept = |operations: &[Operation]| -> Vec<(Kind, u64)> {
        let certain = certain(window, operations);
        certain.iter().map(|it| (it.kind, it.version)).collect()
    };
    let write = |version| operation(Kind::Set, 3, 4, version);
    // Nothing tells of either of them.
    assert!(kept(&[write(5), write(6)]).is_empty());
    let deleted = [write(5), write(6), remove(5, 6, 6)];
    assert_eq!(kept(&deleted), [(Kind::Set, 6), (Kind::Remove, 0)]);
    let seen = read(21, 5, 7);
    let touched = [write(5), write(6), touch(5, 6, 5, 7), seen.clone()];
    let all = [(Kind::Set, 5), (Kind::Touch, 7), (Kind::Plain, 7)];
    assert_eq!(kept(&touched), all);
    // Nobody was told of the touch.
    let open = [write(5), write(6), seen];
    assert_eq!(kept(&open), [(Kind::Set, 5), (Kind::Plain, 7)]);
}
