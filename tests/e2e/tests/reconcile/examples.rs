//! What the documents show is taken as it stands: by the API server, and nests by the operator too.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        batch::v1::{CronJob, Job},
        core::v1::{PersistentVolumeClaim, Pod, PodSpec, PodTemplateSpec, Secret},
        networking::v1::NetworkPolicy,
    },
    serde::de::DeserializeOwned,
};
use kube::api::{ObjectMeta, PostParams};
use serde::Deserialize as _;
use serde_json::{Value, json};

use crate::world::World;

type Labels = BTreeMap<String, String>;

fn documents_in(text: &str) -> Result<Vec<Value>> {
    serde_yaml::Deserializer::from_str(text)
        .map(|document| Ok(Value::deserialize(document)?))
        .collect()
}

/// Files with this extension in a directory of the repository, in order.
fn files(dir: &str, extension: &str) -> Result<Vec<(PathBuf, String)>> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(dir);
    let mut paths: Vec<PathBuf> = fs::read_dir(&dir)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    paths.retain(|path| path.extension().is_some_and(|found| found == extension));
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path)?;
            Ok((path, text))
        })
        .collect()
}

#[tokio::test]
async fn every_example_is_taken_as_it_stands() -> Result<()> {
    let world = World::where_all_works().await?;
    let mut files = files("docs/examples", "yaml")?;
    // Others are about that nest.
    files.sort_by_key(|(path, _)| !path.ends_with("birbnest.yaml"));
    ensure!(files.len() > 4, "{files:?}");
    for (path, text) in files {
        let taken = world.kubectl(&["apply", "--filename=-"], &text).await;
        taken.with_context(|| path.display().to_string())?;
        for object in documents_in(&text)? {
            let name = object["metadata"]["name"].as_str().context("a name")?;
            let judged = judge(&world, &object, name).await;
            judged.with_context(|| format!("{}: {name}", path.display()))?;
        }
    }
    world.finish().await
}

async fn judge(world: &World, object: &Value, name: &str) -> Result<()> {
    match object["kind"].as_str() {
        Some("BirbNest") => {
            world.until_ready(name, "True", "Available").await?;
            sets_what_it_says(world, object, name).await
        }
        Some("CronJob") => {
            let job: CronJob = typed(object)?;
            let job = job.spec.context("a spec")?.job_template.spec;
            can_run(world, job.context("a Job")?.template).await
        }
        Some("Job") => {
            let job: Job = typed(object)?;
            can_run(world, job.spec.context("a spec")?.template).await
        }
        _ => Ok(()),
    }
}

fn typed<T: DeserializeOwned>(object: &Value) -> Result<T> {
    Ok(serde_json::from_value(object.clone())?)
}

/// Variables that a nest gives its workers by `podTemplate` are theirs.
async fn sets_what_it_says(world: &World, nest: &Value, name: &str) -> Result<()> {
    let over = &nest["spec"]["worker"]["podTemplate"]["spec"]["containers"][0]["env"];
    let worker: Deployment = world.of().get(&format!("{name}-worker")).await?;
    let worker = serde_json::to_value(worker)?;
    let env = worker["spec"]["template"]["spec"]["containers"][0]["env"].clone();
    let env = env.as_array().context("variables")?;
    for variable in over.as_array().into_iter().flatten() {
        ensure!(env.contains(variable), "{variable} is not in {env:?}");
    }
    Ok(())
}

/// Pods of `template` are as restricted as the namespace asks for, find what they name, and are let in where they go.
async fn can_run(world: &World, template: PodTemplateSpec) -> Result<()> {
    let labels = template.metadata.and_then(|metadata| metadata.labels);
    let labels = labels.context("labels")?;
    let spec = template.spec.context("a spec")?;
    let host = what_it_names_is_there(world, &spec).await?;
    is_let_in(world, &labels, &host).await?;
    let pod = Pod {
        metadata: ObjectMeta {
            name: Some("it".to_owned()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        spec: Some(spec),
        status: None,
    };
    let dry_run = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    world.of::<Pod>().create(&dry_run, &pod).await?;
    Ok(())
}

/// Returns the server that it talks to.
async fn what_it_names_is_there(world: &World, spec: &PodSpec) -> Result<String> {
    let env = spec.containers[0].env.iter().flatten();
    for source in env.clone().filter_map(|env| env.value_from.as_ref()) {
        let key = source.secret_key_ref.as_ref().context("of a Secret")?;
        let secret: Secret = world.of().get(&key.name).await?;
        let data = secret.data.unwrap_or_default();
        ensure!(data.contains_key(&key.key), "no {key:?}");
    }
    for volume in spec.volumes.iter().flatten() {
        if let Some(claim) = &volume.persistent_volume_claim {
            let claims = world.of::<PersistentVolumeClaim>();
            claims.get(&claim.claim_name).await?;
        }
    }
    let mut hosts = env.filter(|env| env.name == "PGHOST");
    let host = hosts.next().and_then(|env| env.value.clone());
    host.context("a server")
}

/// Some policy lets pods with these labels at the pods of `server`, whom the operator's own policy shields.
async fn is_let_in(world: &World, labels: &Labels, server: &str) -> Result<()> {
    let set: StatefulSet = world.of().get(server).await?;
    let template = set.spec.context("a spec")?.template;
    let of_server = template.metadata.and_then(|metadata| metadata.labels);
    let of_server = of_server.context("labels")?;
    let policies = world
        .of::<NetworkPolicy>()
        .list(&Default::default())
        .await?;
    let lets_in = policies.iter().any(|policy| {
        let spec = serde_json::to_value(&policy.spec).unwrap_or_default();
        let rule = &spec["ingress"][0];
        selects(&spec["podSelector"], &of_server)
            && selects(&rule["from"][0]["podSelector"], labels)
            && rule["ports"] == json!([{ "port": 5432, "protocol": "TCP" }])
    });
    ensure!(lets_in, "nobody lets {labels:?} at {server}");
    Ok(())
}

/// Whether a selector of labels alone selects these.
fn selects(selector: &Value, labels: &Labels) -> bool {
    let wanted = selector["matchLabels"].as_object();
    selector["matchExpressions"].is_null()
        && wanted.is_some_and(|wanted| {
            wanted
                .iter()
                .all(|(name, value)| labels.get(name).map(String::as_str) == value.as_str())
        })
}

#[tokio::test]
async fn every_nest_in_the_documents_fits_the_schema() -> Result<()> {
    let world = World::new().await?;
    let mut n_nests = 0;
    for (path, text) in [files("docs", "md")?, files(".", "md")?].concat() {
        let blocks = text.split("```yaml\n").skip(1);
        let blocks = blocks.filter_map(|block| Some(block.split_once("```")?.0));
        for block in blocks.filter(|block| block.contains("kind: BirbNest")) {
            let apply = ["apply", "--dry-run=server", "--filename=-"];
            let taken = world.kubectl(&apply, block).await;
            taken.with_context(|| format!("{}:\n{block}", path.display()))?;
            n_nests += 1;
        }
    }
    ensure!(n_nests > 0, "no document shows a nest");
    world.finish().await
}
