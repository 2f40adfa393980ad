//! What an administrator applies: dist/install.yaml, under names of our own, so that a test's cluster takes several. All of
//! them see all nests, so a cluster that was given must have no other.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use birb_nest_cluster::Cluster;
use tokio::process::Command;

const INSTALL: &str = include_str!("../../../dist/install.yaml");

const CRD: &str = "customresourcedefinition.apiextensions.k8s.io/birbnests.cache.birb.party";
/// What of an installation is in no namespace of its own, and its namespace.
const KINDS: &str = "crd,namespace,clusterrole,clusterrolebinding";
/// On all of that in a cluster that was given, so that the next run removes it.
const MARK: &str = "cache.birb.party/test=installation";

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
    apply(cluster, INSTALL, with_deployment).await
}

/// Applies what the chart comes to for an operator of these namespaces alone, less the Deployment.
///
/// # Errors
/// Helm is missing, or the API server refuses something.
pub async fn install_for(cluster: &Cluster, namespaces: &[&str]) -> Result<Installation> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let output = Command::new(root.join("scripts/helm.sh"))
        .args(["template", "birb-nest"])
        .arg(root.join("charts/birb-nest"))
        .args([
            "--namespace=birb-nest-system",
            "--kube-version=1.34.0",
            "--skip-tests",
        ])
        .arg(format!("--set=namespaces={{{}}}", namespaces.join(",")))
        .output()
        .await
        .context("failed to run scripts/helm.sh")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "helm template failed: {words}");
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: birb-nest-system\n";
    let objects = String::from_utf8(output.stdout).context("YAML is text")?;
    apply(cluster, &format!("{namespace}{objects}"), false).await
}

async fn apply(cluster: &Cluster, manifest: &str, with_deployment: bool) -> Result<Installation> {
    let suffix = std::process::id();
    let installation = Installation {
        namespace: format!("birb-nest-system-{suffix}"),
        name: format!("birb-nest-operator-{suffix}"),
    };
    // Images keep their names.
    let manifest = manifest
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
    let documents = documents.join("\n---\n");
    if !cluster.is_ours() {
        make_room(cluster).await?;
    }
    cluster
        .kubectl(&arguments, &documents)
        .await
        .context("the installation was refused")?;
    if !cluster.is_ours() {
        let mark = ["label", "--overwrite", "--filename=-", MARK];
        cluster.kubectl(&mark, &documents).await?;
    }
    let established = [
        "wait",
        "--for=condition=Established",
        "crd/birbnests.cache.birb.party",
        "--timeout=60s",
    ];
    cluster.kubectl(&established, "").await?;
    Ok(installation)
}

/// Removes what an earlier run left in a cluster that was given, its nests too.
///
/// # Errors
/// Somebody uses birb-nest there: two operators would both write all nests.
async fn make_room(cluster: &Cluster) -> Result<()> {
    let selector = format!("--selector={MARK}");
    let look = ["get", "--ignore-not-found", "--output=name"];
    let there = cluster.kubectl(&[&look[..], &[CRD]].concat(), "").await?;
    let marked = cluster
        .kubectl(&[&look[..], &["crd", &selector]].concat(), "")
        .await?;
    if !there.is_empty() && !marked.contains(CRD) {
        bail!(
            "the cluster that was given has birb-nest already: tests would change it and its nests. Give another one, or unset \
             KUBECONFIG and BIRBNEST_TEST_KUBECONFIG to have one made"
        );
    }
    cluster
        .kubectl(&["delete", KINDS, &selector, "--timeout=180s"], "")
        .await
        .context("what an earlier run left could not be removed")?;
    Ok(())
}
