//! One pass over a nest: look, make it a little more what it should be, say how it is.
//!
//! The order is: credentials, what can stand before anything runs, servers ready, setup done, API, workers, and only when
//! all of that is rolled out what is no longer wanted. Each step looks at the world anew and does nothing when it is as it
//! should be, so a pass may end or be repeated anywhere.

use std::time::Duration;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        batch::v1::Job,
        core::v1::{Pod, Secret},
    },
    jiff::Timestamp,
    serde::de::DeserializeOwned,
};
use kube::{
    Api, Resource, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams},
    runtime::events::{Event, EventType},
};
use serde_json::json;

use crate::{
    api::{BirbNest, BirbNestStatus, ConditionType, Reason},
    apply::{self, Outcome},
    context::Context,
    credentials,
    error::{Error, Result},
    metrics::METRICS,
    observe::{self, Rollout, Setup},
    prune,
    render::{self, CONTROLLER, Child, Inputs, Kind, Names},
    resolve::{Nest, resolve},
    status::{Findings, Problem, setup_words, status},
};

/// How soon to look again while setup is at work: what it says when it fails changes no object that is watched.
const SETUP_POLL: Duration = Duration::from_secs(5);

/// Release of this operator, and of nests that do not name one.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");

/// One pass.
pub struct Pass<'a> {
    /// What the operator has.
    pub context: &'a Context,
    /// The nest as it is stored.
    pub stored: &'a BirbNest,
    /// What it means.
    pub nest: Nest,
    /// What was found so far.
    pub findings: Findings,
}

/// Makes a pass over `stored`, which was just read. Returns when to make the next one if nothing happens before.
///
/// # Errors
/// What may go better the next time.
pub async fn pass(context: &Context, stored: &BirbNest) -> Result<Duration> {
    let mut pass = Pass {
        context,
        nest: resolve(stored, &context.config.images, RELEASE),
        stored,
        findings: Findings::default(),
    };
    pass.look().await?;
    pass.advance().await?;
    pass.report().await?;
    if !pass.findings.problems.is_empty() {
        // What is in the way may be somebody else's, whose changes nobody tells us of.
        return Ok(context.config.retry);
    }
    Ok(match pass.findings.setup {
        Setup::Running | Setup::Retrying(_) => SETUP_POLL,
        _ => context.resync(),
    })
}

