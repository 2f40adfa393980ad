//! The node: namespaces of its own, and in them all that runs pods.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tokio::process::Command;

use crate::kubectl::write_kubeconfig;
use crate::site::{Site, search_path};
use crate::{configs, control_groups, control_plane};

/// The node's one name and address. Every cluster has the same: none sees another.
pub(crate) const NAME: &str = "node1";
pub(crate) const ADDRESS: &str = "10.89.0.1";
/// Connections to it come out at 127.0.0.1 of the host.
pub(crate) const HOST_ADDRESS: &str = "10.89.0.2";
const TUNNEL_PORT: &str = "15001";
pub(crate) const API_SERVER_PORT: u16 = 6443;

const SCRIPT: &str = include_str!("node.sh");

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
        bail!("a cluster that runs pods needs root: run `make test-e2e` as root");
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
pub(crate) async fn enter(site: &mut Site) -> Result<()> {
    for fixed in ["/run", "/var/lib", "/var/log"] {
        if site.root.starts_with(fixed) {
            bail!(
                "the node hides {fixed} behind its own: choose another directory than {}",
                site.root.display()
            );
        }
    }
    let script = site.file("node.sh");
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
    arguments.extend([script, site.root.clone(), site.programs.path("pod")?]);
    arguments.extend([ADDRESS, HOST_ADDRESS, TUNNEL_PORT].map(Into::into));
    site.start_on_host("node", Path::new("unshare"), &arguments)?;
    let pid = async || {
        let log = site.log("node")?;
        let mut lines = log.lines();
        let said = lines.find_map(|line| line.strip_prefix("node "));
        let pid = said.context("it has not said its process id")?;
        pid.parse().with_context(|| format!("it said {pid:?}"))
    };
    site.node = Some(site.until("the node has its namespaces", pid).await?);
    control_groups::make(&site.root)
}

/// Starts the tunnels between the host and the node; `port` of the host leads to the API server.
pub(crate) fn start_tunnels(site: &mut Site, port: u16) -> Result<()> {
    let tunnel = site.programs.path("tunnel")?;
    let [api, host] = ["api.sock", "host.sock"].map(|name| site.file(name).display().to_string());
    site.start("tunnel-to-api-server", &tunnel, ["out", &api])?;
    let (from, to) = (format!("127.0.0.1:{port}"), API_SERVER_PORT.to_string());
    site.start_on_host("tunnel-from-host", &tunnel, ["in", &from, &api, &to])?;
    site.start_on_host("tunnel-to-host", &tunnel, ["out", &host])?;
    let from = format!("0.0.0.0:{TUNNEL_PORT}");
    site.start("tunnel-from-pods", &tunnel, ["in", &from, &host])
}

/// Starts the container runtime and waits until it has our image.
pub(crate) async fn start_runtime(site: &mut Site) -> Result<()> {
    let socket = containerd_socket(&site.root);
    let config = configs::containerd(&site.root, &socket)?;
    site.start(
        "containerd",
        Path::new("containerd"),
        [Path::new("--config"), &config],
    )?;
    let import = async || load_image(&socket, &site.programs.image()).await;
    site.until("containerd takes an image", import).await
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

/// Starts controllers, scheduler, kubelet, service addresses, names and volumes. The API server must be ready.
pub(crate) fn start(site: &mut Site) -> Result<()> {
    let server = format!("https://127.0.0.1:{API_SERVER_PORT}");
    let [admin, own] = ["admin.kubeconfig", "kubelet.kubeconfig"].map(|name| site.file(name));
    let certificates = &site.certificates;
    write_kubeconfig(
        &admin,
        &server,
        &certificates.authority,
        &certificates.admin,
    )?;
    write_kubeconfig(
        &own,
        &server,
        &certificates.authority,
        &certificates.kubelet,
    )?;
    let socket = containerd_socket(&site.root);
    let kubelet = configs::kubelet(&site.root, &socket, certificates)?;
    let corefile = configs::dns(&site.root, &admin)?;
    let volumes = site.file("volumes");
    std::fs::create_dir_all(&volumes)?;

    control_plane::start_controllers(site, &admin, true)?;
    let flag = |name: &str, file: &Path| format!("--{name}={}", file.display());
    let as_admin = flag("kubeconfig", &admin);
    let hostname = format!("--hostname-override={NAME}");
    start_ours(
        site,
        "kube-scheduler",
        [&as_admin, "--leader-elect=false", "--secure-port=0"],
    )?;
    start_ours(
        site,
        "kubelet",
        [
            &flag("kubeconfig", &own),
            &flag("config", &kubelet),
            &format!("--node-ip={ADDRESS}"),
            &hostname,
        ],
    )?;
    start_ours(
        site,
        "kube-proxy",
        [
            as_admin.as_str(),
            "--proxy-mode=nftables",
            "--cluster-cidr=10.88.0.0/16",
            // The machine's connection tracking is not the node's to size.
            "--conntrack-max-per-core=0",
            &hostname,
        ],
    )?;
    start_ours(site, "coredns", [Path::new("-conf"), &corefile])?;
    start_ours(site, "provisioner", [&admin, &volumes])
}

/// Waits until pods can run, have names and get volumes.
pub(crate) async fn ready(site: &Site) -> Result<()> {
    let node = format!("node/{NAME}");
    let node_ready = ["wait", "--for=condition=Ready", &node, "--timeout=30s"];
    site.until_kubectl("the node is ready", &node_ready).await?;
    let storage_class = ["get", "storageclass", "directory"];
    site.until_kubectl("the storage class is there", &storage_class)
        .await?;
    // CoreDNS says its name once it knows the cluster's services and listens.
    let listens = async || {
        let listens = site.log("coredns")?.contains("CoreDNS-");
        listens.then_some(()).context("it does not listen")
    };
    site.until("CoreDNS listens", listens).await
}

fn start_ours<A: AsRef<OsStr>>(
    site: &mut Site,
    name: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Result<()> {
    let program = site.programs.path(name)?;
    site.start(name, &program, arguments)
}
