//! A control plane and an operator that all tests share, a namespace for each test, and a kubelet that is played.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{
    Installation, Operator, Proxy, Request, client, condition, eventually, install,
    nothing_forbidden, requests_with,
};
use birb_nest_operator::{
    api::BirbNest,
    render::{INSTANCE_LABEL, Kind},
};
use birb_nest_stack::Root;
use futures::StreamExt;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        core::v1::{Namespace, PersistentVolumeClaim, Secret, ServiceAccount},
    },
    serde::de::DeserializeOwned,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{sync::OnceCell, task::JoinHandle};

use crate::{kubelet::Kubelet, monitoring::install_kinds};

/// A control plane and its operator.
pub struct Shared {
    pub cluster: Cluster,
    pub installation: Installation,
    pub dir: PathBuf,
    pub operator: Operator,
    _root: Root,
}

/// The shared control plane with its operator, started by the first test that asks.
pub async fn shared() -> Result<Arc<Shared>> {
    static SHARED: OnceCell<Arc<Shared>> = OnceCell::const_new();
    let shared = SHARED.get_or_try_init(async || {
        let started = Shared::start("operators", async |cluster, installation, dir| {
            Operator::start(cluster, installation, dir, "operator").await
        });
        anyhow::Ok(Arc::new(started.await?))
    });
    Ok(Arc::clone(shared.await?))
}

impl Shared {
    async fn start(
        name: &str,
        operator: impl AsyncFnOnce(&Cluster, &Installation, &Path) -> Result<Operator>,
    ) -> Result<Self> {
        let root = Root::temporary(name, |_| Ok(()))?;
        // Of our own even where a cluster was given: no controller may do what the tests play.
        let dir = root.path().join("cluster");
        let cluster = Cluster::kept(&dir, Extent::ControlPlane).await?;
        install_kinds(&cluster).await?;
        let installation = install(&cluster, false).await?;
        let dir = root.path().to_owned();
        let operator = operator(&cluster, &installation, &dir).await?;
        Ok(Self {
            cluster,
            installation,
            dir,
            operator,
            _root: root,
        })
    }

    /// A control plane of a test's own, whose operator has these flags.
    pub async fn with_flags(name: &str, flags: &[&str]) -> Result<Arc<Self>> {
        let started = Self::start(name, async |cluster, installation, dir| {
            Operator::start_with(cluster, installation, dir, "operator", flags).await
        });
        Ok(Arc::new(started.await?))
    }

    /// The same with an operator that reaches it through a proxy.
    pub async fn behind_proxy(name: &str, flags: &[&str]) -> Result<(Arc<Self>, Proxy)> {
        let mut proxy = None;
        let started = Self::start(name, async |cluster, installation, dir| {
            let proxy = proxy.insert(Proxy::start(cluster).await?);
            let name = "operator";
            Operator::start_through(proxy, cluster, installation, dir, name, flags).await
        });
        let shared = Arc::new(started.await?);
        Ok((shared, proxy.context("it was started")?))
    }
}

/// A namespace of a test's own.
pub struct World {
    pub shared: Arc<Shared>,
    pub client: Client,
    pub namespace: String,
    kubelet: Option<JoinHandle<Result<()>>>,
}

impl World {
    /// A new namespace, in which nothing is played yet.
    pub async fn new() -> Result<Self> {
        Self::on(shared().await?).await
    }

