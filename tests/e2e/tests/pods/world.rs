//! A node with an operator that all tests share, and for each test a namespace with one nest.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use birb_nest_cluster::Cluster;
use birb_nest_e2e::{Installation, client, condition, eventually, install, nothing_forbidden};
use birb_nest_operator::api::BirbNest;
use http::{Request, header::CONTENT_TYPE};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, ResourceExt,
    api::{ListParams, Patch, PatchParams},
    client::Body,
};
use serde_json::{Value, json};
use tokio::sync::OnceCell;

/// The nest of each test.
pub const NEST: &str = "cache";

/// What all tests of this process share.
pub struct Shared {
    pub cluster: Cluster,
    installation: Installation,
}

/// The shared cluster with its operator, started by the first test that asks.
async fn shared() -> Result<&'static Shared> {
    static SHARED: OnceCell<Shared> = OnceCell::const_new();
    SHARED.get_or_try_init(start).await
}

async fn start() -> Result<Shared> {
    let archives = archives()?;
    let cluster = Cluster::pods().await?;
    cluster.load_images(&archives).await?;
    let installation = install(&cluster, true).await?;
    let shared = Shared {
        cluster,
        installation,
    };
    let namespace = format!("--namespace={}", shared.installation.namespace);
    let deployment = format!("deployment/{}", shared.installation.name);
    let ready = ["rollout", "status", &deployment, "--timeout=180s"];
    let waited = shared
        .cluster
        .kubectl(&[&ready[..], &[&namespace]].concat(), "")
        .await;
    if let Err(error) = waited {
        let namespace = &shared.installation.namespace;
        return Err(error.context(shared.cluster.diagnose(namespace).await));
    }
    Ok(shared)
}

/// All images, as `make images server-images` left them.
fn archives() -> Result<Vec<PathBuf>> {
    let test = std::env::current_exe()?;
    let target = test.ancestors().nth(3);
    let images = target.context("tests lie in target/debug/deps")?;
    let images = images.join("images");
    let files = [
        "birb-nest",
        "birb-nest-operator",
        "nats",
        "postgres",
        "redis",
    ];
    let archives = files.map(|file| images.join(file).with_extension("tar"));
    let missing = archives.iter().find(|archive| !archive.is_file());
    ensure!(
        missing.is_none(),
        "{} is missing: make images server-images (make test-e2e does that)",
        missing.unwrap_or(&images).display()
    );
    Ok(archives.to_vec())
}

/// A namespace of a test's own.
pub struct World {
    pub cluster: &'static Cluster,
    pub client: Client,
    pub namespace: String,
    installation: &'static Installation,
}

/// What the API answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    /// `Birb-Source`.
    pub source: String,
    pub body: String,
}

impl Answer {
    /// The value of the entry in it.
    pub fn value(&self) -> Option<Value> {
        let entry: Value = serde_json::from_str(&self.body).ok()?;
        entry.get("value").cloned()
    }
}

