//! The configuration files of what runs on the node.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use crate::certificates::Certificates;
use crate::control_groups;
use crate::node::ADDRESS;
use crate::programs::IMAGE;

/// containerd: our own image for pauses, Debian's CNI plugins.
pub(crate) fn containerd(root: &Path, socket: &Path) -> Result<PathBuf> {
    let (socket, cni) = (socket.display(), root.join("cni"));
    let config = format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]

[grpc]
address = "{socket}"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{IMAGE}"
# Else runc fails where this machine may not lower it.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{}"
"#,
        cni.display()
    );
    // Each pod is a point of its own: a bridge would answer pods directly, past the translation of service addresses.
    let network = json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            { "type": "ptp", "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": "10.88.0.0/24" }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    std::fs::create_dir_all(&cni)?;
    write(&cni, "10-pods.conflist", &network.to_string())?;
    write(root, "containerd.toml", &config)
}

/// The kubelet: everything on this machine is enough for it.
pub(crate) fn kubelet(root: &Path, socket: &Path, certificates: &Certificates) -> Result<PathBuf> {
    let resolv_conf = write(root, "resolv.conf", "")?;
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "authentication": {
            "anonymous": { "enabled": false },
            "webhook": { "enabled": true },
            "x509": { "clientCAFile": certificates.authority },
        },
        "authorization": { "mode": "Webhook" },
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{}", control_groups::name(root)),
        "clusterDNS": [ADDRESS],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": format!("unix://{}", socket.display()),
        // A developer's disk may be fuller than a node's ever should be.
        "evictionHard": { "memory.available": "1Mi", "nodefs.available": "1Mi", "nodefs.inodesFree": "1", "imagefs.available": "1Mi" },
        "imageGCHighThresholdPercent": 100,
        "failCgroupV1": false,
        "failSwapOn": false,
        // The names of the machine's network are not known here.
        "resolvConf": resolv_conf,
    });
    write(root, "kubelet.json", &config.to_string())
}

/// The cluster's names and no others.
pub(crate) fn dns(root: &Path, kubeconfig: &Path) -> Result<PathBuf> {
    let config = format!(
        ".:53 {{
  errors
  health 127.0.0.1:8080
  cache 5
  kubernetes cluster.local in-addr.arpa {{
    kubeconfig {}
  }}
}}
",
        kubeconfig.display()
    );
    write(root, "Corefile", &config)
}

fn write(dir: &Path, name: &str, config: &str) -> Result<PathBuf> {
    let file = dir.join(name);
    std::fs::write(&file, config).with_context(|| format!("failed to write {}", file.display()))?;
    Ok(file)
}
