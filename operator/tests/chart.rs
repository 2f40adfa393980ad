//! The chart, the images for tests and the operator agree.

use std::{collections::BTreeSet, fs, path::Path};

use birb_nest_operator::config::Config;
use clap::{CommandFactory, Parser};
use serde::Deserialize as _;
use serde_json::Value;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The object of that kind in dist/install.yaml, which is the chart with its default values.
fn installed(kind: &str) -> Value {
    serde_yaml::Deserializer::from_str(&read("dist/install.yaml"))
        .map(|document| Value::deserialize(document).expect("it is YAML"))
        .find(|object| object["kind"] == kind)
        .unwrap_or_else(|| panic!("no {kind} in dist/install.yaml"))
}

fn defaults() -> Config {
    Config::parse_from(["birb-nest-operator"])
}

#[test]
fn the_deployment_sets_variables_of_the_operator_to_their_defaults() {
    let command = Config::command();
    let deployment = installed("Deployment");
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    let variables = container["env"].as_array().unwrap();
    assert!(variables.len() > 5, "{variables:?}");
    for variable in variables {
        let name = variable["name"].as_str().unwrap();
        let flag = command
            .get_arguments()
            .find(|flag| flag.get_env().is_some_and(|env| env == name))
            .unwrap_or_else(|| panic!("the operator does not read {name}"));
        if let Some(value) = variable["value"].as_str() {
            assert_eq!(flag.get_default_values(), [value], "{name}");
        }
    }
    let port = &container["ports"][0]["containerPort"];
    assert_eq!(port, defaults().admin_port, "the port of the probes");
}

#[test]
fn the_role_names_the_lease() {
    let lease = defaults().election.lease_name;
    let role = installed("Role");
    assert_eq!(
        role["rules"][1]["resourceNames"],
        serde_json::json!([lease])
    );
}

#[test]
fn images_for_tests_have_the_names_that_nests_ask_for() {
    let script = read("scripts/server-images.sh");
    let images = defaults().images;
    let (nats, version) = images.nats.rsplit_once(':').unwrap();
    for line in [
        format!("[postgres]={}\n", images.postgres),
        format!("[redis]={}\n", images.redis),
        format!("[nats]={nats}:$nats_version\n"),
    ] {
        assert!(
            script.contains(&line),
            "scripts/server-images.sh lacks {line}"
        );
    }
    let init = format!("\nNATS_VERSION={version} ");
    assert!(
        read("scripts/init.sh").contains(&init),
        "scripts/init.sh lacks {init}"
    );
}

#[test]
fn every_value_of_the_chart_is_in_its_schema_and_has_a_comment() {
    let schema: Value = serde_json::from_str(&read("charts/birb-nest/values.schema.json")).unwrap();
    let values = read("charts/birb-nest/values.yaml");
    let parsed: Value = serde_yaml::from_str(&values).unwrap();
    let lines: Vec<_> = values.lines().collect();
    check(&schema, &schema, &parsed, &lines, 0);
}

/// Compares what the schema lists at one place with the values there, and goes on below. `lines` begin with that place.
fn check(root: &Value, schema: &Value, values: &Value, lines: &[&str], indent: usize) {
    for (name, property) in schema["properties"]
        .as_object()
        .expect("the schema lists properties")
    {
        // Helm's own.
        if name == "global" {
            continue;
        }
        let value = values.get(name);
        let value = value.unwrap_or_else(|| panic!("values.yaml lacks {name}"));
        let key = format!("{:indent$}{name}:", "");
        let line = lines.iter().position(|line| line.starts_with(&key));
        let line = line.unwrap_or_else(|| panic!("values.yaml lacks {key}"));
        let property = match property["$ref"].as_str() {
            Some(reference) => &root["definitions"][reference.trim_start_matches("#/definitions/")],
            None => property,
        };
        if property.get("properties").is_some() && name != "resources" {
            check(root, property, value, &lines[line + 1..], indent + 2);
        } else {
            let comment = lines[line.saturating_sub(1)].trim_start().starts_with('#');
            assert!(comment, "values.yaml has no comment above {name}");
        }
    }
    let known = |name: &String| schema["properties"].get(name).is_some();
    assert!(
        values.as_object().expect("it is a map").keys().all(known),
        "{values} has more than its schema"
    );
}

/// All Rust code below `dir`, in no certain order.
fn code_below(dir: &Path) -> String {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let paths = entries.map(|entry| entry.expect("the directory can be read").path());
    paths
        .map(|path| match path.extension() {
            Some(extension) if extension == "rs" => fs::read_to_string(&path).expect("it is text"),
            _ if path.is_dir() => code_below(&path),
            _ => String::new(),
        })
        .collect()
}

/// Names of the metrics in `text`, as Prometheus shows them without what it adds for counters and units.
fn metrics(text: &str) -> BTreeSet<&str> {
    let names = text.split(|c: char| !(c.is_ascii_lowercase() || c == '_'));
    names
        .filter(|name| name.starts_with("birbnest_operator_"))
        .map(|name| name.trim_end_matches("_total").trim_end_matches("_seconds"))
        .collect()
}

#[test]
fn every_metric_is_documented_and_no_other() {
    let code = code_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let documented = read("docs/OPERATOR.md");
    let (code, documented) = (metrics(&code), metrics(&documented));
    assert!(code.len() > 10, "{code:?}");
    assert_eq!(code, documented);
}
