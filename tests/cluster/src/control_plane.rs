//! etcd, the API server, the controllers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::certificates::Certificates;
use crate::kubectl::Kubectl;
use crate::programs::Programs;
use crate::site::Site;

/// A debug machine that compiles beside it.
const LIMIT: Duration = Duration::from_secs(120);

/// What deletes dependents and namespaces, and gives pods and tests their tokens; the rest would need nodes.
const CONTROLLERS_WITHOUT_NODES: &str = "garbage-collector-controller,namespace-controller,\
    serviceaccount-controller,serviceaccount-token-controller,root-ca-certificate-publisher-controller";

/// Where it listens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Listen {
    pub etcd: u16,
    pub etcd_peer: u16,
    pub api_server: u16,
    /// The address that pods know the API server by; `None`: there are none, 127.0.0.1 will do.
    pub node_address: Option<&'static str>,
}

pub(crate) fn audit_log(root: &Path) -> PathBuf {
    root.join("logs/audit.log")
}

/// Starts etcd and the API server, and waits for nothing.
pub(crate) fn start(
    site: &mut Site,
    programs: &Programs,
    certificates: &Certificates,
    listen: Listen,
) -> Result<()> {
    let root = site.root.clone();
    let file = |name: &str| root.join(name).display().to_string();
    let etcd = format!("http://127.0.0.1:{}", listen.etcd);
    let peer = format!("http://127.0.0.1:{}", listen.etcd_peer);
    let arguments = [
        format!("--data-dir={}", file("etcd")),
        format!("--listen-client-urls={etcd}"),
        format!("--advertise-client-urls={etcd}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // Its data does not outlive the machine anyway.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    site.start("etcd", &programs.path("etcd")?, &arguments)?;

    let policy = json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{ "level": "Metadata" }],
    });
    std::fs::write(file("audit-policy.json"), policy.to_string())
        .context("failed to write the audit policy")?;
    let identity = &certificates.api_server;
    let admin = &certificates.admin;
    let mut arguments = vec![
        format!("--etcd-servers={etcd}"),
        format!("--secure-port={}", listen.api_server),
        format!("--cert-dir={}", file("kube-apiserver")),
        format!("--tls-cert-file={}", identity.certificate.display()),
        format!("--tls-private-key-file={}", identity.key.display()),
        format!("--client-ca-file={}", certificates.authority.display()),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement"
            .to_owned(),
        "--allow-privileged=true".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        format!(
            "--service-account-key-file={}",
            certificates.token_public_key.display()
        ),
        format!(
            "--service-account-signing-key-file={}",
            certificates.token_key.display()
        ),
        format!(
            "--kubelet-client-certificate={}",
            admin.certificate.display()
        ),
        format!("--kubelet-client-key={}", admin.key.display()),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        format!("--audit-policy-file={}", file("audit-policy.json")),
        format!("--audit-log-path={}", audit_log(&root).display()),
    ];
    arguments.push(format!(
        "--advertise-address={}",
        listen.node_address.unwrap_or("127.0.0.1")
    ));
    arguments.push(match listen.node_address {
        Some(_) => "--bind-address=0.0.0.0".to_owned(),
        None => "--bind-address=127.0.0.1".to_owned(),
    });
    if listen.node_address.is_none() {
        // The endpoint of the service `kubernetes` may not be a loopback address; nobody asks for it.
        arguments.push("--endpoint-reconciler-type=none".to_owned());
    }
    site.start(
        "kube-apiserver",
        &programs.path("kube-apiserver")?,
        &arguments,
    )
}

/// Starts the controllers, all or those that need no nodes. The API server must be ready.
pub(crate) fn start_controllers(
    site: &mut Site,
    programs: &Programs,
    certificates: &Certificates,
    kubeconfig: &Path,
    all: bool,
) -> Result<()> {
    let controllers = if all { "*" } else { CONTROLLERS_WITHOUT_NODES };
    let arguments = [
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--controllers={controllers}"),
        format!("--root-ca-file={}", certificates.authority.display()),
        format!(
            "--service-account-private-key-file={}",
            certificates.token_key.display()
        ),
        "--leader-elect=false".to_owned(),
        // Nobody asks for its metrics.
        "--secure-port=0".to_owned(),
    ];
    site.start(
        "kube-controller-manager",
        &programs.path("kube-controller-manager")?,
        &arguments,
    )
}

/// Waits until the API server answers that it is ready.
pub(crate) async fn ready(site: &Site, kubectl: &Kubectl) -> Result<()> {
    let ask = async || {
        kubectl
            .run(&["get", "--raw=/readyz", "--request-timeout=5s"])
            .await
    };
    site.until("the API server is ready", LIMIT, ask).await?;
    Ok(())
}

/// Waits until pods and tests can have tokens.
pub(crate) async fn controllers_ready(site: &Site, kubectl: &Kubectl) -> Result<()> {
    let ask = async || {
        kubectl
            .run(&["get", "serviceaccount", "default", "--namespace=default"])
            .await
    };
    site.until("the default service account is there", LIMIT, ask)
        .await?;
    Ok(())
}
