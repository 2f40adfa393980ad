//! From what a pass found to `status`. Pure, and stable: the same findings give the same status, so nothing is written
//! while nothing happens.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use crate::{
    api::{
        ApiStatus, BirbNest, BirbNestStatus, ConditionType, MigrationState, MigrationStatus,
        Reason, WorkerStatus,
    },
    observe::{Rollout, Setup},
    render::worker_selector,
    resolve::Nest,
};

/// Something in the way that a person must see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it is.
    pub reason: Reason,
    /// What is wrong with which object, and what to do.
    pub message: String,
}

/// What a pass found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// What is in the way.
    pub problems: Vec<Problem>,
    /// Managed servers that do not run (yet), by name.
    pub servers_down: Vec<String>,
    /// Name of the setup Job for these settings, once they are known.
    pub setup_job: Option<String>,
    /// How far it is.
    pub setup: Setup,
    /// The API's Deployment, if there is one.
    pub api: Option<Rollout>,
    /// The workers' Deployment, if there is one.
    pub worker: Option<Rollout>,
    /// API and workers were rolled out as they should be.
    pub rolled_out: bool,
}

/// A condition without its times.
struct Verdict {
    holds: bool,
    reason: Reason,
    message: String,
}

fn yes(reason: Reason, message: impl Into<String>) -> Verdict {
    Verdict {
        holds: true,
        reason,
        message: message.into(),
    }
}

fn no(reason: Reason, message: impl Into<String>) -> Verdict {
    Verdict {
        holds: false,
        reason,
        message: message.into(),
    }
}

/// The status of `stored`, which `nest` is the resolved form of, after a pass that found `findings`.
pub fn status(
    stored: &BirbNest,
    nest: &Nest,
    findings: &Findings,
    now: Timestamp,
) -> BirbNestStatus {
    let old = stored.status.clone().unwrap_or_default();
    let generation = stored.metadata.generation;
    let api = findings.api.clone().unwrap_or_default();
    let worker = findings.worker.clone().unwrap_or_default();
    BirbNestStatus {
        observed_generation: generation,
        conditions: conditions(&old.conditions, stored, findings, now),
        endpoint: Some(format!(
            "http://{}.{}.svc:{}",
            nest.name, nest.namespace, nest.service.port
        )),
        api: ApiStatus {
            ready: api.ready,
            desired: api.desired,
            summary: api.summary(),
        },
        worker: WorkerStatus {
            ready: worker.ready,
            desired: worker.desired,
            replicas: worker.replicas,
            summary: worker.summary(),
        },
        version: if findings.rolled_out && !stored.spec.paused {
            Some(nest.version.clone())
        } else {
            old.version
        },
        migration: findings.setup_job.clone().map(|job| MigrationStatus {
            job,
            state: match findings.setup {
                Setup::Waiting => MigrationState::Waiting,
                Setup::Running | Setup::Retrying(_) => MigrationState::Running,
                Setup::Complete => MigrationState::Complete,
                Setup::Failed(_) => MigrationState::Failed,
            },
        }),
        selector: worker_selector(nest),
        resolved: Some(nest.summary()),
    }
}

fn conditions(
    old: &[Condition],
    stored: &BirbNest,
    findings: &Findings,
    now: Timestamp,
) -> Vec<Condition> {
    let parts = [
        (
            ConditionType::ApiAvailable,
            available("API", findings.api.as_ref()),
        ),
        (
            ConditionType::WorkersAvailable,
            available("worker", findings.worker.as_ref()),
        ),
        (ConditionType::DependenciesReady, dependencies(findings)),
        (ConditionType::MigrationComplete, migration(findings)),
    ];
    let ready = ready(&parts, findings);
    ConditionType::ALL
        .into_iter()
        .zip(
            [ready]
                .into_iter()
                .chain(parts.into_iter().map(|(_, verdict)| verdict))
                .chain([progressing(stored, findings), degraded(findings)]),
        )
        .map(|(type_, verdict)| {
            let status = if verdict.holds { "True" } else { "False" };
            let before = old
                .iter()
                .find(|condition| condition.type_ == type_.as_str());
            Condition {
                type_: type_.as_str().to_owned(),
                status: status.to_owned(),
                reason: verdict.reason.as_str().to_owned(),
                message: verdict.message,
                observed_generation: stored.metadata.generation,
                last_transition_time: before
                    .filter(|before| before.status == status)
                    .map_or(Time(now), |before| before.last_transition_time.clone()),
            }
        })
        .collect()
}

/// One replica is enough to work; that there are fewer than there should be is `Degraded`.
fn available(what: &str, rollout: Option<&Rollout>) -> Verdict {
    match rollout {
        None => no(
            Reason::WaitingForDependencies,
            format!("no {what} was started yet"),
        ),
        Some(rollout) if rollout.desired == 0 => no(
            Reason::ScaledToZero,
            format!("the spec asks for no {what} replica"),
        ),
        Some(rollout) if rollout.ready == 0 => no(
            Reason::PodsNotReady,
            format!("none of {} {what} replicas is ready", rollout.desired),
        ),
        Some(rollout) => yes(
            Reason::Available,
            format!(
                "{} of {} {what} replicas are ready",
                rollout.ready, rollout.desired
            ),
        ),
    }
}

