//! What Kubernetes says of a nest's children, as far as conditions need it.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentCondition, StatefulSet},
        batch::v1::Job,
        core::v1::{ContainerStatus, Pod, PodCondition, PodStatus},
    },
    jiff::{SignedDuration, Timestamp},
};
use serde_json::Value;

use crate::render::SETUP_CONTAINER;

/// A Deployment, as far as its controller has got with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rollout {
    /// Which Deployment it is.
    pub uid: Option<String>,
    /// Replicas the spec asks for.
    pub desired: i32,
    /// Replicas there are.
    pub replicas: i32,
    /// Replicas that are ready, old ones included.
    pub ready: i32,
    /// All replicas are there, of the newest template, and available; no old one is left.
    pub complete: bool,
    /// It was complete, and no change is being made to it: what is missing now has been lost.
    pub settled: bool,
    /// Why it does not get on, if its controller has given up waiting.
    pub stuck: Option<String>,
    /// Why pods are missing, as far as somebody says so.
    pub why: Option<String>,
}

impl Rollout {
    /// Of `deployment`. What its controller has not seen yet does not count as done.
    pub fn of(deployment: &Deployment) -> Self {
        let status = deployment.status.clone().unwrap_or_default();
        let desired = deployment
            .spec
            .as_ref()
            .and_then(|spec| spec.replicas)
            .unwrap_or(1);
        let seen = status.observed_generation >= deployment.metadata.generation;
        let replicas = status.replicas.unwrap_or(0);
        let updated = status.updated_replicas.unwrap_or(0);
        let conditions = status.conditions.unwrap_or_default();
        let of_reason = |reason: &str| {
            let is = |condition: &&DeploymentCondition| condition.reason.as_deref() == Some(reason);
            conditions.iter().find(is).filter(|_| seen)
        };
        let message =
            |condition: &DeploymentCondition| condition.message.clone().unwrap_or_default();
        Self {
            uid: deployment.metadata.uid.clone(),
            desired,
            replicas,
            ready: status.ready_replicas.unwrap_or(0),
            complete: seen
                && updated == desired
                && status.available_replicas.unwrap_or(0) == desired
                && replicas == desired,
            settled: of_reason("NewReplicaSetAvailable").is_some() && updated == desired,
            stuck: of_reason("ProgressDeadlineExceeded").map(message),
            // A quota, for example.
            why: conditions
                .iter()
                .find(|condition| condition.type_ == "ReplicaFailure" && condition.status == "True")
                .map(message),
        }
    }

    /// Ready and desired replicas, for people.
    pub fn summary(&self) -> String {
        format!("{}/{}", self.ready, self.desired)
    }
}

/// Whether all pods of a managed server are ready and of the newest template.
pub fn is_up(set: &StatefulSet) -> bool {
    let desired = set
        .spec
        .as_ref()
        .and_then(|spec| spec.replicas)
        .unwrap_or(1);
    set.status.as_ref().is_some_and(|status| {
        status.observed_generation >= set.metadata.generation
            && status.ready_replicas.unwrap_or(0) >= desired
            && status.updated_replicas.unwrap_or(0) >= desired
    })
}

/// How far the setup Job is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Setup {
    /// Not looked at: something else is in the way.
    #[default]
    Unknown,
    /// It waits for what comes before it.
    Waiting,
    /// At work.
    Running,
    /// It could not reach a server, or log in; it tries again. Its last words.
    Retrying(String),
    /// Done.
    Complete,
    /// A person must change something. Its last words.
    Failed(String),
}

/// Exit code of the data plane: a server cannot be reached or logged in to now.
const TRY_AGAIN: i32 = 75;

