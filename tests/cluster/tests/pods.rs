//! The pod ring: what runs on the node, and that nothing of it stays.

mod shared;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use birb_nest_cluster::Cluster;
use serde_json::{Value, json};
use shared::Harness;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

const NAMESPACE: &str = "--namespace=birb-nest-pods";
const LIMIT: Duration = Duration::from_secs(90);

#[tokio::test]
async fn node_is_ready_and_a_pod_with_a_bound_volume_runs() -> Result<()> {
    let cluster = Cluster::pods().await?;
    if !cluster.is_ours() {
        eprintln!("not checked: a cluster was given, which is not the harness' to prove");
        return Ok(());
    }
    match node_runs_pods(&cluster).await {
        Ok(()) => Ok(()),
        Err(error) => Err(error.context(cluster.diagnose("birb-nest-pods").await)),
    }
}

#[tokio::test]
async fn nothing_is_left_of_a_killed_cluster_with_a_node() -> Result<()> {
    let harness = Harness::start("killed-node", &[]).await?;
    let dir = harness.kill().await?;
    let name = dir.display().to_string();
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    ensure!(!mounts.contains(&name), "still mounted:\n{mounts}");
    shared::run(&dir, &["down"]).await?;
    assert!(!dir.exists());
    let group = format!("birb-nest{}", name.replace('/', "-"));
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup")?.flatten() {
        ensure!(
            !hierarchy.path().join(&group).exists(),
            "{group} is still in {hierarchy:?}"
        );
    }
    Ok(())
}

async fn node_runs_pods(cluster: &Cluster) -> Result<()> {
    create(
        cluster,
        &json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": "birb-nest-pods", "labels": { "pod-security.kubernetes.io/enforce": "restricted" },
    } }),
    )
    .await?;
    create(cluster, &json!({ "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": { "name": "data" },
        "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Mi" } } } })).await?;
    create(cluster, &json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "starts" },
        "spec": { "selector": { "app": "server" }, "ports": [{ "port": 80, "targetPort": 8080 }] } })).await?;
    start_server(cluster).await?;
    // Its name, the service's address, the way back to the pod itself.
    fetched(cluster, "http://starts/", "started\n").await?;

    // The volume outlives the pod.
    kubectl(cluster, &["delete", "pod", "server"]).await?;
    start_server(cluster).await?;
    fetched(
        cluster,
        "http://starts.birb-nest-pods.svc.cluster.local/",
        "started\nstarted\n",
    )
    .await?;
    let log = kubectl(cluster, &["logs", "server"]).await?;
    ensure!(log.contains("serving /data/starts"), "{log}");

    // What runs on the host is within the pods' reach.
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\nhost";
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let host = cluster.host_address().context("our own node has one")?;
    fetched(cluster, &format!("http://{host}:{port}/"), "host").await?;

    // The volume goes with its claim.
    let path = [
        "get",
        "persistentvolumes",
        "--output=jsonpath={.items[0].spec.local.path}",
    ];
    let path = kubectl(cluster, &path).await?;
    ensure!(
        std::path::Path::new(&path).join("starts").is_file(),
        "{path} holds no file"
    );
    kubectl(
        cluster,
        &["delete", "pod/server", "persistentvolumeclaim/data"],
    )
    .await?;
    kubectl(
        cluster,
        &[
            "wait",
            "--for=delete",
            "persistentvolumes",
            "--all",
            "--timeout=60s",
        ],
    )
    .await?;
    ensure!(
        !std::path::Path::new(&path).exists(),
        "{path} is still there"
    );
    Ok(())
}

async fn start_server(cluster: &Cluster) -> Result<()> {
    create(cluster, &json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "server", "labels": { "app": "server" } },
        "spec": {
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": 999, "runAsGroup": 999, "fsGroup": 999,
                "seccompProfile": { "type": "RuntimeDefault" },
            },
            "containers": [{
                "name": "server", "image": "birb-nest.test/pod:1", "args": ["serve", "/data"],
                "securityContext": {
                    "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": { "drop": ["ALL"] },
                },
                "readinessProbe": { "httpGet": { "path": "/", "port": 8080 }, "periodSeconds": 1 },
                "resources": { "requests": { "memory": "16Mi" }, "limits": { "memory": "64Mi" } },
                "volumeMounts": [{ "name": "data", "mountPath": "/data" }],
            }],
            "volumes": [{ "name": "data", "persistentVolumeClaim": { "claimName": "data" } }],
        },
    })).await?;
    kubectl(
        cluster,
        &[
            "wait",
            "--for=condition=Ready",
            "pod/server",
            "--timeout=90s",
        ],
    )
    .await?;
    Ok(())
}

/// Waits until the pod gets `expected` from `url`: service addresses follow their pods with a delay.
async fn fetched(cluster: &Cluster, url: &str, expected: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = kubectl(cluster, &["exec", "server", "--", "/pod", "fetch", url]).await;
        match answer {
            Ok(text) if text == expected => return Ok(()),
            answer => ensure!(
                Instant::now() < deadline,
                "{url} gave {answer:?}, not {expected:?}"
            ),
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn create(cluster: &Cluster, object: &Value) -> Result<()> {
    let namespaced = object["kind"] != "Namespace";
    let arguments = ["create", "--filename=-", NAMESPACE];
    cluster
        .kubectl(
            if namespaced {
                &arguments
            } else {
                &arguments[..2]
            },
            &object.to_string(),
        )
        .await?;
    Ok(())
}

async fn kubectl(cluster: &Cluster, arguments: &[&str]) -> Result<String> {
    // Before the arguments: what stands behind `--` is not for kubectl.
    cluster
        .kubectl(&[&[NAMESPACE], arguments].concat(), "")
        .await
}