    /// The same in a control plane of a test's own.
    pub async fn on(shared: Arc<Shared>) -> Result<Self> {
        static N_WORLDS: AtomicU32 = AtomicU32::new(0);
        let client = client(&shared.cluster).await?;
        let number = N_WORLDS.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("birb-{}-{number}", std::process::id());
        let object = Namespace {
            metadata: ObjectMeta {
                name: Some(namespace.clone()),
                labels: Some(
                    [(
                        "pod-security.kubernetes.io/enforce".to_owned(),
                        "restricted".to_owned(),
                    )]
                    .into(),
                ),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        };
        Api::all(client.clone())
            .create(&PostParams::default(), &object)
            .await?;
        if !shared.cluster.collects_garbage() {
            // The controller that makes it for pods that name none is not there either.
            let account = ServiceAccount {
                metadata: ObjectMeta {
                    name: Some("default".to_owned()),
                    ..ObjectMeta::default()
                },
                ..ServiceAccount::default()
            };
            Api::namespaced(client.clone(), &namespace)
                .create(&PostParams::default(), &account)
                .await?;
        }
        Ok(Self {
            shared,
            client,
            namespace,
            kubelet: None,
        })
    }

    /// The same with a kubelet under which everything works.
    pub async fn where_all_works() -> Result<Self> {
        let mut world = Self::new().await?;
        world.play(Kubelet::default());
        Ok(world)
    }

    /// The same for a test that deletes what owns others; nothing, and says so, if nobody there deletes what is owned.
    pub async fn where_garbage_is_collected() -> Result<Option<Self>> {
        if !shared().await?.cluster.collects_garbage() {
            eprintln!(
                "not checked: garbage collection, which the programs of KUBEBUILDER_ASSETS do not include"
            );
            return Ok(None);
        }
        Self::where_all_works().await.map(Some)
    }

    /// From now on controllers and nodes do as `kubelet` says.
    pub fn play(&mut self, kubelet: Kubelet) {
        let (client, namespace) = (self.client.clone(), self.namespace.clone());
        let player = tokio::spawn(async move {
            loop {
                // Told at once: whoever waits for what it does not do any more finds out late, and not why.
                let acted = kubelet.act(&client, &namespace).await;
                acted.inspect_err(|error| eprintln!("{namespace}: no kubelet: {error:#}"))?;
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        });
        if let Some(before) = self.kubelet.replace(player) {
            before.abort();
        }
    }

    /// Objects of type `K`.
    pub fn of<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Creates a nest with this spec in YAML.
    pub async fn create(&self, name: &str, spec: &str) -> Result<BirbNest> {
        let nest = json!({
            "apiVersion": "cache.birb.party/v1alpha1",
            "kind": "BirbNest",
            "metadata": { "name": name },
            "spec": serde_yaml::from_str::<Value>(spec)?,
        });
        let api: Api<DynamicObject> = self.dynamic_nests();
        let created = api
            .create(&PostParams::default(), &serde_json::from_value(nest)?)
            .await?;
        Ok(serde_json::from_value(serde_json::to_value(created)?)?)
    }

    /// Nests as plain JSON: what the schema adds or drops is seen.
    pub fn dynamic_nests(&self) -> Api<DynamicObject> {
        let resource = kube::core::ApiResource::erase::<BirbNest>(&());
        Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
    }

    /// Lays `spec`, in YAML, into that of the nest.
    pub async fn change(&self, name: &str, spec: &str) -> Result<BirbNest> {
        let patch = json!({ "spec": serde_yaml::from_str::<Value>(spec)? });
        let params = PatchParams::default();
        Ok(self
            .of::<BirbNest>()
            .patch(name, &params, &Patch::Merge(patch))
            .await?)
    }

    /// Waits until `Ready` of the nest's newest generation has this status and reason; returns its message.
    pub async fn until_ready(&self, name: &str, status: &str, reason: &str) -> Result<String> {
        self.until_condition(name, "Ready", status, reason).await
    }

    /// Waits until a condition of the nest's newest generation has this status and reason; returns its message.
    pub async fn until_condition(
        &self,
        name: &str,
        type_: &str,
        status: &str,
        reason: &str,
    ) -> Result<String> {
        let what = format!("{type_} of nest {name} is {status} {reason}");
        let result = eventually(&what, || async {
            let nest = self.of::<BirbNest>().get(name).await?;
            Ok(match condition(&nest, type_) {
                Some(found) if found.status == status && found.reason == reason => {
                    Ok(found.message.clone())
                }
                _ => Err(format!("{:?}", nest.status.map(|status| status.conditions))),
            })
        })
        .await;
        result.with_context(|| self.operator_log())
    }

    fn operator_log(&self) -> String {
        let log = self.shared.operator.process.log().unwrap_or_default();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| line.contains(&self.namespace))
            .collect();
        let ended = self.shared.operator.process.exited();
        let ended = ended.ok().flatten().map_or(String::new(), |status| {
            format!("the operator has ended ({status}); ")
        });
        format!(
            "{ended}the operator's last lines about it:\n{}",
            lines[lines.len().saturating_sub(15)..].join("\n")
        )
    }

    /// Waits until `K` called `name` is there and `fits`.
    pub async fn until<K>(&self, name: &str, fits: impl Fn(&K) -> bool) -> Result<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + Serialize
            + std::fmt::Debug,
    {
        let what = format!("{} {name} is as expected", K::kind(&()));
        eventually(&what, || async {
            Ok(match self.of::<K>().get_opt(name).await? {
                Some(found) if fits(&found) => Ok(found),
                other => Err(serde_json::to_string(&other)?),
            })
        })
        .await
        .with_context(|| self.operator_log())
    }

    /// Waits until `K` called `name` is gone.
    pub async fn until_gone<K>(&self, name: &str) -> Result<()>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
            + Clone
            + DeserializeOwned
            + std::fmt::Debug,
    {
        eventually(&format!("{} {name} is gone", K::kind(&())), || async {
            Ok(match self.of::<K>().get_opt(name).await? {
                None => Ok(()),
                Some(_) => Err("it is still there".to_owned()),
            })
        })
        .await
        .with_context(|| self.operator_log())
    }

    /// The nest's objects of all kinds: kind, name and resource version.
    pub async fn objects(&self, nest: &str) -> Result<Vec<(Kind, String, Option<String>)>> {
        let params = ListParams::default().labels(&format!("{INSTANCE_LABEL}={nest}"));
        let mut all = Vec::new();
        for kind in Kind::ALL {
            let resource = kind.api_resource();
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
            let found = api.list(&params).await?;
            all.extend(
                found
                    .into_iter()
                    .map(|object| (kind, object.name_any(), object.resource_version())),
            );
        }
        Ok(all)
    }

    /// Waits until the nest was told of this reason once, by an event.
    pub async fn until_told(&self, nest: &str, reason: &str) -> Result<()> {
        birb_nest_e2e::told(&self.client, &self.namespace, nest, reason, 1).await
    }

    /// Requests of the operator in the namespace so far.
    pub fn requests(&self) -> Result<Vec<Request>> {
        let (cluster, installation) = (&self.shared.cluster, &self.shared.installation);
        let mut all = requests_with(cluster, installation, &self.namespace)?;
        all.retain(|request| request.namespace == self.namespace);
        Ok(all)
    }

    /// Passes over nests of the namespace so far: each begins with the nest itself.
    pub fn n_passes(&self) -> Result<usize> {
        let reads = self.requests()?.into_iter().filter(|request| {
            (request.verb.as_str(), request.resource.as_str()) == ("get", "birbnests")
        });
        Ok(reads.count())
    }

    /// Makes a Secret.
    pub async fn secret(&self, name: &str, data: &[(&str, &str)]) -> Result<()> {
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                ..ObjectMeta::default()
            },
            string_data: Some(
                data.iter()
                    .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
            ),
            ..Secret::default()
        };
        self.of().create(&PostParams::default(), &secret).await?;
        Ok(())
    }

    /// Makes a volume claim.
    pub async fn volume(&self, name: &str) -> Result<()> {
        let claim = json!({
            "metadata": { "name": name },
            "spec": { "accessModes": ["ReadWriteOnce"], "resources": { "requests": { "storage": "1Gi" } } },
        });
        let claim: PersistentVolumeClaim = serde_json::from_value(claim)?;
        self.of().create(&PostParams::default(), &claim).await?;
        Ok(())
    }

    /// `kubectl` in the namespace.
    pub async fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let namespace = format!("--namespace={}", self.namespace);
        let mut all = vec![namespace.as_str()];
        all.extend(arguments);
        self.shared.cluster.kubectl(&all, input).await
    }

    /// Ends the test: nothing was forbidden to the operator, and the namespace goes.
    pub async fn finish(mut self) -> Result<()> {
        if let Some(kubelet) = self.kubelet.take() {
            kubelet.abort();
            if let Err(error) = kubelet.await
                && !error.is_cancelled()
            {
                return Err(error.into());
            }
        }
        nothing_forbidden(&self.shared.cluster, &self.shared.installation)?;
        Api::<Namespace>::all(self.client.clone())
            .delete(&self.namespace, &DeleteParams::default())
            .await?;
        Ok(())
    }
}

