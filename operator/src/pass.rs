//! One pass over a nest: look, make it a little more what it should be, say how it is.
//!
//! The order is: how long volumes and passwords live, credentials, what can stand before anything runs, servers ready,
//! setup done, API, workers, and only when all of that is rolled out what is no longer wanted. Each step looks at the world
//! anew and does nothing when it is as it should be, so a pass may end or be repeated anywhere.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        batch::v1::Job,
        core::v1::{PersistentVolumeClaim, Pod},
    },
    jiff::Timestamp,
    serde::de::DeserializeOwned,
};
use kube::{
    Api, Resource, ResourceExt,
    api::{DynamicObject, ListParams},
};

use crate::{
    api::{BirbNest, MigrationState, Reason},
    apply::{self, Outcome},
    context::Context,
    credentials,
    error::{Error, Result},
    findings::{Down, Findings, Problem},
    monitoring,
    observe::{self, Rollout, Setup},
    pod_templates, prune,
    render::{self, Child, Inputs, Kind, Names},
    replicas, report,
    resolve::{Nest, resolve},
    retention, scaling,
    status::setup_words,
    suspend,
};

/// How soon to look again while setup is at work, at first and later: what it says when it fails changes no object that is
/// watched.
const SETUP_POLL: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

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
    /// When to look again if nothing happens before.
    again: Duration,
}

/// What a pass came to.
pub struct Ended {
    /// When to make the next one if nothing happens before.
    pub again: Duration,
    /// Whether something was in the way that a person must mend.
    pub is_blocked: bool,
    /// Reason of `Ready`, of a closed set.
    pub readiness: String,
}

/// Makes a pass over `stored`, which was just read.
///
/// # Errors
/// What may go better the next time.
pub async fn pass(context: &Context, stored: &BirbNest) -> Result<Ended> {
    let uid = stored.uid().unwrap_or_default();
    context.memo.begin(&uid, Instant::now());
    let turn = context.upgrades.turn_of(stored, Instant::now());
    let mut pass = Pass {
        context,
        nest: resolve(stored, &context.config.images, &turn.release),
        stored,
        findings: Findings {
            moves_later_to: turn.later,
            ..Findings::default()
        },
        again: Duration::MAX,
    };
    pass.look().await?;
    if let Err(error) = pass.advance().await {
        // Whatever it was that may not be, read, scaled or deleted: a person must know.
        let Some(refusal) = apply::refusal(&error) else {
            return Err(error);
        };
        pass.findings.problems.push(refusal.into());
    }
    pass.explain().await?;
    let readiness = report::report(&mut pass).await?;
    let resync = context.memo.finish(&uid, context.resync(), Instant::now());
    let is_blocked = !pass.findings.problems.is_empty();
    let later = pass.again.min(resync);
    Ok(Ended {
        again: pass.findings.pause(later, context.config.retry),
        is_blocked,
        readiness,
    })
}