fn dependencies(findings: &Findings) -> Verdict {
    let of_servers = [Reason::SecretMissing, Reason::CredentialsLost];
    if let Some(problem) = findings
        .problems
        .iter()
        .find(|problem| of_servers.contains(&problem.reason))
    {
        return no(problem.reason, &problem.message);
    }
    if !findings.servers_down.is_empty() {
        let names = findings.servers_down.join(", ");
        return no(
            Reason::ServerNotReady,
            format!(
                "no ready pod of {names}; see: kubectl describe statefulset {}",
                findings.servers_down[0]
            ),
        );
    }
    match &findings.setup {
        Setup::Retrying(words) => no(Reason::ServerUnreachable, with_words(TRIES_AGAIN, words)),
        _ => yes(Reason::AsExpected, ""),
    }
}

fn migration(findings: &Findings) -> Verdict {
    match &findings.setup {
        Setup::Waiting => no(
            Reason::WaitingForDependencies,
            "setup begins when all servers are ready",
        ),
        Setup::Running => no(Reason::SetupRunning, "setup is preparing the servers"),
        Setup::Retrying(words) => no(Reason::ServerUnreachable, with_words(TRIES_AGAIN, words)),
        Setup::Complete => yes(Reason::AsExpected, ""),
        Setup::Failed(words) => {
            let job = findings.setup_job.as_deref().unwrap_or_default();
            let hint = format!(
                "; pods that run go on as they are; to repeat it: kubectl delete job {job}"
            );
            no(
                Reason::MigrationFailed,
                with_words("setup failed: ", words) + &hint,
            )
        }
    }
}

/// Begins what a condition says while setup tries again.
const TRIES_AGAIN: &str = "setup tries again: ";

/// What setup said when it last tried in vain, if `status` speaks of the Job called `job`.
pub fn setup_words(status: &BirbNestStatus, job: &str) -> Option<String> {
    let is_same = status
        .migration
        .as_ref()
        .is_some_and(|migration| migration.job == job);
    let condition = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == ConditionType::MigrationComplete.as_str())?;
    let words = condition.message.strip_prefix(TRIES_AGAIN)?;
    is_same.then(|| words.to_owned())
}

fn with_words(what: &str, words: &str) -> String {
    let words = if words.is_empty() {
        "it left no message; see its logs"
    } else {
        words
    };
    format!("{what}{words}")
}

/// The first thing that is wrong is the reason, in the order in which a person would look: what is in the way, servers,
/// setup, then pods.
fn ready(parts: &[(ConditionType, Verdict); 4], findings: &Findings) -> Verdict {
    if let Some(problem) = findings.problems.first() {
        return no(problem.reason, &problem.message);
    }
    let [api, worker, dependencies, migration] = parts;
    match [dependencies, migration, api, worker]
        .into_iter()
        .find(|(_, verdict)| !verdict.holds)
    {
        Some((_, verdict)) => no(verdict.reason, &verdict.message),
        None => yes(Reason::Available, "reads and writes are served, and stored"),
    }
}

fn progressing(stored: &BirbNest, findings: &Findings) -> Verdict {
    if stored.spec.paused {
        return no(Reason::Paused, "spec.paused is true: nothing is changed");
    }
    if !findings.problems.is_empty() || matches!(findings.setup, Setup::Failed(_)) {
        return no(
            Reason::WaitingForDependencies,
            "waiting for what is in the way to be mended",
        );
    }
    if findings.rolled_out {
        return no(Reason::AsExpected, "");
    }
    match &findings.setup {
        Setup::Complete => yes(Reason::RollingOut, "API and workers are being rolled out"),
        Setup::Waiting => yes(Reason::WaitingForDependencies, "waiting for the servers"),
        _ => yes(Reason::SetupRunning, "setup is preparing the servers"),
    }
}

