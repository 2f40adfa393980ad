//! What the API server itself makes of a nest: defaults, refusals with a sentence that names the field, columns, scale.

use anyhow::{Context, Result, ensure};
use birb_nest_operator::api::BirbNest;
use kube::{
    ResourceExt,
    api::{DynamicObject, Patch, PatchParams, PostParams},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    kubelet::{Kubelet, SetupPlay},
    world::World,
};

/// Specs and what becomes of them; operator/src/api/tests.rs judges those with rules without a server.
const CASES: &str = include_str!("../../../../operator/src/api/cases.yaml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    #[serde(default)]
    nest: Option<String>,
    #[serde(default)]
    from: Option<Value>,
    spec: Value,
    /// Words of the refusal; none if it is accepted.
    #[serde(default)]
    refused: Vec<String>,
    #[serde(default, rename = "rules")]
    _rules: bool,
}

#[tokio::test]
async fn the_schema_accepts_and_refuses_with_a_sentence() -> Result<()> {
    let world = World::new().await?;
    let cases: Vec<Case> = serde_yaml::from_str(CASES)?;
    let mut wrong = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let name = case
            .nest
            .clone()
            .unwrap_or_else(|| format!("nest-{number}"));
        let result = attempt(&world, &name, case).await;
        let verdict = match (&result, case.refused.is_empty()) {
            (Ok(_), true) => continue,
            (Ok(_), false) => "was accepted".to_owned(),
            (Err(kube::Error::Api(status)), false) => {
                if case
                    .refused
                    .iter()
                    .all(|words| status.message.contains(words))
                {
                    continue;
                }
                format!("was refused with: {}", status.message)
            }
            (Err(error), _) => format!("was refused: {error}"),
        };
        wrong.push(format!("{}: {verdict}", case.name));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    world.finish().await
}

async fn attempt(world: &World, name: &str, case: &Case) -> kube::Result<DynamicObject> {
    let api = world.dynamic_nests();
    let nest = |spec: &Value| -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "cache.birb.party/v1alpha1", "kind": "BirbNest", "metadata": { "name": name }, "spec": spec,
        }))
        .expect("it is an object")
    };
    let params = PostParams {
        dry_run: case.from.is_none(),
        ..PostParams::default()
    };
    let Some(from) = &case.from else {
        return api.create(&params, &nest(&case.spec)).await;
    };
    // Paused, so that this test alone writes it.
    let mut paused = from.clone();
    paused["paused"] = true.into();
    api.create(&params, &nest(&paused)).await?;
    let mut spec = case.spec.clone();
    spec["paused"] = true.into();
    let change = json!([{ "op": "replace", "path": "/spec", "value": spec }]);
    let patch: Patch<()> = Patch::Json(serde_json::from_value(change).expect("it is a patch"));
    api.patch(name, &PatchParams::default(), &patch).await
}

#[tokio::test]
async fn an_empty_spec_stores_its_defaults_and_no_member_of_a_union() -> Result<()> {
    let world = World::new().await?;
    world.create("cache", "{paused: true}").await?;
    let stored = world.dynamic_nests().get("cache").await?;
    let spec = &stored.data["spec"];
    assert_eq!(spec["worker"]["scaling"]["replicas"], 1);
    assert_eq!(spec["nats"]["shards"], 8);
    assert_eq!(spec["deletionPolicy"], "Delete");
    assert_eq!(
        spec["api"]["service"],
        json!({ "type": "ClusterIP", "port": 8080 })
    );
    for server in ["redis", "nats", "postgres"] {
        for member in ["managed", "external"] {
            assert!(
                spec[server].get(member).is_none(),
                "{server}.{member}: {spec}"
            );
        }
    }
    assert!(spec["api"].get("replicas").is_none(), "{spec}");
    world.finish().await
}

#[tokio::test]
async fn the_definition_stays_small_and_documents_every_field() -> Result<()> {
    let world = World::new().await?;
    let definition = world
        .kubectl(
            &["get", "crd", "birbnests.cache.birb.party", "--output=json"],
            "",
        )
        .await?;
    assert!(definition.len() < 200 << 10, "{} bytes", definition.len());
    let definition: Value = serde_json::from_str(&definition)?;
    let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    for part in ["spec", "status"] {
        check_words(&schema["properties"][part], part)?;
    }
    world.finish().await
}