impl Setup {
    /// Of `job` and its pods, of which the newest speaks.
    pub fn of(job: &Job, pods: &[Pod]) -> Self {
        let status = job.status.clone().unwrap_or_default();
        let has = |type_: &str| {
            status
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == type_ && condition.status == "True")
        };
        if has("Complete") {
            return Self::Complete;
        }
        let last = last_end(pods);
        if has("Failed") {
            let words = last.map(|end| end.words).unwrap_or_default();
            let reason = status
                .conditions
                .iter()
                .flatten()
                .find(|condition| condition.type_ == "Failed")
                .and_then(|condition| condition.message.clone())
                .unwrap_or_default();
            return Self::Failed(if words.is_empty() { reason } else { words });
        }
        match last {
            Some(end) if end.code == TRY_AGAIN => Self::Retrying(end.words),
            _ => Self::Running,
        }
    }
}

/// How a pod of the setup Job ended.
struct End {
    code: i32,
    words: String,
}

fn last_end(pods: &[Pod]) -> Option<End> {
    let mut ends: Vec<_> = pods
        .iter()
        .filter_map(|pod| {
            let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
            let status = statuses
                .iter()
                .find(|status| status.name == SETUP_CONTAINER)?;
            status.state.as_ref()?.terminated.clone()
        })
        .collect();
    ends.sort_by_key(|end| end.finished_at.as_ref().map(|time| time.0));
    let end = ends.pop()?;
    Some(End {
        code: end.exit_code,
        words: last_words(&end.message.unwrap_or_default()),
    })
}

/// What the process said last: the message of its last error line, or the last line as it is. At most 512 characters.
fn last_words(log: &str) -> String {
    let message = |line: &str| {
        let line: Value = serde_json::from_str(line).ok()?;
        (line["level"] == "ERROR").then(|| line["message"].as_str().map(str::to_owned))?
    };
    let words = log
        .lines()
        .rev()
        .find_map(message)
        .or_else(|| {
            log.lines()
                .rev()
                .find(|line| !line.trim().is_empty())
                .map(str::to_owned)
        })
        .unwrap_or_default();
    words.trim().chars().take(512).collect()
}

/// When a container of `pods` ended last, in seconds since 1970.
pub fn last_finished(pods: &[Pod]) -> Option<i64> {
    pods.iter()
        .filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref())
        .flatten()
        .filter_map(|status| {
            status
                .state
                .as_ref()?
                .terminated
                .as_ref()?
                .finished_at
                .as_ref()
        })
        .map(|time| time.0.as_second())
        .max()
}

/// How long a container may run without being ready before that is worth a word: far longer than ours take to begin.
const PATIENCE: SignedDuration = SignedDuration::from_secs(30);

/// Why the newest of `pods` does not work at `now`, as far as its node or the scheduler says so.
pub fn why_not(pods: &[Pod], now: Timestamp) -> Option<String> {
    let newest = pods
        .iter()
        .filter(|pod| pod.metadata.deletion_timestamp.is_none())
        .max_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0))?;
    let name = newest.metadata.name.as_deref().unwrap_or_default();
    let status = newest.status.as_ref()?;
    let mut containers = [&status.init_container_statuses, &status.container_statuses]
        .into_iter()
        .flatten()
        .flatten();
    let why = containers
        .find_map(waits)
        .or_else(|| unscheduled(status))
        .or_else(|| unready(name, status, now))?;
    Some(format!("pod {name}: {why}"))
}

/// What keeps `container` from running.
fn waits(container: &ContainerStatus) -> Option<String> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let reason = waiting.reason.as_deref()?;
    if ["ContainerCreating", "PodInitializing"].contains(&reason) {
        return None;
    }
    // What a container that crashes said last is worth more than how long the pause will be.
    let last = container
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let message = match last {
        Some(end) => end.message.as_deref(),
        None => waiting.message.as_deref(),
    };
    let words = last_words(message.unwrap_or_default());
    let parts = [
        Some(reason.to_owned()),
        last.map(|end| format!("exit code {}", end.exit_code)),
        Some(words).filter(|words| !words.is_empty()),
    ];
    Some(parts.into_iter().flatten().collect::<Vec<_>>().join(": "))
}

fn unscheduled(status: &PodStatus) -> Option<String> {
    let condition = is_false(status, "PodScheduled")?;
    let reason = condition.reason.as_deref().unwrap_or("not scheduled");
    let words = last_words(condition.message.as_deref().unwrap_or_default());
    Some(format!("{reason}: {words}"))
}