impl World {
    /// Runs `test` in a namespace called like it that takes only restricted pods. Fails with what a person would look at
    /// first, or if the operator lacked a right.
    pub async fn run(name: &str, test: impl AsyncFnOnce(&Self) -> Result<()>) -> Result<()> {
        let shared = shared().await?;
        let world = Self {
            cluster: &shared.cluster,
            client: client(&shared.cluster).await?,
            namespace: format!("birb-{name}-{}", std::process::id()),
            installation: &shared.installation,
        };
        let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": world.namespace, "labels": { "pod-security.kubernetes.io/enforce": "restricted" },
        } });
        world.apply(&namespace).await?;
        if let Err(error) = test(&world).await {
            let operator = &world.installation.namespace;
            let nests = world.kubectl(&["describe", "birbnests"]).await;
            return Err(error.context(format!(
                "{}\n{}\n{}",
                nests.unwrap_or_default(),
                world.cluster.diagnose(&world.namespace).await,
                world.cluster.diagnose(operator).await
            )));
        }
        nothing_forbidden(world.cluster, world.installation)?;
        world
            .kubectl(&["delete", "namespace", &world.namespace, "--wait=false"])
            .await?;
        Ok(())
    }

    /// `kubectl` in the namespace.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl_with(arguments, "").await
    }

    /// The same with something on its standard input.
    pub async fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let namespace = format!("--namespace={}", self.namespace);
        let all = [&[namespace.as_str()], arguments].concat();
        self.cluster.kubectl(&all, input).await
    }

    /// As a person does it.
    pub async fn apply(&self, object: &Value) -> Result<()> {
        let input = object.to_string();
        self.kubectl_with(&["apply", "--filename=-"], &input)
            .await
            .map(drop)
    }

    /// Makes the nest with this spec and waits until it is ready.
    pub async fn make_nest(&self, spec: &Value) -> Result<()> {
        let started = Instant::now();
        self.apply_nest(spec).await?;
        self.until_served().await?;
        eprintln!(
            "{}: ready after {:.1} s",
            self.namespace,
            started.elapsed().as_secs_f64()
        );
        Ok(())
    }

    /// Waits until the nest is ready and the Service leads to it: its addresses are somebody else's work, and come a moment later.
    pub async fn until_served(&self) -> Result<()> {
        self.until_condition("Ready", "Available", &[]).await?;
        eventually("the Service leads to the nest", || async {
            let answer = self.read("nobody-wrote-this").await?;
            Ok(match answer.status {
                404 => Ok(()),
                _ => Err(format!("{answer:?}")),
            })
        })
        .await
    }

    /// Makes the nest with this spec.
    pub async fn apply_nest(&self, spec: &Value) -> Result<()> {
        let nest = json!({ "apiVersion": "cache.birb.party/v1alpha1", "kind": "BirbNest",
                           "metadata": { "name": NEST }, "spec": spec });
        self.apply(&nest).await
    }

    /// Changes the nest's spec.
    pub async fn patch_nest(&self, spec: Value) -> Result<()> {
        let api: Api<BirbNest> = Api::namespaced(self.client.clone(), &self.namespace);
        let patch = Patch::Merge(json!({ "spec": spec }));
        api.patch(NEST, &PatchParams::default(), &patch).await?;
        Ok(())
    }

    /// Waits until a condition of the nest's newest generation has this reason, and a message with all of `words`.
    pub async fn until_condition(&self, type_: &str, reason: &str, words: &[&str]) -> Result<()> {
        let api: Api<BirbNest> = Api::namespaced(self.client.clone(), &self.namespace);
        let what = format!("{type_} of {}/{NEST} is {reason}", self.namespace);
        eventually(&what, || async {
            let nest = api.get(NEST).await?;
            Ok(match condition(&nest, type_) {
                Some(found)
                    if found.reason == reason
                        && words.iter().all(|words| found.message.contains(words)) =>
                {
                    Ok(())
                }
                _ => Err(format!("{:?}", nest.status.map(|status| status.conditions))),
            })
        })
        .await
    }

    /// Sets the number of workers, in mode Fixed.
    pub async fn scale_workers(&self, replicas: u32) -> Result<()> {
        let nest = format!("birbnest/{NEST}");
        let replicas = format!("--replicas={replicas}");
        self.kubectl(&["scale", &nest, &replicas]).await.map(drop)
    }

    /// Scales the workers to none, in mode Fixed, and waits until the last one has ended.
    pub async fn stop_workers(&self) -> Result<()> {
        self.scale_workers(0).await?;
        self.until_condition("Ready", "ScaledToZero", &[]).await?;
        let selector = format!(
            "--selector=app.kubernetes.io/instance={NEST},app.kubernetes.io/component=worker"
        );
        self.kubectl(&["wait", "--for=delete", "pods", &selector, "--timeout=90s"])
            .await
            .map(drop)
    }

    /// Asks the API for an entry through the Service, by way of the API server. What that says when no pod of the API can
    /// be reached is an answer with status 502 or 503.
    async fn request(&self, method: &str, key: &str, body: String) -> Result<Answer> {
        let uri = format!(
            "/api/v1/namespaces/{}/services/{NEST}:http/proxy/v1/cache/{key}",
            self.namespace
        );
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header(CONTENT_TYPE, "application/json")
            .body(Body::from(body.into_bytes()))?;
        let answer = self.client.send(request).await?;
        let source = answer.headers().get("birb-source");
        let source = source.and_then(|source| source.to_str().ok());
        Ok(Answer {
            status: answer.status().as_u16(),
            source: source.unwrap_or_default().to_owned(),
            body: String::from_utf8(answer.into_body().collect_bytes().await?.to_vec())?,
        })
    }

    /// Waits until the nest was told of this reason so often, by events.
    pub async fn until_told(&self, reason: &str, times: i32) -> Result<()> {
        birb_nest_e2e::told(&self.client, &self.namespace, NEST, reason, times).await
    }

    /// Reads an entry.
    pub async fn read(&self, key: &str) -> Result<Answer> {
        self.request("GET", key, String::new()).await
    }

    /// Writes an entry once; the answer tells whether it was taken.
    pub async fn write(&self, key: &str, value: &str) -> Result<Answer> {
        let body = json!({ "value": value }).to_string();
        self.request("PUT", key, body).await
    }

    /// Writes an entry, again and again until that is acknowledged.
    pub async fn write_acknowledged(&self, key: &str, value: &str) -> Result<()> {
        eventually(&format!("the write of {key} is acknowledged"), || async {
            let answer = self.write(key, value).await?;
            Ok(match answer.status {
                200 => Ok(()),
                _ => Err(format!("{answer:?}")),
            })
        })
        .await
    }

    /// Fails unless `key` reads as `value` now.
    pub async fn assert_reads(&self, key: &str, value: &str) -> Result<Answer> {
        let answer = self.read(key).await?;
        ensure!(
            answer.status == 200 && answer.value() == Some(value.into()),
            "{key} should read as {value:?}: {answer:?}"
        );
        Ok(answer)
    }

    /// Pods of a component that were not told to end.
    pub async fn pods(&self, component: &str) -> Result<Vec<Pod>> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let selector =
            format!("app.kubernetes.io/instance={NEST},app.kubernetes.io/component={component}");
        let mut pods = api
            .list(&ListParams::default().labels(&selector))
            .await?
            .items;
        pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        Ok(pods)
    }

    /// Kills the only pod of a component, as a node that goes down would, and waits until its successor is ready.
    pub async fn kill_pod(&self, component: &str) -> Result<()> {
        let pods = self.pods(component).await?;
        let [killed] = &pods[..] else {
            anyhow::bail!("{} pods of {component} instead of one", pods.len())
        };
        let name = killed.name_any();
        self.kubectl(&["delete", "pod", &name, "--grace-period=0", "--force"])
            .await?;
        eventually(&format!("{component} has another, ready pod"), || async {
            let pods = self.pods(component).await?;
            Ok(match &pods[..] {
                [pod] if pod.uid() != killed.uid() && is_ready(pod) => Ok(()),
                _ => Err(format!("{pods:?}")),
            })
        })
        .await
    }
}

fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().flat_map(|status| &status.conditions);
    conditions
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// The nats-server that birb-nest refuses, which `make test-e2e` builds.
pub fn old_nats() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../.dev/old/nats-server"
    ))
}
