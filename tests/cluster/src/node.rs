//! The node: namespaces of its own, and in them all that runs pods.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use crate::certificates::Certificates;
use crate::kubectl::{Kubectl, write_kubeconfig};
use crate::programs::Programs;
use crate::site::{Site, search_path};
use crate::{configs, control_groups};

/// The node's one name and address. Every cluster has the same: none sees another.
pub(crate) const NAME: &str = "node1";
pub(crate) const ADDRESS: &str = "10.89.0.1";
/// Connections to it come out at 127.0.0.1 of the host.
pub(crate) const HOST_ADDRESS: &str = "10.89.0.2";
const TUNNEL_PORT: &str = "15001";
pub(crate) const API_SERVER_PORT: u16 = 6443;

const SCRIPT: &str = include_str!("node.sh");

const LIMIT: Duration = Duration::from_secs(120);

/// What the node needs from the host; the packages that Debian has it in.
const NEEDED: [(&str, &str); 7] = [
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("/usr/lib/cni/ptp", "containernetworking-plugins"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
];

/// Says what is missing, if something is.
pub(crate) fn require() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!(
            "a cluster that runs pods needs root: run `make test-e2e` as root, or set BIRBNEST_TEST_KUBECONFIG to the kubeconfig of a cluster of your own"
        );
    }
    let dirs: Vec<PathBuf> = std::env::split_paths(&search_path()).collect();
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(program, _)| !dirs.iter().any(|dir| dir.join(program).is_file()))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        bail!(
            "a cluster that runs pods needs the packages {}: run `scripts/init.sh --cluster`",
            missing.join(" ")
        );
    }
    Ok(())
}

pub(crate) fn containerd_socket(root: &Path) -> PathBuf {
    root.join("containerd.sock")
}

/// Makes the namespaces; what is started from now on runs inside.
pub(crate) async fn enter(site: &mut Site, programs: &Programs) -> Result<()> {
    let root = site.root.clone();
    for fixed in ["/run", "/var/lib", "/var/log"] {
        if root.starts_with(fixed) {
            bail!(
                "the node hides {fixed} behind its own: choose another directory than {}",
                root.display()
            );
        }
    }
    let script = root.join("node.sh");
    std::fs::write(&script, SCRIPT)
        .with_context(|| format!("failed to write {}", script.display()))?;
    let namespaces = [
        "--fork",
        "--kill-child",
        "--pid",
        "--net",
        "--mount",
        "/bin/sh",
    ];
    let mut arguments: Vec<PathBuf> = namespaces.map(Into::into).to_vec();
    arguments.extend([script, root.clone(), programs.path("pod")?]);
    arguments.extend([ADDRESS, HOST_ADDRESS, TUNNEL_PORT].map(Into::into));
    site.start_on_host("node", Path::new("unshare"), &arguments)?;
    let pid = async || {
        let log = site.log("node")?;
        let said = log.lines().find_map(|line| line.strip_prefix("node "));
        said.context("it has not said its process id")?
            .parse()
            .context("it said no number")
    };
    let pid = site
        .until("the node has its namespaces", LIMIT, pid)
        .await?;
    site.node = Some(pid);
    control_groups::make(&root)
}

/// Starts the tunnels between the host and the node; `port` of the host leads to the API server.
pub(crate) fn start_tunnels(site: &mut Site, programs: &Programs, port: u16) -> Result<()> {
    let tunnel = programs.path("tunnel")?;
    let socket = |name: &str| site.root.join(name).display().to_string();
    let (api, host) = (socket("api.sock"), socket("host.sock"));
    site.start("tunnel-to-api-server", &tunnel, ["out", &api])?;
    let (from, to) = (format!("127.0.0.1:{port}"), API_SERVER_PORT.to_string());
    site.start_on_host("tunnel-from-host", &tunnel, ["in", &from, &api, &to])?;
    site.start_on_host("tunnel-to-host", &tunnel, ["out", &host])?;
    let from = format!("0.0.0.0:{TUNNEL_PORT}");
    site.start("tunnel-from-pods", &tunnel, ["in", &from, &host])
}