/// What only the pod's log can explain: a server that it needs cannot be reached, for example.
fn unready(name: &str, status: &PodStatus, now: Timestamp) -> Option<String> {
    let since = is_false(status, "Ready")?.last_transition_time.as_ref()?.0;
    let mut containers = status.container_statuses.iter().flatten();
    let runs = containers.find(|container| {
        let running = container
            .state
            .as_ref()
            .and_then(|state| state.running.as_ref());
        !container.ready && running.is_some()
    })?;
    let container = &runs.name;
    (now.duration_since(since) >= PATIENCE).then(|| {
        format!(
            "{container} runs and is not ready; see: kubectl logs {name} --container={container}"
        )
    })
}

fn is_false<'a>(status: &'a PodStatus, type_: &str) -> Option<&'a PodCondition> {
    let mut conditions = status.conditions.iter().flatten();
    conditions.find(|condition| condition.type_ == type_ && condition.status == "False")
}

/// Whether a pod is on its way or at work.
pub fn any_active(pods: &[Pod]) -> bool {
    pods.iter().any(|pod| {
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref());
        !matches!(phase, Some("Succeeded" | "Failed"))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment(value: Value) -> Deployment {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_rollout_is_complete_when_no_old_pod_is_left() {
        let with = |observed: i64, replicas: i32, updated: i32, available: i32| {
            Rollout::of(&deployment(json!({
                "metadata": { "generation": 4 },
                "spec": { "replicas": 2, "selector": {}, "template": {} },
                "status": { "observedGeneration": observed, "replicas": replicas, "updatedReplicas": updated,
                            "availableReplicas": available, "readyReplicas": available },
            })))
            .complete
        };
        assert!(with(4, 2, 2, 2));
        assert!(!with(3, 2, 2, 2), "its controller has not seen the change");
        assert!(!with(4, 3, 2, 2), "an old pod is still there");
        assert!(!with(4, 2, 1, 2), "one is of the old template");
        assert!(!with(4, 2, 2, 1), "one does not work yet");
    }

    #[test]
    fn a_deployment_nobody_has_looked_at_has_nothing() {
        let rollout = Rollout::of(&deployment(json!({
            "metadata": { "generation": 1 },
            "spec": { "replicas": 2, "selector": {}, "template": {} },
        })));
        assert_eq!(
            (rollout.summary().as_str(), rollout.complete),
            ("0/2", false)
        );
    }

    #[test]
    fn the_newest_pod_says_why_it_does_not_work() {
        let now = Timestamp::now();
        let pod = |second: u8, container: Value, conditions: Value| -> Pod {
            let mut container = container;
            for (name, value) in [
                ("name", json!("api")),
                ("image", json!("")),
                ("imageID", json!("")),
            ] {
                container[name] = value;
            }
            container["ready"] = false.into();
            container["restartCount"] = 0.into();
            serde_json::from_value(json!({
                "metadata": { "name": "it", "creationTimestamp": format!("2026-01-01T00:00:{second:02}Z") },
                "status": { "containerStatuses": [container], "conditions": conditions },
            }))
            .unwrap()
        };
        let pulling = pod(
            1,
            json!({ "state": { "waiting": { "reason": "ErrImagePull", "message": "no such tag" } } }),
            json!([]),
        );
        assert_eq!(
            why_not(std::slice::from_ref(&pulling), now).unwrap(),
            "pod it: ErrImagePull: no such tag"
        );
        let crashed = json!({ "state": { "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 10s" } },
            "lastState": { "terminated": { "exitCode": 78, "message": "{\"level\":\"ERROR\",\"message\":\"LOG_LEVEL is wrong\"}" } } });
        let crashed = pod(2, crashed, json!([]));
        assert_eq!(
            why_not(&[crashed, pulling], now).unwrap(),
            "pod it: CrashLoopBackOff: exit code 78: LOG_LEVEL is wrong"
        );
        let unscheduled = json!([{ "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes" }]);
        assert_eq!(
            why_not(&[pod(3, json!({}), unscheduled)], now).unwrap(),
            "pod it: Unschedulable: 0/1 nodes"
        );
        let starting = pod(
            4,
            json!({ "state": { "waiting": { "reason": "ContainerCreating" } } }),
            json!([]),
        );
        assert_eq!(why_not(&[starting], now), None);
        let silent = json!({ "state": { "waiting": { "reason": "CrashLoopBackOff" } },
            "lastState": { "terminated": { "exitCode": 137 } } });
        assert_eq!(
            why_not(&[pod(5, silent, json!([]))], now).unwrap(),
            "pod it: CrashLoopBackOff: exit code 137"
        );
    }

    #[test]
    fn a_pod_that_runs_and_is_not_ready_is_given_time_to_begin() {
        let now: Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        let since = |since: &str| -> Pod {
            serde_json::from_value(json!({
                "metadata": { "name": "it" },
                "status": {
                    "containerStatuses": [{ "name": "worker", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                                            "state": { "running": {} } }],
                    "conditions": [{ "type": "Ready", "status": "False", "lastTransitionTime": since }],
                },
            }))
            .unwrap()
        };
        assert_eq!(why_not(&[since("2026-01-01T00:59:31Z")], now), None);
        assert_eq!(
            why_not(&[since("2026-01-01T00:59:30Z")], now).unwrap(),
            "pod it: worker runs and is not ready; see: kubectl logs it --container=worker"
        );
    }

    #[test]
    fn an_init_container_speaks_for_its_pod() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": { "name": "it" },
            "status": {
                "initContainerStatuses": [{ "name": "wait", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": { "waiting": { "reason": "ErrImagePull", "message": "no such tag" } } }],
                "containerStatuses": [{ "name": "api", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": { "waiting": { "reason": "PodInitializing" } } }],
            },
        }))
        .unwrap();
        assert_eq!(
            why_not(&[pod], Timestamp::now()).unwrap(),
            "pod it: ErrImagePull: no such tag"
        );
    }

    fn pod(code: i32, message: &str, minute: u8) -> Pod {
        serde_json::from_value(
            json!({ "status": { "phase": "Failed", "containerStatuses": [{
            "name": "setup", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": { "terminated": { "exitCode": code, "message": message,
                                       "finishedAt": format!("2026-01-01T00:{minute:02}:00Z") } },
        }] } }),
        )
        .unwrap()
    }

    fn job(condition: Option<&str>) -> Job {
        let conditions: Vec<Value> = condition
            .map(|type_| json!({ "type": type_, "status": "True", "message": "Job has reached its limit" }))
            .into_iter()
            .collect();
        serde_json::from_value(json!({ "status": { "conditions": conditions } })).unwrap()
    }

    #[test]
    fn the_setup_job_speaks_through_its_newest_pod() {
        let refused = "{\"level\":\"INFO\",\"message\":\"connecting\"}\n{\"level\":\"ERROR\",\"message\":\"PostgreSQL is 14\"}\n";
        let pods = [pod(78, refused, 5), pod(75, "later", 3)];
        assert_eq!(
            Setup::of(&job(Some("Failed")), &pods),
            Setup::Failed("PostgreSQL is 14".to_owned())
        );
        assert_eq!(
            Setup::of(&job(None), &pods[1..]),
            Setup::Retrying("later".to_owned())
        );
        assert_eq!(Setup::of(&job(None), &[]), Setup::Running);
        assert_eq!(Setup::of(&job(Some("Complete")), &pods), Setup::Complete);
        assert_eq!(
            Setup::of(&job(Some("Failed")), &[]),
            Setup::Failed("Job has reached its limit".to_owned())
        );
    }

    #[test]
    fn last_words_are_short_and_never_empty_lines() {
        assert_eq!(last_words("one\ntwo\n\n"), "two");
        assert_eq!(last_words(""), "");
        assert_eq!(last_words(&"x".repeat(2000)).len(), 512);
    }
}