impl Pass<'_> {
    /// Whether nothing may be written but the status.
    pub fn is_paused(&self) -> bool {
        self.stored.spec.paused
    }

    /// Objects of type `K` in the nest's namespace.
    pub fn of<K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>>(
        &self,
    ) -> Api<K> {
        Api::namespaced(self.context.client.clone(), &self.nest.namespace)
    }

    /// Reads the Deployments, whatever else may be in the way.
    async fn look(&mut self) -> Result<()> {
        let names = Names(&self.nest.name);
        let (api, worker) = (names.api(), names.worker());
        let api = self.deployment(&api).await?;
        let worker = self.deployment(&worker).await?;
        self.findings.api = api.as_ref().map(Rollout::of);
        self.findings.worker = worker.as_ref().map(Rollout::of);
        Ok(())
    }

    async fn deployment(&self, name: &str) -> Result<Option<Deployment>> {
        self.of::<Deployment>()
            .get_opt(name)
            .await
            .map_err(|source| child_error("look at", Kind::Deployment, name, source))
    }

    async fn advance(&mut self) -> Result<()> {
        credentials::ensure(self).await?;
        let inputs = credentials::read(self).await?;
        if !self.findings.problems.is_empty() {
            return Ok(());
        }
        let foundation = render::foundation(&self.nest, &inputs);
        for child in &foundation {
            let applied = self.apply(child).await?;
            if child.kind == Kind::StatefulSet
                && !applied.is_some_and(|set| observe::is_up(&typed::<StatefulSet>(set)))
            {
                self.findings.servers_down.push(child.name.clone());
            }
        }
        if !self.findings.problems.is_empty() {
            return Ok(());
        }
        let setup = render::setup(&self.nest, &inputs);
        self.findings.setup_job = Some(setup.name.clone());
        self.set_up(&setup).await?;
        if self.findings.setup != Setup::Complete {
            return Ok(());
        }
        let deployments = self.roll_out(&inputs).await?;
        if self.findings.rolled_out && !self.is_paused() {
            let wanted: Vec<&Child> = foundation
                .iter()
                .chain([&setup])
                .chain(&deployments)
                .collect();
            prune::prune(self, &wanted).await?;
        }
        Ok(())
    }

    /// Runs the setup Job once all servers are ready, unless it has run.
    async fn set_up(&mut self, setup: &Child) -> Result<()> {
        let found = self
            .of::<Job>()
            .get_opt(&setup.name)
            .await
            .map_err(|source| child_error("look at", Kind::Job, &setup.name, source))?;
        if found.is_none() && !self.findings.servers_down.is_empty() {
            return Ok(());
        }
        let Some(job) = self.apply(setup).await? else {
            return Ok(());
        };
        let job: Job = typed(job);
        let mut state = Setup::of(&job, &[]);
        if state != Setup::Complete {
            let selector = format!("batch.kubernetes.io/job-name={}", setup.name);
            let pods = self
                .of::<Pod>()
                .list(&ListParams::default().labels(&selector))
                .await
                .map_err(|source| child_error("list the pods of", Kind::Job, &setup.name, source))?
                .items;
            state = Setup::of(&job, &pods);
            if matches!(state, Setup::Retrying(_)) {
                self.hasten(&job, &pods).await?;
            }
        }
        // A Job that was just begun anew has not said anything yet: what the last one said still stands.
        if state == Setup::Running
            && let Some(words) = self
                .stored
                .status
                .as_ref()
                .and_then(|status| setup_words(status, &setup.name))
        {
            state = Setup::Retrying(words);
        }
        self.findings.setup = state;
        Ok(())
    }

    /// Kubernetes pauses up to ten minutes between the pods of a Job that fail. A server that came back should not wait
    /// that long, so a Job that has paused for a while is replaced.
    async fn hasten(&self, job: &Job, pods: &[Pod]) -> Result<()> {
        let paused = observe::last_finished(pods).is_some_and(|ended| {
            let since = Timestamp::now().as_second().saturating_sub(ended);
            Duration::from_secs(u64::try_from(since).unwrap_or(0))
                >= self.context.config.setup_retry
        });
        if self.is_paused()
            || !paused
            || observe::any_active(pods)
            || job.metadata.deletion_timestamp.is_some()
        {
            return Ok(());
        }
        apply::delete(&self.context.client, &self.nest, Kind::Job, &job.metadata).await
    }

    /// API first, then workers; both at once when there are none yet.
    async fn roll_out(&mut self, inputs: &Inputs) -> Result<[Child; 2]> {
        let api = render::api(&self.nest, inputs);
        let worker = render::worker(&self.nest, inputs);
        if let Some(applied) = self.apply(&api).await? {
            self.findings.api = Some(Rollout::of(&typed(applied)));
        }
        let is_complete =
            |rollout: &Option<Rollout>| rollout.as_ref().is_some_and(|rollout| rollout.complete);
        if self.findings.worker.is_none() || is_complete(&self.findings.api) {
            self.hand_over_replicas().await?;
            if let Some(applied) = self.apply(&worker).await? {
                self.findings.worker = Some(Rollout::of(&typed(applied)));
                self.findings.rolled_out = is_complete(&self.findings.api)
                    && is_complete(&self.findings.worker)
                    && self.findings.problems.is_empty();
            }
        }
        Ok([api, worker])
    }

    /// Before the operator stops saying how many workers there are, another manager says the number there is now.
    async fn hand_over_replicas(&self) -> Result<()> {
        if self.nest.worker_replicas.is_some() || self.is_paused() {
            return Ok(());
        }
        let Some(found) = self.deployment(&Names(&self.nest.name).worker()).await? else {
            return Ok(());
        };
        let replicas = found.spec.as_ref().and_then(|spec| spec.replicas);
        match replicas {
            Some(replicas) if says_replicas(&found) => {
                let child = render::worker_replicas(&self.nest, replicas);
                apply::hand_over_replicas(&self.context.client, &self.nest, &child).await
            }
            _ => Ok(()),
        }
    }

    /// Makes `child` what it should be and returns it; nothing if it cannot be, which is then among the problems. While
    /// the nest is paused, only looks.
    async fn apply(&mut self, child: &Child) -> Result<Option<DynamicObject>> {
        let client = &self.context.client;
        if self.is_paused() {
            return apply::objects(client, &self.nest, child.kind)
                .get_opt(&child.name)
                .await
                .map_err(|source| child_error("look at", child.kind, &child.name, source));
        }
        match apply::apply(client, &self.nest, child).await? {
            Outcome::Applied(object) => Ok(Some(*object)),
            Outcome::Blocked(problem) => {
                self.findings.problems.push(problem);
                Ok(None)
            }
        }
    }

    /// Writes the status if it is another one, and tells of it in an event if readiness is.
    async fn report(&self) -> Result<()> {
        let new = status(self.stored, &self.nest, &self.findings, Timestamp::now());
        if self.stored.status.as_ref() == Some(&new) {
            return Ok(());
        }
        let body = json!({
            "apiVersion": BirbNest::api_version(&()),
            "kind": BirbNest::kind(&()),
            "metadata": { "name": self.nest.name, "namespace": self.nest.namespace },
            "status": new,
        });
        self.of::<BirbNest>()
            .patch_status(
                &self.nest.name,
                &PatchParams::apply(CONTROLLER).force(),
                &Patch::Apply(&body),
            )
            .await
            .map_err(|source| Error::Nest {
                what: "write the status",
                source,
            })?;
        self.tell(&new).await;
        Ok(())
    }

    async fn tell(&self, new: &BirbNestStatus) {
        let readiness = |status: &BirbNestStatus| {
            let ready = status
                .conditions
                .iter()
                .find(|condition| condition.type_ == ConditionType::Ready.as_str())?;
            Some((
                ready.status.clone(),
                ready.reason.clone(),
                ready.message.clone(),
            ))
        };
        let before = self
            .stored
            .status
            .as_ref()
            .and_then(readiness)
            .map(|(status, reason, _)| (status, reason));
        let Some((status, reason, message)) = readiness(new) else {
            return;
        };
        if before == Some((status.clone(), reason.clone())) {
            return;
        }
        tracing::info!(
            nest.name = self.nest.name,
            nest.namespace = self.nest.namespace,
            "nest {}/{} is {}: {reason} {message}",
            self.nest.namespace,
            self.nest.name,
            if status == "True" {
                "ready"
            } else {
                "not ready"
            },
        );
        let is_warning = !self.findings.problems.is_empty()
            || [Reason::MigrationFailed, Reason::ServerUnreachable]
                .iter()
                .any(|bad| bad.as_str() == reason);
        let event = Event {
            type_: if is_warning {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason,
            note: Some(message.chars().take(1024).collect()),
            action: "Reconcile".to_owned(),
            secondary: None,
        };
        let published = self
            .context
            .recorder
            .publish(&event, &self.stored.object_ref(&()))
            .await;
        METRICS.event(published.is_ok());
        if let Err(error) = published {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "an event of nest {}/{} was not taken",
                self.nest.namespace,
                self.nest.name
            );
        }
    }

    /// Notes what is in the way.
    pub fn problem(&mut self, reason: Reason, message: impl Into<String>) {
        self.findings.problems.push(Problem {
            reason,
            message: message.into(),
        });
    }

    /// Adds or takes away the owner of a generated Secret, which lives as long as its volume.
    ///
    /// # Errors
    /// As of any request.
    pub async fn set_owner(&self, name: &str, owned: bool) -> Result<()> {
        let owners: Vec<_> = owned
            .then(|| render::owner_reference(&self.nest))
            .into_iter()
            .collect();
        self.of::<Secret>()
            .patch(
                name,
                &PatchParams::default(),
                &Patch::Merge(json!({ "metadata": { "ownerReferences": owners } })),
            )
            .await
            .map(|_| ())
            .map_err(|source| child_error("set the owner of", Kind::Secret, name, source))
    }
}

/// Whether the operator's main manager says how many replicas `found` has.
fn says_replicas(found: &Deployment) -> bool {
    found.managed_fields().iter().any(|entry| {
        entry.manager.as_deref() == Some(CONTROLLER)
            && entry.operation.as_deref() == Some("Apply")
            && entry
                .fields_v1
                .as_ref()
                .is_some_and(|fields| fields.0.pointer("/f:spec/f:replicas").is_some())
    })
}

fn typed<K: DeserializeOwned>(object: DynamicObject) -> K {
    let value = serde_json::to_value(object).expect("it came as JSON");
    serde_json::from_value(value).expect("the API server answers with the kind that was asked for")
}

/// An error about an object of the nest.
pub fn child_error(verb: &'static str, kind: Kind, name: &str, source: kube::Error) -> Error {
    Error::Child {
        verb,
        kind,
        name: name.to_owned(),
        source,
    }
}