/// Numbers of replicas that a Deployment has had.
pub struct Seen {
    client: Client,
    namespace: String,
    name: String,
    watch: JoinHandle<Vec<i32>>,
}

impl World {
    /// Notes the numbers of replicas that the Deployment called `name` has from now on.
    pub async fn watch_replicas(&self, name: &str) -> Result<Seen> {
        let api: Api<Deployment> = self.of();
        let config =
            kube::runtime::watcher::Config::default().fields(&format!("metadata.name={name}"));
        let mut events = Box::pin(kube::runtime::watcher(api, config));
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let watch = tokio::spawn(async move {
            let (mut numbers, mut begun) = (Vec::new(), Some(begun));
            while let Some(Ok(event)) = events.next().await {
                use kube::runtime::watcher::Event::{Apply, Delete, Init, InitApply, InitDone};
                match event {
                    Apply(deployment) | InitApply(deployment) => {
                        if deployment.annotations().contains_key(LAST) {
                            return numbers;
                        }
                        let number = deployment.spec.and_then(|spec| spec.replicas).unwrap_or(-1);
                        if numbers.last() != Some(&number) {
                            numbers.push(number);
                        }
                    }
                    InitDone => {
                        begun.take().map(|begun| begun.send(()));
                    }
                    Init | Delete(_) => {}
                }
            }
            numbers
        });
        has_begun.await?;
        Ok(Seen {
            client: self.client.clone(),
            namespace: self.namespace.clone(),
            name: name.to_owned(),
            watch,
        })
    }
}

/// Tells a watch that nothing follows which matters.
const LAST: &str = "birb-nest-test/last";

impl Seen {
    /// All numbers up to now, each once in a row.
    pub async fn finish(self) -> Vec<i32> {
        let api: Api<Deployment> = Api::namespaced(self.client, &self.namespace);
        let mark = json!({ "metadata": { "annotations": { LAST: "true" } } });
        api.patch(&self.name, &PatchParams::default(), &Patch::Merge(mark))
            .await
            .expect("it is there");
        self.watch.await.expect("the watch did not panic")
    }
}
