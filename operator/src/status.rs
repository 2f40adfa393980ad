//! From what a pass found to `status`. Pure, and stable: the same findings give the same status, so nothing is written
//! while nothing happens.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

use crate::{
    api::{
        ApiStatus, BirbNest, BirbNestStatus, ConditionType, MigrationState, MigrationStatus,
        Reason, Suspension, SuspensionStage, WorkerStatus,
    },
    findings::Findings,
    observe::{Rollout, Setup},
    render::selector_text,
    resolve::Nest,
    scaling::verdict,
    verdict::{Verdict, before, no, yes},
};

/// The status of `stored`, which `nest` is the resolved form of, after a pass that found `findings`.
pub fn status(
    stored: &BirbNest,
    nest: &Nest,
    findings: &Findings,
    now: Timestamp,
) -> BirbNestStatus {
    let old = stored.status.clone().unwrap_or_default();
    let view = findings.scaling.as_ref();
    let generation = stored.metadata.generation;
    let api = findings.api.clone().unwrap_or_default();
    let worker = findings.worker.clone().unwrap_or_default();
    let is_rolled_out = findings.rolled_out && !stored.spec.paused;
    let version = Some(&nest.version).filter(|_| is_rolled_out).cloned();
    let version = version.or_else(|| old.version.clone());
    BirbNestStatus {
        observed_generation: generation,
        conditions: conditions(&old.conditions, stored, nest, findings, now),
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
            lag: verdict::lag(&old.worker, stored, nest, view),
            last_scale_reason: view
                .and_then(|view| view.last_scale.clone())
                .or(old.worker.last_scale_reason),
        },
        version_since: if version == old.version {
            old.version_since
        } else {
            Some(Time(now))
        },
        version,
        migration: migration_status(old.migration, findings),
        suspension: findings.suspension.clone(),
        selector: selector_text(nest, "worker"),
        resolved: Some(nest.summary()),
    }
}

/// What could not be looked at is as it was.
fn migration_status(old: Option<MigrationStatus>, findings: &Findings) -> Option<MigrationStatus> {
    let state = match findings.setup {
        Setup::Unknown => return old,
        Setup::Waiting => MigrationState::Waiting,
        Setup::Running | Setup::Retrying(_) => MigrationState::Running,
        Setup::Complete => MigrationState::Complete,
        Setup::Failed(_) => MigrationState::Failed,
    };
    findings
        .setup_job
        .clone()
        .map(|job| MigrationStatus { job, state })
}

