//! Objects of the Prometheus operator, whose kinds may come later, or never.

use std::{fs, io::ErrorKind, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{
    Operator, client, condition, eventually, install, nothing_forbidden, requests,
};
use birb_nest_operator::{api::BirbNest, render::Kind};
use birb_nest_stack::Root;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

use crate::kubelet::Kubelet;

/// Waits until a condition of the nest has this status and reason.
async fn until(nests: &Api<BirbNest>, type_: &str, status: &str, reason: &str) -> Result<String> {
    let client = nests.clone().into_client();
    eventually(&format!("{type_} is {status} {reason}"), || async {
        Kubelet::default().act(&client, "default").await?;
        let nest = nests.get("cache").await?;
        Ok(match condition(&nest, type_) {
            Some(found) if found.status == status && found.reason == reason => {
                Ok(found.message.clone())
            }
            _ => Err(format!("{:?}", nest.status)),
        })
    })
    .await
}

/// Makes the API server know the kinds of the Prometheus operator.
pub async fn install_kinds(cluster: &Cluster) -> Result<()> {
    for kind in [Kind::ServiceMonitor, Kind::PrometheusRule] {
        let resource = kind.api_resource();
        let name = format!("{}.{}", resource.plural, resource.group);
        let definition = json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": { "name": name },
            "spec": {
                "group": resource.group, "scope": "Namespaced",
                "names": { "kind": resource.kind, "plural": resource.plural },
                "versions": [{ "name": resource.version, "served": true, "storage": true, "schema": { "openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true } } }],
            },
        });
        cluster
            .kubectl(
                &["apply", "--server-side", "--filename=-"],
                &definition.to_string(),
            )
            .await?;
        let established = [
            "wait",
            "--for=condition=Established",
            &format!("crd/{name}"),
            "--timeout=60s",
        ];
        cluster.kubectl(&established, "").await?;
    }
    Ok(())
}

/// Has Prometheus' own tool read `rules`, which are written to `file`: groups with all the expressions of this nest.
fn check_rules(file: &Path, rules: &Value) -> Result<()> {
    fs::write(file, serde_yaml::to_string(rules)?)?;
    let checked = Command::new("promtool")
        .args(["check", "rules"])
        .arg(file)
        .output();
    if checked
        .as_ref()
        .is_err_and(|error| error.kind() == ErrorKind::NotFound)
    {
        // Not every system has a package of it (scripts/init.sh).
        println!("promtool: not installed, rules not checked");
        return Ok(());
    }
    let checked = checked.context("promtool cannot be started")?;
    let said = String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
    let n_rules = rules["groups"][0]["rules"].as_array().map_or(0, Vec::len);
    ensure!(
        n_rules > 0
            && checked.status.success()
            && said.contains(&format!("SUCCESS: {n_rules} rules found")),
        "{said}\n{rules:#}"
    );
    Ok(())
}

/// In a control plane of its own, to which the kinds are added.
#[tokio::test]
async fn kinds_that_are_missing_are_told_and_used_once_they_are_there() -> Result<()> {
    let root = Root::temporary("monitoring", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let client = client(&cluster).await?;
    let operator = Operator::start(&cluster, &installation, root.path(), "operator").await?;
    let nests: Api<BirbNest> = Api::default_namespaced(client.clone());
    let wanted = json!({ "observability": {
        "serviceMonitor": { "enabled": true, "labels": { "release": "prometheus" }, "interval": "15s" },
        "prometheusRule": { "enabled": true },
    } });
    let nest = BirbNest::new("cache", serde_json::from_value(wanted)?);
    nests.create(&PostParams::default(), &nest).await?;
    let message = until(&nests, "Degraded", "True", "KindMissing")
        .await
        .with_context(|| operator.process.log().unwrap_or_default())?;
    assert!(message.contains("ServiceMonitor"), "{message}");
    until(&nests, "Ready", "True", "Available").await?;
    let passes = async |of: &str| {
        let name = format!("birbnest_operator_reconciles_total{{{of}}}");
        operator.metric(&name).await
    };
    passes("reason=\"Available\",result=\"ok\"").await?;
    let refused = passes("reason=\"refused\",result=\"error\"").await;
    assert!(refused.is_err(), "passes failed: {refused:?}");

    install_kinds(&cluster).await?;
    until(&nests, "Degraded", "False", "AsExpected").await?;
    let monitors: Api<DynamicObject> =
        Api::default_namespaced_with(client.clone(), &Kind::ServiceMonitor.api_resource());
    let rules: Api<DynamicObject> =
        Api::default_namespaced_with(client.clone(), &Kind::PrometheusRule.api_resource());
    let monitor = monitors.get("cache").await?;
    assert_eq!(monitor.labels()["release"], "prometheus");
    assert_eq!(monitor.data["spec"]["endpoints"][0]["interval"], "15s");

    let written = rules.get("cache").await?;
    check_rules(&root.path().join("rules.yaml"), &written.data["spec"])?;

    let edit = json!({ "spec": { "endpoints": [{ "port": "other" }] } });
    monitors
        .patch("cache", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    let before = rules.get("cache").await?.uid();
    rules.delete("cache", &DeleteParams::default()).await?;
    eventually("both are as they were", || async {
        let port = monitors.get("cache").await?.data["spec"]["endpoints"][0]["port"].clone();
        let uid = rules.get_opt("cache").await?.and_then(|rule| rule.uid());
        Ok(if port == "admin" && uid.is_some() && uid != before {
            Ok(())
        } else {
            Err(format!("{port} {uid:?}"))
        })
    })
    .await?;

    let off = json!({ "spec": { "observability": {
        "serviceMonitor": { "enabled": false }, "prometheusRule": { "enabled": false } } } });
    nests
        .patch("cache", &PatchParams::default(), &Patch::Merge(off))
        .await?;
    eventually("both are gone", || async {
        Kubelet::default().act(&client, "default").await?;
        let left = [
            monitors.get_opt("cache").await?.map(|it| it.name_any()),
            rules.get_opt("cache").await?.map(|it| it.name_any()),
        ];
        Ok(if left == [None, None] {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        })
    })
    .await?;
    nothing_forbidden(&cluster, &installation)?;
    // It asked for kinds that were not there now and then, not all the time.
    let asked = requests(&cluster, &installation)?.into_iter();
    let asked = asked
        .filter(|request| request.resource == "servicemonitors")
        .count();
    assert!(asked < 200, "{asked} requests");
    Ok(())
}