/// Each property says what it is, and each rule what is wrong when it refuses.
fn check_words(schema: &Value, path: &str) -> Result<()> {
    let described = schema["description"].as_str().unwrap_or_default();
    ensure!(!described.is_empty(), "{path} has no description");
    check_rules(schema, path)?;
    // What Kubernetes' own types hold is not ours to document.
    if [".resources", ".conditions"]
        .iter()
        .any(|own| path.ends_with(own))
    {
        return Ok(());
    }
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        check_words(property, &format!("{path}.{name}"))?;
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            let path = format!("{path}.{inner}");
            check_rules(&schema[inner], &path)?;
            for (name, property) in schema[inner]["properties"]
                .as_object()
                .into_iter()
                .flatten()
            {
                check_words(property, &format!("{path}.{name}"))?;
            }
        }
    }
    Ok(())
}

fn check_rules(schema: &Value, path: &str) -> Result<()> {
    for rule in schema["x-kubernetes-validations"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let sentence = rule["message"].as_str().unwrap_or_default();
        ensure!(
            !sentence.is_empty(),
            "a rule of {path} has no message: {rule}"
        );
    }
    Ok(())
}

#[tokio::test]
async fn kubectl_shows_explains_and_scales_a_nest() -> Result<()> {
    let mut world = World::new().await?;
    world.play(Kubelet {
        setup: SetupPlay::Ends(75, "Redis at redis.infra:6379 cannot be reached"),
        ..Kubelet::default()
    });
    world
        .create(
            "cache",
            "{api: {replicas: 3}, worker: {scaling: {mode: Fixed}}}",
        )
        .await?;
    world
        .until_ready("cache", "False", "ServerUnreachable")
        .await?;
    // What a person sees who looks again and again.
    let before = world.kubectl(&["get", "bn", "--no-headers"], "").await?;
    let cells: Vec<&str> = before.split_whitespace().take(3).collect();
    assert_eq!(cells, ["cache", "False", "ServerUnreachable"]);
    assert!(!before.contains("3/3"), "{before}");
    world.play(Kubelet::default());
    world.until_ready("cache", "True", "Available").await?;
    let table = world.kubectl(&["get", "bn", "--output=wide"], "").await?;
    let mut lines = table.lines();
    let columns: Vec<&str> = lines
        .next()
        .context("a header")?
        .split_whitespace()
        .collect();
    let expected = [
        "NAME",
        "READY",
        "REASON",
        "API",
        "WORKERS",
        "LAG",
        "AGE",
        "VERSION",
        "MIGRATION",
        "PAUSED",
        "ENDPOINT",
    ];
    assert_eq!(columns, expected);
    let cells: Vec<&str> = lines.next().context("a row")?.split_whitespace().collect();
    assert_eq!(cells[..5], ["cache", "True", "Available", "3/3", "1/1"]);
    let endpoint = format!("http://cache.{}.svc:8080", world.namespace);
    assert_eq!(
        cells[6..],
        [env!("CARGO_PKG_VERSION"), "Complete", "false", &endpoint]
    );

    let explained = world
        .kubectl(&["explain", "birbnest.spec.nats.shards"], "")
        .await?;
    assert!(
        explained.contains("Streams over which the log is spread"),
        "{explained}"
    );

    world
        .kubectl(&["scale", "birbnest", "cache", "--replicas=4"], "")
        .await?;
    world
        .until::<k8s_openapi::api::apps::v1::Deployment>("cache-worker", |worker| {
            worker.spec.as_ref().and_then(|spec| spec.replicas) == Some(4)
        })
        .await?;
    let scale: Value = serde_json::from_str(
        &world
            .kubectl(
                &[
                    "get",
                    "birbnest",
                    "cache",
                    "--subresource=scale",
                    "--output=json",
                ],
                "",
            )
            .await?,
    )?;
    let selector = scale["status"]["selector"].as_str().unwrap_or_default();
    assert!(
        selector.contains("app.kubernetes.io/component=worker"),
        "{scale}"
    );
    let nest = world
        .until::<BirbNest>("cache", |nest| {
            nest.status
                .as_ref()
                .is_some_and(|status| status.worker.replicas == 4)
        })
        .await?;
    assert_eq!(nest.name_any(), "cache");
    world.finish().await
}
