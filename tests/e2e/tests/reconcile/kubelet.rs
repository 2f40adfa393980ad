//! The controllers of Kubernetes and its nodes, played: they write what those would.

use std::{fmt::Debug, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        batch::v1::Job,
        core::v1::{Pod, PodTemplateSpec},
    },
    serde::de::DeserializeOwned,
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ListParams, ObjectMeta, Patch, PatchParams, PostParams},
};
use serde::Serialize;
use serde_json::{Value, json};

/// What becomes of setup Jobs.
#[derive(Clone, Debug)]
pub enum SetupPlay {
    /// They complete.
    Succeeds,
    /// They stay as they are.
    Hangs,
    /// Their pods work for a while and end with this exit code and these last words; with 75 a next one would follow, with
    /// others they fail.
    Ends(i32, &'static str),
}

/// What the controllers of Kubernetes and its nodes do.
#[derive(Clone)]
pub struct Kubelet {
    /// With setup Jobs.
    pub setup: SetupPlay,
    /// Whether servers become ready.
    pub servers: bool,
    /// Whether pods of this Deployment become ready.
    pub works: Arc<dyn Fn(&Deployment) -> bool + Send + Sync>,
}

impl Default for Kubelet {
    fn default() -> Self {
        Self {
            setup: SetupPlay::Succeeds,
            servers: true,
            works: Arc::new(|_| true),
        }
    }
}

impl Kubelet {
    /// Does once what they would do by now.
    pub async fn act(&self, client: &Client, namespace: &str) -> Result<()> {
        let sets: Api<StatefulSet> = Api::namespaced(client.clone(), namespace);
        for set in sets.list(&ListParams::default()).await? {
            let ready = i32::from(self.servers);
            let status = json!({ "observedGeneration": set.metadata.generation, "replicas": 1, "readyReplicas": ready,
                                 "availableReplicas": ready, "updatedReplicas": 1, "currentReplicas": 1 });
            write(&sets, &set, serde_json::to_value(&set.status)?, status).await?;
        }
        let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
        for deployment in deployments.list(&ListParams::default()).await? {
            if (self.works)(&deployment) {
                let n = deployment
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.replicas)
                    .unwrap_or(1);
                let status = json!({ "observedGeneration": deployment.metadata.generation, "replicas": n, "readyReplicas": n,
                                     "availableReplicas": n, "updatedReplicas": n });
                write(
                    &deployments,
                    &deployment,
                    serde_json::to_value(&deployment.status)?,
                    status,
                )
                .await?;
            }
        }
        let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
        for job in jobs.list(&ListParams::default()).await? {
            self.run_setup(client, namespace, &jobs, &job).await?;
        }
        Ok(())
    }

    async fn run_setup(
        &self,
        client: &Client,
        namespace: &str,
        jobs: &Api<Job>,
        job: &Job,
    ) -> Result<()> {
        if job
            .status
            .as_ref()
            .is_some_and(|status| status.conditions.is_some())
        {
            return Ok(());
        }
        let now = jiff::Timestamp::now().to_string();
        let condition = |type_: &str| {
            json!({ "type": type_, "status": "True", "reason": "Played", "message": "as the test says",
                    "lastProbeTime": now, "lastTransitionTime": now })
        };
        match &self.setup {
            SetupPlay::Hangs => {}
            SetupPlay::Succeeds => {
                // Its pod may be at work already, as what was played before said.
                let began = job
                    .status
                    .as_ref()
                    .and_then(|status| status.start_time.clone());
                let began = began.map_or_else(|| now.clone(), |began| began.0.to_string());
                let status = json!({ "startTime": began, "completionTime": now, "active": 0, "succeeded": 1,
                                     "uncountedTerminatedPods": {},
                                     "conditions": [condition("SuccessCriteriaMet"), condition("Complete")] });
                write(jobs, job, json!(null), status).await?;
            }
            SetupPlay::Ends(code, words) => {
                let ended = run_pod(client, namespace, jobs, job, *code, words).await?;
                if ended && *code != 75 {
                    // When it began it said already, and that may not change.
                    let status = json!({ "active": 0, "failed": 1, "uncountedTerminatedPods": {},
                                         "conditions": [condition("FailureTarget"), condition("Failed")] });
                    write(jobs, job, json!(null), status).await?;
                }
            }
        }
        Ok(())
    }
}

/// How long a pod of a setup Job is at work before it ends: long enough for a pass to see that.
const AT_WORK: Duration = Duration::from_secs(2);

