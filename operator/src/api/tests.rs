use kube::{CustomResourceExt, core::cel::Validator};
use serde::Deserialize;
use serde_json::{Value, json};

use super::BirbNest;

/// tests/e2e sends all of them to an API server.
const CASES: &str = include_str!("cases.yaml");

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(default)]
    rules: bool,
    from: Option<Value>,
    spec: Value,
    #[serde(default)]
    refused: Vec<String>,
}

#[test]
fn rules_refuse_what_they_should_and_nothing_else() {
    let cases: Vec<Case> = serde_yaml::from_str(CASES).unwrap();
    let definition = serde_json::to_value(BirbNest::crd()).unwrap();
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    for case in cases
        .iter()
        .filter(|case| case.rules || case.refused.is_empty())
    {
        let nest = |spec: &Value| json!({ "metadata": { "name": "cache" }, "spec": spec });
        let old = case.from.as_ref().map(nest);
        let verdict = Validator::new().validate(schema, &nest(&case.spec), old.as_ref());
        match verdict {
            Ok(()) => assert!(case.refused.is_empty(), "{} was accepted", case.name),
            Err(errors) => {
                let words = errors.to_string();
                assert!(!case.refused.is_empty(), "{}: {words}", case.name);
                let sentence = case.refused.last().unwrap();
                assert!(words.contains(sentence), "{}: {words}", case.name);
            }
        }
    }
}
