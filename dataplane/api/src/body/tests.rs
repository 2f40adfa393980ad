use clap::Parser;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    config: ApiConfig,
}

fn config(args: &[&str]) -> ApiConfig {
    Cli::parse_from([&["test"], args].concat()).config
}

fn field(body: &str) -> (Option<String>, u16) {
    let error = parse_entry(
        &Bytes::copy_from_slice(body.as_bytes()),
        &config(&["--api-max-value-bytes=64"]),
    )
    .expect_err(body);
    (error.field, error.status.as_u16())
}

#[test]
fn what_is_wrong_is_named() {
    let check = |body: &str, expected: &str, status: u16| {
        assert_eq!(field(body), (Some(expected.to_owned()), status), "{body}");
    };
    check("{}", "value", 400);
    check(r#"{"value":1,"ttl":-1}"#, "ttl", 400);
    check(r#"{"value":1,"ttl":0}"#, "ttl", 400);
    check(r#"{"value":1,"ttl":1.5}"#, "ttl", 400);
    check(r#"{"value":1,"ttl":"10"}"#, "ttl", 400);
    check(r#"{"value":1,"ttl":null}"#, "ttl", 400);
    check(r#"{"value":1,"ttl":99999999999}"#, "ttl", 400);
    check(r#"{"value":1,"metadata":[]}"#, "metadata", 400);
    check(r#"{"value":1,"metadata":"x"}"#, "metadata", 400);
    check(r#"{"value":1,"tll":3}"#, "tll", 400);
    check(r#"{"value":1,"value":2}"#, "value", 400);
    check(
        &format!(r#"{{"value":1,"metadata":{{"a":"{}"}}}}"#, "x".repeat(4096)),
        "metadata",
        400,
    );
    for body in [
        "",
        "[]",
        "1",
        "{",
        r#"{"value":}"#,
        r#"{"value":1}x"#,
        "{\"value\":\"\n\"}",
        "nonsense",
    ] {
        assert_eq!(field(body), (None, 400), "{body:?}");
    }
    assert_eq!(
        field(&format!(r#"{{"value":"{}"}}"#, "x".repeat(64))),
        (None, 413)
    );
}

#[test]
fn values_are_kept_as_they_were_sent() {
    for value in [
        "null",
        "1.0",
        "1e400",
        "-0",
        "12345678901234567890123",
        r#""\u00e9\/ é""#,
        r#"{"b":1,"a":2,"b":3}"#,
        "[ 1 ,\n2 ]",
    ] {
        let body = Bytes::from(format!("{{ \"ttl\" : 5 , \"value\" :  {value} }}"));
        let entry = parse_entry(&body, &config(&[])).expect("valid");
        assert_eq!(entry.content.value, value.as_bytes());
        assert_eq!(entry.ttl, Some(Duration::from_secs(5)));
    }
}

#[test]
fn deep_nesting_is_no_problem() {
    let deep = format!(
        "{{\"value\":{}{}}}",
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert!(
        parse_entry(&Bytes::from(deep), &config(&[]))
            .is_ok_and(|entry| entry.content.value.len() == 200_000)
    );
}

#[test]
fn keys_of_a_batch() {
    let keys = |body: &str| {
        parse_keys(body.as_bytes(), &config(&["--api-max-batch=3"]))
            .and_then(|keys| keys.into_iter().map(|(_, key)| key).collect())
            .map(|keys: Vec<Key>| keys.iter().map(Key::to_string).collect::<Vec<_>>())
            .map_err(|error| (error.field.unwrap_or_default(), error.status.as_u16()))
    };
    assert_eq!(
        keys(r#"{"keys":["b","a","b"]}"#),
        Ok(vec!["b".to_owned(), "a".to_owned(), "b".to_owned()])
    );
    assert_eq!(keys(r#"{"keys":[]}"#), Ok(vec![]));
    assert_eq!(
        keys(r#"{"keys":["a",""]}"#),
        Err(("keys[1]".to_owned(), 400))
    );
    assert_eq!(
        keys(r#"{"keys":["a","b","c","d"]}"#),
        Err(("keys".to_owned(), 400))
    );
    assert_eq!(keys(r#"{"keys":"a"}"#), Err(("keys".to_owned(), 400)));
    assert_eq!(keys("{}"), Err(("keys".to_owned(), 400)));
    assert_eq!(
        keys(&format!(r#"{{"keys":["{}"]}}"#, "x".repeat(513))),
        Err(("keys[0]".to_owned(), 400))
    );
}

#[test]
fn an_entry_of_a_batch_fails_alone() {
    let body = Bytes::from_static(
        br#"{"entries":[{"key":"a","value":1},{"key":"","value":1},{"key":"b"},{"key":"c","value":1,"ttl":0},
            {"key":"d","value":1,"if_match":7},{"key":"e","value":1,"if_match":"*"},{"key":"f","value":1,"if_match":"7"},
            {"key":"g","value":1,"x":1},3,{"value":1},{"key":5,"value":1},{"key":"h","value":1,"if_match":"\"7\""}]}"#,
    );
    let seen: Vec<_> = parse_puts(&body, &config(&[]))
        .expect("a list")
        .into_iter()
        .map(|item| match item.put {
            Ok(put) => format!("{} {:?}", put.key, put.condition.if_match),
            Err(error) => error.field.unwrap_or_default(),
        })
        .collect();
    let seven = Version::new(7).expect("small");
    assert_eq!(
        seen,
        [
            "a None".to_owned(),
            "entries[1].key".to_owned(),
            "entries[2].value".to_owned(),
            "entries[3].ttl".to_owned(),
            format!("d {:?}", Some(Tags::Versions(vec![seven]))),
            "e Some(Any)".to_owned(),
            "entries[6].if_match".to_owned(),
            "entries[7].x".to_owned(),
            "entries[8]".to_owned(),
            "entries[9].key".to_owned(),
            "entries[10].key".to_owned(),
            format!("h {:?}", Some(Tags::Versions(vec![seven]))),
        ]
    );
}

#[test]
fn a_touch_says_how_long() {
    let touch =
        |body: &str| parse_touch(body.as_bytes(), &config(&[])).map_err(|error| error.field);
    assert_eq!(touch(r#"{"ttl":5}"#), Ok(Some(Duration::from_secs(5))));
    assert_eq!(touch(r#"{"ttl":null}"#), Ok(None));
    for wrong in [r#"{"ttl":0}"#, r#"{"ttl":"5"}"#, "{}"] {
        assert_eq!(touch(wrong), Err(Some("ttl".to_owned())), "{wrong}");
    }
    assert_eq!(
        touch(r#"{"ttl":5,"value":1}"#),
        Err(Some("value".to_owned()))
    );
}