impl Pass<'_> {
    /// Whether nothing may be written but the status, and what concerns the nest's end.
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
        let api = self.deployment(&names.api()).await?;
        let worker = self.deployment(&names.worker()).await?;
        self.findings.api = api.as_ref().map(Rollout::of);
        self.findings.worker = worker.as_ref().map(Rollout::of);
        Ok(())
    }

    /// The nest's Deployment called `name`; somebody else's is none.
    ///
    /// # Errors
    /// As of any request.
    pub async fn deployment(&self, name: &str) -> Result<Option<Deployment>> {
        let found = self
            .of::<Deployment>()
            .get_opt(name)
            .await
            .map_err(|source| child_error("look at", Kind::Deployment, name, source))?;
        let is_ours = |found: &Deployment| {
            apply::foreign(&self.nest, Kind::Deployment, &found.metadata).is_none()
        };
        Ok(found.filter(is_ours))
    }

    async fn advance(&mut self) -> Result<()> {
        suspend::step(self).await?;
        retention::ensure(self).await?;
        credentials::ensure(self).await?;
        let mut inputs = credentials::read(self).await?;
        if !self.findings.problems.is_empty() {
            return Ok(());
        }
        scaling::step(self, &inputs).await?;
        let operator_namespace = &self.context.config.election.lease_namespace;
        let mut foundation = render::network_policies(&self.nest, operator_namespace);
        foundation.extend(render::foundation(&self.nest, &inputs));
        let mut down = Vec::new();
        for child in &foundation {
            let applied = self.apply(child).await?;
            if child.kind == Kind::StatefulSet
                && !applied.is_some_and(|set| observe::is_up(&typed::<StatefulSet>(set)))
            {
                down.push(Down {
                    name: child.name.clone(),
                    why: None,
                });
            }
        }
        if !self.findings.problems.is_empty() {
            return Ok(());
        }
        self.findings.servers_down = Some(down);
        for volume in render::volumes(&self.nest) {
            if let Some(uid) = self.volume_uid(&volume).await? {
                inputs.insert_volume(uid);
            }
        }
        let setup = render::setup(&self.nest, &inputs);
        self.set_up(&setup).await?;
        if self.findings.setup != Setup::Complete {
            return Ok(());
        }
        let deployments = self.roll_out(&inputs).await?;
        let mut beside = replicas::surround(self).await?;
        beside.extend(monitoring::ensure(self).await?);
        if self.findings.rolled_out && !self.is_paused() {
            let wanted: Vec<&Child> = foundation
                .iter()
                .chain([&setup])
                .chain(&deployments)
                .chain(&beside)
                .collect();
            prune::prune(self, &wanted).await?;
        }
        Ok(())
    }

    async fn volume_uid(&self, name: &str) -> Result<Option<String>> {
        let claim = self
            .of::<PersistentVolumeClaim>()
            .get_metadata_opt(name)
            .await
            .map_err(|source| Error::Nest {
                what: "look at a volume",
                source,
            })?;
        Ok(claim.and_then(|claim| claim.metadata.uid))
    }

    /// Runs the setup Job once all servers are ready, unless it has run.
    ///
    /// Its name stands for what matters of it. The rest of a Job cannot be changed and need not be, so one that is there is
    /// never applied again.
    async fn set_up(&mut self, setup: &Child) -> Result<()> {
        self.findings.setup_job = Some(setup.name.clone());
        let found = self
            .of::<Job>()
            .get_opt(&setup.name)
            .await
            .map_err(|source| child_error("look at", Kind::Job, &setup.name, source))?;
        let job = match found {
            Some(job) => {
                if let Some(problem) = apply::foreign(&self.nest, Kind::Job, &job.metadata) {
                    self.findings.problems.push(problem);
                    return Ok(());
                }
                job
            }
            // Somebody has tidied up; what it did is done.
            None if self.was_set_up_by(&setup.name) => {
                self.findings.setup = Setup::Complete;
                return Ok(());
            }
            None if self.is_paused() => return Ok(()),
            None if self.findings.any_server_down() => {
                self.findings.setup = Setup::Waiting;
                return Ok(());
            }
            None => match self.apply(setup).await? {
                Some(job) => typed(job),
                None => return Ok(()),
            },
        };
        self.judge_setup(&job).await
    }

    fn was_set_up_by(&self, job: &str) -> bool {
        let migration = self
            .stored
            .status
            .as_ref()
            .and_then(|status| status.migration.as_ref());
        migration.is_some_and(|migration| {
            migration.job == job && migration.state == MigrationState::Complete
        })
    }

    async fn judge_setup(&mut self, job: &Job) -> Result<()> {
        let mut state = Setup::of(job, &[]);
        if state != Setup::Complete {
            // By uid: pods of a Job of this name that was deleted do not speak for it.
            let selector = format!(
                "batch.kubernetes.io/controller-uid={}",
                job.uid().unwrap_or_default()
            );
            let pods = self.pods(&selector).await?;
            state = Setup::of(job, &pods);
            self.findings.setup_why = observe::why_not(&pods, Timestamp::now());
            self.again = self.setup_poll(job, &state);
            if matches!(state, Setup::Retrying(_)) {
                self.hasten(job, &pods).await?;
            }
            // A Job that was just begun anew has not said anything yet: what the last one said still stands.
            // So it does while the new one's pod runs: whether that gets any further only its end tells.
            if state == Setup::Running
                && let Some(status) = &self.stored.status
                && let Some(words) = setup_words(status, &job.name_any())
            {
                state = Setup::Retrying(words);
            }
        }
        self.findings.setup = state;
        Ok(())
    }

    fn setup_poll(&self, job: &Job, state: &Setup) -> Duration {
        let (first, last) = SETUP_POLL;
        match state {
            Setup::Retrying(_) => self
                .context
                .config
                .setup_retry
                .clamp(Duration::from_secs(1), first * 3),
            Setup::Running => {
                let began = job.metadata.creation_timestamp.as_ref();
                let age = began.map_or(0, |began| {
                    Timestamp::now().as_second() - began.0.as_second()
                });
                Duration::from_secs(u64::try_from(age / 10).unwrap_or(0)).clamp(first, last)
            }
            _ => self.again,
        }
    }

    /// The nest's pods that `selector` chooses, those that end included.
    ///
    /// # Errors
    /// As of any request.
    pub async fn pods(&self, selector: &str) -> Result<Vec<Pod>> {
        let found = self
            .of::<Pod>()
            .list(&ListParams::default().labels(selector))
            .await;
        Ok(found
            .map_err(|source| Error::Nest {
                what: "list its pods",
                source,
            })?
            .items)
    }

    /// Kubernetes pauses up to ten minutes between the pods of a Job that fail. A server that came back should not wait
    /// that long, so a Job that has paused for a while is replaced (docs/adr/0013-setup-job.md).
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
        apply::delete(self.context, &self.nest, Kind::Job, &job.metadata).await
    }

    /// A release reaches the API first, then workers; at the beginning, and for everything else, both at once.
    async fn roll_out(&mut self, inputs: &Inputs) -> Result<[Child; 2]> {
        let n_apis = replicas::of_api(&self.nest, self.findings.api.is_none());
        let n_workers = replicas::of_workers(self, self.findings.worker.is_none());
        let mut deployments = [
            render::api(&self.nest, inputs, n_apis),
            render::worker(&self.nest, inputs, n_workers),
        ];
        let seen = [&self.findings.api, &self.findings.worker];
        for ((child, said), seen) in deployments.iter_mut().zip([n_apis, n_workers]).zip(seen) {
            // Without a number it must be the Deployment that was seen: one that is made anew would have one pod. If that
            // one is gone meanwhile this is a conflict, and the next pass makes another, with its number.
            if said.is_none() {
                let uid = seen.as_ref().and_then(|rollout| rollout.uid.clone());
                child.object["metadata"]["uid"] = uid.into();
            }
        }
        if !pod_templates::fit(self, &mut deployments).await? {
            return Ok(deployments);
        }
        let [api, worker] = &deployments;
        if n_apis.is_none()
            && let Some(live) = self.deployment(&api.name).await?
        {
            replicas::hand_over(self, &live, n_apis).await?;
        }
        let Some(applied) = self.apply(api).await? else {
            return Ok(deployments);
        };
        let api = Rollout::of(&typed(applied));
        let live = self.deployment(&worker.name).await?;
        let is_release = live
            .as_ref()
            .is_some_and(|live| image_of(live) != Some(&self.nest.image));
        let is_api_complete = api.complete;
        self.findings.api = Some(api);
        if is_release && !is_api_complete {
            return Ok(deployments);
        }
        if let Some(live) = &live {
            replicas::hand_over(self, live, n_workers).await?;
        }
        if let Some(applied) = self.apply(worker).await? {
            let worker = Rollout::of(&typed(applied));
            self.findings.rolled_out =
                is_api_complete && worker.complete && self.findings.problems.is_empty();
            self.findings.worker = Some(worker);
        }
        Ok(deployments)
    }

    /// Finds out why pods that should be there are not, from what the nodes and the scheduler say of them.
    async fn explain(&mut self) -> Result<()> {
        if self.findings.is_short() {
            // What nodes and scheduler say changes no object that is watched.
            self.again = self.again.min(self.context.config.retry);
        }
        let now = Timestamp::now();
        for component in ["api", "worker"] {
            let rollout = |findings: &Findings| match component {
                "api" => findings.api.clone(),
                _ => findings.worker.clone(),
            };
            if rollout(&self.findings).is_none_or(|rollout| rollout.complete) {
                continue;
            }
            let pods = self
                .pods(&render::selector_text(&self.nest, component))
                .await?;
            let why = observe::why_not(&pods, now);
            let rollout = match component {
                "api" => self.findings.api.as_mut(),
                _ => self.findings.worker.as_mut(),
            };
            if let (Some(rollout), Some(why)) = (rollout, why) {
                rollout.why = Some(why);
            }
        }
        let down = self.findings.servers_down.take();
        let Some(mut down) = down else { return Ok(()) };
        for server in &mut down {
            let component = server.name.rsplit('-').next().unwrap_or_default();
            let pods = self
                .pods(&render::selector_text(&self.nest, component))
                .await?;
            server.why = observe::why_not(&pods, now);
        }
        self.findings.servers_down = Some(down);
        Ok(())
    }

    /// Makes `child` what it should be and returns it; nothing if it cannot be, which is then among the problems. While
    /// the nest is paused, only looks.
    ///
    /// # Errors
    /// What may go better the next time.
    pub async fn apply(&mut self, child: &Child) -> Result<Option<DynamicObject>> {
        let outcome = if self.is_paused() {
            let found = apply::objects(&self.context.client, &self.nest, child.kind)
                .get_opt(&child.name)
                .await
                .map_err(|source| child_error("look at", child.kind, &child.name, source))?;
            let Some(found) = found else { return Ok(None) };
            match apply::foreign(&self.nest, child.kind, &found.metadata) {
                None => Outcome::Applied(Box::new(found)),
                Some(problem) => Outcome::Blocked(problem),
            }
        } else {
            apply::apply(self.context, &self.nest, child).await?
        };
        match outcome {
            Outcome::Applied(object) => Ok(Some(*object)),
            Outcome::Blocked(problem) => {
                self.findings.problems.push(problem);
                Ok(None)
            }
        }
    }

    /// The next pass is not to be later than in this time.
    pub fn look_again(&mut self, within: Duration) {
        self.again = self.again.min(within);
    }

    /// Notes what is in the way.
    pub fn problem(&mut self, reason: Reason, message: impl Into<String>) {
        self.findings.problems.push(Problem::new(reason, message));
    }
}

fn image_of(deployment: &Deployment) -> Option<&String> {
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.as_ref()
}

/// `object` as its type.
pub fn typed<K: DeserializeOwned>(object: DynamicObject) -> K {
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
