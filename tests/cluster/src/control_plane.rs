//! etcd, the API server, the controllers.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use crate::site::Site;

/// What deletes dependents and namespaces, puts roles together, and gives pods and tests their tokens; the rest would need
/// nodes.
const CONTROLLERS_WITHOUT_NODES: &str = "garbage-collector-controller,namespace-controller,\
    clusterrole-aggregation-controller,\
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
pub(crate) fn start(site: &mut Site, listen: Listen) -> Result<()> {
    let etcd = format!("http://127.0.0.1:{}", listen.etcd);
    start_etcd(site, &etcd, listen.etcd_peer)?;

    let policy = json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{ "level": "Metadata" }],
    });
    let policy_file = site.file("audit-policy.json");
    std::fs::write(&policy_file, policy.to_string()).context("failed to write the audit policy")?;

    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let certificates = &site.certificates;
    let (identity, admin) = (&certificates.api_server, &certificates.admin);
    let (bind, advertise) = match listen.node_address {
        Some(address) => ("0.0.0.0", address),
        None => ("127.0.0.1", "127.0.0.1"),
    };
    let mut arguments = vec![
        format!("--etcd-servers={etcd}"),
        format!("--bind-address={bind}"),
        format!("--advertise-address={advertise}"),
        format!("--secure-port={}", listen.api_server),
        file("cert-dir", &site.file("kube-apiserver")),
        file("tls-cert-file", &identity.certificate),
        file("tls-private-key-file", &identity.key),
        file("client-ca-file", &certificates.authority),
        file("service-account-key-file", &certificates.token_public_key),
        file("service-account-signing-key-file", &certificates.token_key),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement"
            .to_owned(),
        "--allow-privileged=true".to_owned(),
        file("kubelet-client-certificate", &admin.certificate),
        file("kubelet-client-key", &admin.key),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        file("audit-policy-file", &policy_file),
        file("audit-log-path", &audit_log(&site.root)),
        // In megabytes: at 100 it would begin another file, and tests that read only this one would miss what came before.
        "--audit-log-maxsize=10000".to_owned(),
    ];
    if listen.node_address.is_none() {
        // The endpoint of the service `kubernetes` may not be a loopback address; nobody asks for it.
        arguments.push("--endpoint-reconciler-type=none".to_owned());
    }
    let program = site.programs.path("kube-apiserver")?;
    site.start("kube-apiserver", &program, &arguments)
}

/// Starts the controllers, all or those that need no nodes. The API server must be ready.
pub(crate) fn start_controllers(site: &mut Site, kubeconfig: &Path, all: bool) -> Result<()> {
    let controllers = if all { "*" } else { CONTROLLERS_WITHOUT_NODES };
    let certificates = &site.certificates;
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
    let program = site.programs.path("kube-controller-manager")?;
    site.start("kube-controller-manager", &program, &arguments)
}

/// Waits until the API server answers that it is ready.
pub(crate) async fn ready(site: &Site) -> Result<()> {
    let ask = ["get", "--raw=/readyz", "--request-timeout=5s"];
    site.until_kubectl("the API server is ready", &ask).await
}

/// Waits until pods and tests can have tokens.
pub(crate) async fn controllers_ready(site: &Site) -> Result<()> {
    let ask = ["get", "serviceaccount", "default", "--namespace=default"];
    site.until_kubectl("the default service account is there", &ask)
        .await
}

fn start_etcd(site: &mut Site, url: &str, peer_port: u16) -> Result<()> {
    let peer = format!("http://127.0.0.1:{peer_port}");
    let arguments = [
        format!("--data-dir={}", site.file("etcd").display()),
        format!("--listen-client-urls={url}"),
        format!("--advertise-client-urls={url}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // Its data does not outlive the machine anyway.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    let program = site.programs.path("etcd")?;
    site.start("etcd", &program, &arguments)
}
