use super::*;
use crate::stores::{Row, Rows};

#[test]
fn what_is_stored_is_what_was_seen() {
    let row = |version: u64| Row {
        version,
        is_deleted: false,
        is_expired: false,
        expires: false,
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
    // It has expired between the two.
    let expires = Row {
        expires: true,
        ..row(5)
    };
    let gone = [write, seen(0)];
    assert!(rows_are_what_was_seen(&gone, &Rows::from([("k".to_owned(), expires)])).is_ok());
    assert!(rows_are_what_was_seen(&gone, &Rows::from([("k".to_owned(), row(5))])).is_err());
}
