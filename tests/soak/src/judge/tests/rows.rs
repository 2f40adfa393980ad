use super::*;
use crate::stores::{Row, Rows};

#[test]
fn what_is_stored_is_what_was_seen() {
    let row = |version: u64| Row {
        version,
        is_deleted: false,
        left: None,
        value: Some((version as i64).into()),
    };
    let judged = |operations: &[Operation], lost, row: Option<Row>| {
        let rows: Rows = row.map(|row| ("k".to_owned(), row)).into_iter().collect();
        let trouble = always_wrong();
        rows_are_what_was_acknowledged(operations, lost, &trouble, (&rows, 9)).is_ok()
            && rows_are_what_was_seen(operations, &rows).is_ok()
    };
    let deleted = |version| Row {
        is_deleted: true,
        ..row(version)
    };
    let write = operation(Kind::Set, 0, 1, 5);
    let seen = |version| operation(Kind::Read, 7, 8, version);
    for operations in [vec![write.clone()], vec![write.clone(), seen(5)]] {
        assert!(judged(&operations, None, Some(row(5))));
        let other = Row {
            value: Some(6.into()),
            ..row(5)
        };
        for wrong in [
            None,
            Some(row(4)),
            Some(row(6)),
            Some(deleted(6)),
            Some(other),
        ] {
            assert!(!judged(&operations, None, wrong.clone()), "{wrong:?}");
        }
    }
    let mut pending = write.clone();
    pending.label = Some(Label::Pending);
    assert!(!judged(&[pending], None, None), "that is about Redis");
    let lost = Lost { from: 0, to: 2 };
    assert!(judged(&[write.clone(), seen(0)], Some(lost), None));
    // Redis alone had it.
    let cached = operation(Kind::Plain, 2, 3, 5);
    assert!(!judged(&[write.clone(), cached], None, None));
    let mut delete = operation(Kind::Delete, 3, 4, 0);
    delete.outcome = Outcome::Ok;
    for operations in [
        vec![write.clone(), delete.clone()],
        vec![write.clone(), delete, seen(0)],
    ] {
        assert!(judged(&operations, None, Some(deleted(6))));
        assert!(!judged(&operations, None, Some(row(5))), "it is back");
    }
}

/// A value that may live for two seconds from `call` on, a tenth of a second of which its write took.
fn brief(call: f64, version: u64) -> Operation {
    let mut write = at(Kind::Set, call, call + 0.1, version);
    write.ttl = 2;
    write
}

fn stored(version: u64, left: Option<i64>) -> Rows {
    let row = Row {
        version,
        is_deleted: false,
        left,
        value: Some((version as i64).into()),
    };
    Rows::from([("k".to_owned(), row)])
}

#[test]
fn what_has_expired_is_stored_right_all_the_same() {
    let judged = |operations: &[Operation], rows: &Rows| {
        let now = nanoseconds(Duration::from_secs(60));
        let trouble = wrong_from_ten_to_twelve();
        rows_are_what_was_acknowledged(operations, None, &trouble, (rows, now)).is_ok()
    };
    let gone = at(Kind::Read, 30.0, 30.1, 0);
    let writes = [brief(20.0, 5), brief(21.0, 6), gone.clone()];
    for left in [-1, 300, -30_000] {
        assert!(judged(&writes, &stored(6, Some(left))));
        assert!(!judged(&writes, &stored(5, Some(left))), "it is lost");
        assert!(!judged(&writes, &stored(7, Some(left))), "nobody wrote it");
    }
    assert!(!judged(&writes, &Rows::default()), "both are lost");
    // It lives for as long as it was to.
    assert!(!judged(&writes, &stored(6, None)));
    let lasting = [at(Kind::Set, 20.0, 20.1, 5)];
    assert!(judged(&lasting, &stored(5, None)));
    assert!(!judged(&[lasting[0].clone(), gone], &stored(5, None)));
    assert!(!judged(&lasting, &stored(5, Some(300))));
    assert!(!judged(&lasting, &stored(5, Some(-300))));
    let mut perhaps = brief(22.0, 7);
    (perhaps.outcome, perhaps.version) = (Outcome::Unknown, 0);
    let writes = [brief(20.0, 5), brief(21.0, 6), perhaps];
    assert!(judged(&writes, &stored(6, Some(-1))));
    assert!(judged(&writes, &stored(7, Some(-1))));
    assert!(!judged(&writes, &stored(5, Some(-1))));
}

#[test]
fn what_expires_is_seen_until_then() {
    let judged = |write: &Operation, read: f64, version, left| {
        let read = at(Kind::Read, read, read + 0.1, version);
        rows_are_what_was_seen(&[write.clone(), read], &stored(5, left)).is_ok()
    };
    let write = brief(20.0, 5);
    assert!(judged(&write, 21.0, 5, Some(900)));
    assert!(!judged(&write, 21.0, 0, Some(900)), "gone too early");
    assert!(judged(&write, 22.0, 0, Some(100)), "between the two");
    assert!(judged(&write, 23.0, 0, Some(-1)));
    // The clocks of two processes are half a second apart at most.
    assert!(judged(&write, 22.0, 5, Some(-400)));
    assert!(!judged(&write, 22.0, 5, Some(-600)), "it is back");
    assert!(!judged(&write, 21.0, 4, Some(900)), "another version");
    let lasting = at(Kind::Set, 20.0, 20.1, 5);
    assert!(judged(&lasting, 23.0, 5, None));
    assert!(!judged(&lasting, 23.0, 0, None));
}
