//! What an administrator applies: dist/install.yaml, under names of our own, so that it disturbs no installation in a cluster
//! that was given.

use anyhow::{Context, Result};
use birb_nest_cluster::Cluster;

const INSTALL: &str = include_str!("../../../dist/install.yaml");

/// The operator's objects in a cluster.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Namespace of its ServiceAccount and Lease.
    pub namespace: String,
    /// What its ServiceAccount, roles and Deployment are called.
    pub name: String,
}

impl Installation {
    /// The user that a request of the operator comes from.
    pub fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

/// Applies dist/install.yaml, the Deployment only where pods run.
///
/// # Errors
/// The API server refuses something.
pub async fn install(cluster: &Cluster, with_deployment: bool) -> Result<Installation> {
    let suffix = std::process::id();
    let installation = Installation {
        namespace: format!("birb-nest-system-{suffix}"),
        name: format!("birb-nest-operator-{suffix}"),
    };
    // Images keep their names.
    let manifest = INSTALL
        .replace("birb-nest-system", &installation.namespace)
        .replace("birb-nest-operator", &installation.name)
        .replace(&format!("/{}:", installation.name), "/birb-nest-operator:");
    let documents: Vec<&str> = manifest
        .split("\n---\n")
        .filter(|document| with_deployment || !document.contains("\nkind: Deployment\n"))
        .collect();
    let arguments = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--filename=-",
    ];
    cluster
        .kubectl(&arguments, &documents.join("\n---\n"))
        .await
        .context("dist/install.yaml was refused")?;
    let established = [
        "wait",
        "--for=condition=Established",
        "crd/birbnests.cache.birb.party",
        "--timeout=60s",
    ];
    cluster.kubectl(&established, "").await?;
    Ok(installation)
}