fn degraded(findings: &Findings) -> Verdict {
    if let Some(problem) = findings.problems.first() {
        return yes(problem.reason, &problem.message);
    }
    if let Setup::Failed(_) = findings.setup {
        let verdict = migration(findings);
        return yes(verdict.reason, verdict.message);
    }
    let rollouts = [("API", &findings.api), ("worker", &findings.worker)];
    for (what, rollout) in rollouts {
        let Some(rollout) = rollout else { continue };
        if let Some(message) = &rollout.stuck {
            return yes(Reason::RolloutStuck, format!("{what}: {message}"));
        }
    }
    if findings.rolled_out {
        return no(Reason::AsExpected, "");
    }
    // Fewer than there should be, and not because a change is under way.
    for (what, rollout) in rollouts {
        match rollout {
            Some(rollout)
                if rollout.ready < rollout.desired && findings.setup == Setup::Complete =>
            {
                return yes(
                    Reason::PodsNotReady,
                    format!("{} {what} replicas are ready", rollout.summary()),
                );
            }
            _ => {}
        }
    }
    no(Reason::AsExpected, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn rollout(desired: i32, ready: i32) -> Rollout {
        Rollout {
            desired,
            replicas: desired,
            ready,
            complete: ready == desired,
            stuck: None,
        }
    }

    fn healthy() -> Findings {
        Findings {
            setup_job: Some("cache-setup-0".to_owned()),
            setup: Setup::Complete,
            api: Some(rollout(2, 2)),
            worker: Some(rollout(1, 1)),
            rolled_out: true,
            ..Findings::default()
        }
    }

    /// `Ready`'s status and reason, and whether it is degraded and progressing.
    fn judge(findings: &Findings) -> (String, String, String) {
        let stored = testing::stored("{}");
        let status = status(
            &stored,
            &testing::nest("{}"),
            findings,
            Timestamp::UNIX_EPOCH,
        );
        let of = |type_: ConditionType| {
            status
                .conditions
                .iter()
                .find(|condition| condition.type_ == type_.as_str())
                .unwrap()
        };
        let ready = of(ConditionType::Ready);
        (
            format!("{} {}", ready.status, ready.reason),
            of(ConditionType::Degraded).status.clone(),
            of(ConditionType::Progressing).status.clone(),
        )
    }

    fn check(findings: &Findings, ready: &str, degraded: &str, progressing: &str) {
        let expected = (
            ready.to_owned(),
            degraded.to_owned(),
            progressing.to_owned(),
        );
        assert_eq!(judge(findings), expected, "{findings:?}");
    }

    #[test]
    fn conditions_say_what_is_the_matter() {
        check(&healthy(), "True Available", "False", "False");
        check(
            &Findings::default(),
            "False WaitingForDependencies",
            "False",
            "True",
        );
        let down = Findings {
            servers_down: vec!["cache-nats".to_owned()],
            ..Findings::default()
        };
        check(&down, "False ServerNotReady", "False", "True");
        let retrying = Findings {
            setup: Setup::Retrying("connection refused".to_owned()),
            ..Findings::default()
        };
        check(&retrying, "False ServerUnreachable", "False", "True");
        let failed = Findings {
            setup: Setup::Failed("too old".to_owned()),
            ..healthy()
        };
        check(&failed, "False MigrationFailed", "True", "False");
        let conflict = Findings {
            problems: vec![Problem {
                reason: Reason::NameConflict,
                message: "Service cache".to_owned(),
            }],
            ..healthy()
        };
        check(&conflict, "False NameConflict", "True", "False");
    }

    #[test]
    fn all_pods_gone_clears_ready_and_one_left_does_not() {
        let with = |ready| Findings {
            api: Some(rollout(2, ready)),
            rolled_out: false,
            ..healthy()
        };
        check(&with(0), "False PodsNotReady", "True", "True");
        check(&with(1), "True Available", "True", "True");
    }

    #[test]
    fn a_stuck_rollout_is_degraded_though_old_pods_serve() {
        let mut findings = healthy();
        findings.rolled_out = false;
        findings.api.as_mut().unwrap().stuck = Some("has timed out progressing".to_owned());
        check(&findings, "True Available", "True", "True");
    }

    fn any_setup() -> impl Strategy<Value = Setup> {
        prop_oneof![
            Just(Setup::Waiting),
            Just(Setup::Running),
            Just(Setup::Complete),
            ".{0,9}".prop_map(Setup::Retrying),
            ".{0,9}".prop_map(Setup::Failed),
        ]
    }

    fn any_findings() -> impl Strategy<Value = Findings> {
        let part =
            proptest::option::of((0..4, 0..4).prop_map(|(desired, ready)| rollout(desired, ready)));
        (
            any_setup(),
            part.clone(),
            part,
            any::<bool>(),
            any::<bool>(),
        )
            .prop_map(|(setup, api, worker, down, rolled_out)| Findings {
                servers_down: down.then(|| "cache-nats".to_owned()).into_iter().collect(),
                setup,
                api,
                worker,
                rolled_out,
                ..Findings::default()
            })
    }

    proptest! {
        #[test]
        fn the_same_findings_change_nothing(first in any_findings(), second in any_findings()) {
            let nest = testing::nest("{}");
            let mut stored = testing::stored("{}");
            let at = |second| Timestamp::from_second(second).unwrap();
            stored.status = Some(status(&stored, &nest, &first, at(1)));
            let next = status(&stored, &nest, &second, at(2));
            for (before, after) in stored.status.iter().flat_map(|s| &s.conditions).zip(&next.conditions) {
                let moved = before.last_transition_time != after.last_transition_time;
                prop_assert_eq!(moved, before.status != after.status);
            }
            stored.status = Some(next.clone());
            prop_assert_eq!(status(&stored, &nest, &second, at(3)), next);
        }

        #[test]
        fn ready_is_all_four(findings in any_findings()) {
            let stored = testing::stored("{}");
            let status = status(&stored, &testing::nest("{}"), &findings, Timestamp::UNIX_EPOCH);
            let holds: Vec<bool> = status.conditions.iter().map(|condition| condition.status == "True").collect();
            prop_assert_eq!(holds[0], holds[1..5].iter().all(|holds| *holds));
        }
    }
}