/// Starts the container runtime and waits until it has our image.
pub(crate) async fn start_runtime(site: &mut Site, programs: &Programs) -> Result<()> {
    let socket = containerd_socket(&site.root);
    configs::containerd(&site.root, &socket)?;
    let config = site.root.join("containerd.toml");
    site.start(
        "containerd",
        Path::new("containerd"),
        [Path::new("--config"), &config],
    )?;
    let import = async || load_image(&socket, &programs.image()).await;
    site.until("containerd takes an image", LIMIT, import).await
}

/// Imports an image archive, as `docker save` and `buildah push` write them.
pub(crate) async fn load_image(socket: &Path, archive: &Path) -> Result<()> {
    let output = Command::new("ctr")
        .arg("--address")
        .arg(socket)
        .args(["--namespace", "k8s.io", "images", "import"])
        .arg(archive)
        .kill_on_drop(true)
        .output()
        .await
        .context("failed to run ctr, which comes with containerd")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("failed to load {}: {}", archive.display(), said.trim_end());
    }
    Ok(())
}

/// Starts scheduler, kubelet, service addresses, names and volumes. The API server must be ready.
pub(crate) fn start(
    site: &mut Site,
    programs: &Programs,
    certificates: &Certificates,
) -> Result<()> {
    let root = site.root.clone();
    let server = format!("https://127.0.0.1:{API_SERVER_PORT}");
    let admin = inside_kubeconfig(&root);
    let own = root.join("kubelet.kubeconfig");
    write_kubeconfig(
        &own,
        &server,
        &certificates.authority,
        &certificates.kubelet,
    )?;
    configs::kubelet(&root, &containerd_socket(&root), certificates)?;
    configs::dns(&root, &admin)?;
    let volumes = root.join("volumes");
    std::fs::create_dir_all(&volumes)?;

    let flag = |name: &str, file: &Path| format!("--{name}={}", file.display());
    let admin_flag = flag("kubeconfig", &admin);
    let arguments = [
        admin_flag.as_str(),
        "--leader-elect=false",
        "--secure-port=0",
    ];
    site.start(
        "kube-scheduler",
        &programs.path("kube-scheduler")?,
        arguments,
    )?;
    let arguments = [
        flag("kubeconfig", &own),
        flag("config", &root.join("kubelet.json")),
        format!("--node-ip={ADDRESS}"),
        format!("--hostname-override={NAME}"),
    ];
    site.start("kubelet", &programs.path("kubelet")?, &arguments)?;
    let arguments = [
        admin_flag,
        "--proxy-mode=nftables".to_owned(),
        "--cluster-cidr=10.88.0.0/16".to_owned(),
        // The machine's connection tracking is not the node's to size.
        "--conntrack-max-per-core=0".to_owned(),
        format!("--hostname-override={NAME}"),
    ];
    site.start("kube-proxy", &programs.path("kube-proxy")?, &arguments)?;
    site.start(
        "coredns",
        &programs.path("coredns")?,
        [Path::new("-conf"), &root.join("Corefile")],
    )?;
    site.start(
        "provisioner",
        &programs.path("provisioner")?,
        [&admin, &volumes],
    )
}

/// Waits until pods can run, have names and get volumes.
pub(crate) async fn ready(site: &Site, kubectl: &Kubectl) -> Result<()> {
    let node = format!("node/{NAME}");
    let node_ready = ["wait", "--for=condition=Ready", &node, "--timeout=30s"];
    let ask = async || kubectl.run(&node_ready).await;
    site.until("the node is ready", LIMIT, ask).await?;
    let ask = async || kubectl.run(&["get", "storageclass", "directory"]).await;
    site.until("the storage class is there", LIMIT, ask).await?;
    // CoreDNS says its name once it knows the cluster's services and listens.
    let listens = async || {
        site.log("coredns")?
            .contains("CoreDNS-")
            .then_some(())
            .context("it does not listen")
    };
    site.until("CoreDNS listens", LIMIT, listens).await
}

/// The administrator's, for use inside the node.
pub(crate) fn inside_kubeconfig(root: &Path) -> PathBuf {
    root.join("inside.kubeconfig")
}