fn conditions(
    old: &[Condition],
    stored: &BirbNest,
    nest: &Nest,
    findings: &Findings,
    now: Timestamp,
) -> Vec<Condition> {
    let scaling = verdict::active(old, stored, nest, findings.scaling.as_ref());
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
        (ConditionType::MigrationComplete, migration(old, findings)),
    ];
    let ready = ready(&parts, findings);
    let stalled = stalled(findings);
    let reconciling = reconciling(stored, findings, &stalled);
    ConditionType::ALL
        .into_iter()
        .zip(
            [ready]
                .into_iter()
                .chain(parts.into_iter().map(|(_, verdict)| verdict))
                .chain([progressing(stored, findings), degraded(findings), scaling])
                .chain([reconciling, stalled]),
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
                observed_generation: verdict.generation.or(stored.metadata.generation),
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
            with_why(
                format!("none of {} {what} replicas is ready", rollout.desired),
                rollout.why.as_deref(),
            ),
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

fn with_why(what: String, why: Option<&str>) -> String {
    match why {
        Some(why) => format!("{what}: {why}"),
        None => what,
    }
}

fn dependencies(findings: &Findings) -> Verdict {
    let Some(down) = &findings.servers_down else {
        // Something was in the way before anything could be said of the servers.
        return match in_the_way(findings) {
            Some((reason, message)) => no(reason, message),
            None => no(
                Reason::WaitingForDependencies,
                "the servers were not looked at yet",
            ),
        };
    };
    if let Some(first) = down.first() {
        let names: Vec<&str> = down.iter().map(|server| server.name.as_str()).collect();
        let what = format!("no ready pod of {}", names.join(", "));
        let whys: Vec<&str> = down
            .iter()
            .filter_map(|server| server.why.as_deref())
            .collect();
        let why = whys.join("; ");
        let hint = format!("; see: kubectl describe statefulset {}", first.name);
        let what = with_why(what, Some(why.as_str()).filter(|why| !why.is_empty()));
        return no(Reason::ServerNotReady, what + &hint);
    }
    match &findings.setup {
        Setup::Retrying(words) => no(Reason::ServerUnreachable, with_words(TRIES_AGAIN, words)),
        _ => yes(Reason::AsExpected, ""),
    }
}

fn migration(old: &[Condition], findings: &Findings) -> Verdict {
    match &findings.setup {
        Setup::Unknown => before(old, ConditionType::MigrationComplete).unwrap_or_else(|| {
            no(
                Reason::WaitingForDependencies,
                "setup has not begun: something else is in the way",
            )
        }),
        Setup::Waiting => no(
            Reason::WaitingForDependencies,
            "setup begins when all servers are ready",
        ),
        Setup::Running => no(
            Reason::SetupRunning,
            with_why(
                "setup is preparing the servers".to_owned(),
                findings.setup_why.as_deref(),
            ),
        ),
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

/// The first problem's reason, with the messages of all that share it: two Secrets that are missing are made in one go.
fn in_the_way(findings: &Findings) -> Option<(Reason, String)> {
    let reason = findings.problems.first()?.reason;
    let messages: Vec<&str> = findings
        .problems
        .iter()
        .filter(|problem| problem.reason == reason)
        .map(|problem| problem.message.as_str())
        .collect();
    Some((reason, messages.join("; ")))
}

/// The first thing that is wrong is the reason, in the order in which a person would look: what is in the way, servers,
/// setup, then pods.
fn ready(parts: &[(ConditionType, Verdict); 4], findings: &Findings) -> Verdict {
    if let Some((reason, message)) = in_the_way(findings) {
        return no(reason, message);
    }
    if let Some(suspension) = &findings.suspension {
        return asleep(suspension);
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

/// Why a nest that is to sleep serves nobody.
fn asleep(suspension: &Suspension) -> Verdict {
    match suspension.stage {
        SuspensionStage::Draining => no(
            Reason::Draining,
            "put to sleep by spec.suspend: the API ends, and workers store what is left in the log",
        ),
        SuspensionStage::Drained | SuspensionStage::NotDrained => no(
            Reason::Suspended,
            "put to sleep by spec.suspend: nothing runs but the servers",
        ),
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
    if let Some(suspension) = &findings.suspension
        && suspension.stage == SuspensionStage::Draining
    {
        return yes(Reason::Draining, asleep(suspension).message);
    }
    if findings.rolled_out {
        return waiting(findings).unwrap_or_else(|| no(Reason::AsExpected, ""));
    }
    match &findings.setup {
        Setup::Complete => {
            let is_settled =
                |rollout: &Option<Rollout>| rollout.as_ref().is_some_and(|it| it.settled);
            if is_settled(&findings.api) && is_settled(&findings.worker) {
                waiting(findings).unwrap_or_else(|| {
                    no(
                        Reason::PodsNotReady,
                        "pods were lost; no change is under way",
                    )
                })
            } else {
                let whys: Vec<String> = rollouts(findings)
                    .filter_map(|(what, rollout)| {
                        Some(format!("{what}: {}", rollout.why.as_deref()?))
                    })
                    .collect();
                let what = "API and workers are being rolled out".to_owned();
                let why = whys.join("; ");
                let why = Some(why.as_str()).filter(|why| !why.is_empty());
                yes(Reason::RollingOut, with_why(what, why))
            }
        }
        Setup::Waiting => yes(Reason::WaitingForDependencies, "waiting for the servers"),
        _ => yes(Reason::SetupRunning, "setup is preparing the servers"),
    }
}

/// What would be changed if it were its turn.
fn waiting(findings: &Findings) -> Option<Verdict> {
    let release = findings.moves_later_to.as_ref()?;
    let message =
        format!("release {release} follows when the nests before this one are ready in it");
    Some(no(Reason::WaitingForTurn, message))
}

/// What is being changed, as long as that may succeed by itself.
fn reconciling(stored: &BirbNest, findings: &Findings, stalled: &Verdict) -> Verdict {
    if stalled.holds {
        return no(stalled.reason, "it gets no further by itself");
    }
    progressing(stored, findings)
}

/// What only a person can mend. An object that is still being deleted goes by itself.
fn stalled(findings: &Findings) -> Verdict {
    if let Some((reason, message)) = in_the_way(findings)
        && reason != Reason::WaitingForDependencies
    {
        return yes(reason, message);
    }
    if let Setup::Failed(_) = findings.setup {
        let verdict = migration(&[], findings);
        return yes(verdict.reason, verdict.message);
    }
    if let Some(suspension) = &findings.suspension
        && suspension.stage == SuspensionStage::NotDrained
    {
        return yes(
            Reason::NotDrained,
            "workers ended before all of the log was known to be stored; what is left stays in it, and is stored when \
             spec.suspend is false again",
        );
    }
    for (what, rollout) in rollouts(findings) {
        if let Some(message) = &rollout.stuck {
            let what = format!("{what}: {message}");
            return yes(Reason::RolloutStuck, with_why(what, rollout.why.as_deref()));
        }
    }
    no(Reason::AsExpected, "")
}

fn rollouts(findings: &Findings) -> impl Iterator<Item = (&'static str, &Rollout)> {
    let api = findings.api.iter().map(|api| ("API", api));
    api.chain(findings.worker.iter().map(|worker| ("worker", worker)))
}

fn degraded(findings: &Findings) -> Verdict {
    if let Some((reason, message)) = in_the_way(findings) {
        return yes(reason, message);
    }
    let stalled = stalled(findings);
    if stalled.holds {
        return stalled;
    }
    for (what, rollout) in rollouts(findings) {
        // Fewer than there should be, and not because a change is under way.
        if rollout.settled && rollout.ready < rollout.desired {
            let what = format!("{} {what} replicas are ready", rollout.summary());
            return yes(Reason::PodsNotReady, with_why(what, rollout.why.as_deref()));
        }
    }
    if let Some(kind) = findings.kinds_missing.first() {
        let message = format!(
            "the API server does not know {}s ({}): install the Prometheus operator, or switch off what spec.observability \
             asks for",
            kind.as_str(),
            kind.api_resource().api_version,
        );
        return yes(Reason::KindMissing, message);
    }
    no(Reason::AsExpected, "")
}

#[cfg(test)]
mod tests;