/// Lets a pod of `job` work for a while and then end; returns whether it has.
async fn run_pod(
    client: &Client,
    namespace: &str,
    jobs: &Api<Job>,
    job: &Job,
    code: i32,
    words: &str,
) -> Result<bool> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let name = format!(
        "{}-{}",
        job.name_any(),
        &job.uid().context("it is stored")?[..8]
    );
    let now = jiff::Timestamp::now();
    let state = match pods.get_opt(&name).await? {
        None => {
            start_pod(&pods, &name, job).await?;
            let status =
                json!({ "startTime": now.to_string(), "active": 1, "uncountedTerminatedPods": {} });
            write(jobs, job, json!(null), status).await?;
            (
                "Running",
                json!({ "running": { "startedAt": now.to_string() } }),
            )
        }
        Some(pod) if phase(&pod) == Some("Failed") => return Ok(true),
        Some(pod) => {
            let began = pod.metadata.creation_timestamp.context("it is stored")?.0;
            if now.duration_since(began).unsigned_abs() < AT_WORK {
                return Ok(false);
            }
            let message = json!({ "level": "ERROR", "message": words }).to_string();
            let end = json!({ "exitCode": code, "startedAt": began.to_string(), "finishedAt": now.to_string(),
                              "message": message });
            ("Failed", json!({ "terminated": end }))
        }
    };
    let (phase, state) = state;
    let status = json!({ "status": { "phase": phase, "containerStatuses": [{
        "name": "setup", "image": "it", "imageID": "it", "ready": phase == "Running", "restartCount": 0, "state": state,
    }] } });
    pods.patch_status(&name, &PatchParams::default(), &Patch::Merge(status))
        .await?;
    Ok(phase == "Failed")
}

fn phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

async fn start_pod(pods: &Api<Pod>, name: &str, job: &Job) -> Result<()> {
    let mut template = job.spec.clone().context("it has a spec")?.template;
    let labels = &mut template.metadata.get_or_insert_default().labels;
    labels.get_or_insert_default().insert(
        "batch.kubernetes.io/controller-uid".to_owned(),
        job.uid().unwrap_or_default(),
    );
    create_pod(pods, name, job, template).await
}

async fn create_pod<K: Resource<DynamicType = ()>>(
    pods: &Api<Pod>,
    name: &str,
    owner: &K,
    template: PodTemplateSpec,
) -> Result<()> {
    let pod = Pod {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: template.metadata.and_then(|metadata| metadata.labels),
            owner_references: owner.controller_owner_ref(&()).map(|owner| vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec,
        status: None,
    };
    pods.create(&PostParams::default(), &pod).await?;
    Ok(())
}

/// A pod without volumes that does not get to work, as its node says.
pub struct Waiting {
    pods: Api<Pod>,
    name: String,
    container: String,
}

impl Waiting {
    /// Makes the pod called `name` from `template`, as the controller of `owner` would.
    pub async fn start<K: Resource<DynamicType = ()>>(
        client: &Client,
        owner: &K,
        name: String,
        template: PodTemplateSpec,
    ) -> Result<Self> {
        let namespace = owner.namespace().context("it is stored")?;
        let containers = template.spec.iter().flat_map(|spec| &spec.containers);
        let waiting = Self {
            pods: Api::namespaced(client.clone(), &namespace),
            name,
            container: containers
                .map(|it| it.name.clone())
                .next()
                .context("it has one")?,
        };
        create_pod(&waiting.pods, &waiting.name, owner, template).await?;
        Ok(waiting)
    }

    /// What the node says of it from now on: its container waits.
    pub async fn because(&self, reason: &str, message: &str) -> Result<()> {
        let waiting = json!({ "waiting": { "reason": reason, "message": message } });
        self.say(waiting, json!({})).await
    }

    /// What the node says of it from now on: its container ends again and again, with this code and these last words.
    pub async fn crashes(&self, code: i32, words: &str) -> Result<()> {
        let waiting = json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off" } });
        let message = json!({ "level": "ERROR", "message": words }).to_string();
        let now = jiff::Timestamp::now().to_string();
        let end =
            json!({ "exitCode": code, "startedAt": now, "finishedAt": now, "message": message });
        self.say(waiting, json!({ "terminated": end })).await
    }

    async fn say(&self, state: Value, last: Value) -> Result<()> {
        let status = json!({ "status": { "phase": "Pending", "containerStatuses": [{
            "name": self.container, "image": "it", "imageID": "", "ready": false, "restartCount": 0, "state": state,
            "lastState": last,
        }] } });
        self.pods
            .patch_status(&self.name, &PatchParams::default(), &Patch::Merge(status))
            .await?;
        Ok(())
    }
}

/// Writes a status that is another one; an object that is gone or was changed meanwhile is left to the next round.
async fn write<K>(api: &Api<K>, object: &K, old: Value, new: Value) -> Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
{
    let same = new.as_object().is_some_and(|new| {
        new.iter()
            .all(|(name, value)| &old[name] == value || (value == 0 && old[name].is_null()))
    });
    if same {
        return Ok(());
    }
    let params = PatchParams::default();
    let seen = json!({ "resourceVersion": object.resource_version() });
    match api
        .patch_status(
            &object.name_any(),
            &params,
            &Patch::Merge(json!({ "metadata": seen, "status": new })),
        )
        .await
    {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() || status.is_conflict() => Ok(()),
        Err(error) => Err(error.into()),
    }
}
