use proptest::prelude::*;

use super::*;
use crate::{
    findings::{Down, Problem},
    testing,
};

fn rollout(desired: i32, ready: i32) -> Rollout {
    Rollout {
        uid: None,
        desired,
        replicas: desired,
        ready,
        complete: ready == desired,
        settled: false,
        stuck: None,
        why: None,
    }
}

fn healthy() -> Findings {
    Findings {
        servers_down: Some(Vec::new()),
        setup_job: Some("cache-setup-0".to_owned()),
        setup: Setup::Complete,
        api: Some(rollout(2, 2)),
        worker: Some(rollout(1, 1)),
        rolled_out: true,
        ..Findings::default()
    }
}

fn cache_nats() -> Down {
    Down {
        name: "cache-nats".to_owned(),
        why: None,
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
    let begun = Findings {
        servers_down: Some(Vec::new()),
        setup: Setup::Waiting,
        ..Findings::default()
    };
    check(&begun, "False WaitingForDependencies", "False", "True");
    let down = Findings {
        servers_down: Some(vec![cache_nats()]),
        ..begun.clone()
    };
    check(&down, "False ServerNotReady", "False", "True");
    let retrying = Findings {
        setup: Setup::Retrying("connection refused".to_owned()),
        ..begun
    };
    check(&retrying, "False ServerUnreachable", "False", "True");
    let failed = Findings {
        setup: Setup::Failed("too old".to_owned()),
        ..healthy()
    };
    check(&failed, "False MigrationFailed", "True", "False");
    let conflict = Findings {
        problems: vec![Problem::new(Reason::NameConflict, "Service cache")],
        ..healthy()
    };
    check(&conflict, "False NameConflict", "True", "False");
}

#[test]
fn a_nest_that_sleeps_is_not_ready_and_only_degraded_if_something_is_left() {
    let with = |stage| Findings {
        suspension: Some(Suspension {
            since: Time(Timestamp::UNIX_EPOCH),
            stage,
        }),
        api: Some(rollout(0, 0)),
        worker: Some(rollout(0, 0)),
        ..healthy()
    };
    let draining = with(SuspensionStage::Draining);
    check(&draining, "False Draining", "False", "True");
    let drained = with(SuspensionStage::Drained);
    check(&drained, "False Suspended", "False", "False");
    let not_drained = with(SuspensionStage::NotDrained);
    check(&not_drained, "False Suspended", "True", "False");
}

#[test]
fn all_pods_gone_clears_ready_and_one_left_does_not() {
    let with = |ready| Findings {
        api: Some(rollout(2, ready)),
        rolled_out: false,
        ..healthy()
    };
    check(&with(0), "False PodsNotReady", "False", "True");
    check(&with(1), "True Available", "False", "True");
    let lost = |ready| {
        let mut findings = with(ready);
        for rollout in [&mut findings.api, &mut findings.worker]
            .into_iter()
            .flatten()
        {
            rollout.settled = true;
        }
        findings
    };
    check(&lost(0), "False PodsNotReady", "True", "False");
    check(&lost(1), "True Available", "True", "False");
}

#[test]
fn what_was_not_looked_at_is_as_it_was() {
    let nest = testing::nest("{}");
    let mut stored = testing::stored("{}");
    stored.status = Some(status(&stored, &nest, &healthy(), Timestamp::UNIX_EPOCH));
    let problem = Problem::new(Reason::SecretMissing, "Secret servers");
    let findings = Findings {
        problems: vec![problem],
        setup: Setup::Unknown,
        servers_down: None,
        rolled_out: false,
        ..healthy()
    };
    let looked_at = stored.metadata.generation;
    stored.metadata.generation = looked_at.map(|generation| generation + 1);
    let after = status(&stored, &nest, &findings, Timestamp::UNIX_EPOCH);
    assert_eq!(after.migration, stored.status.unwrap().migration);
    let generation = |type_: ConditionType| {
        let mut all = after.conditions.iter();
        let found = all.find(|condition| condition.type_ == type_.as_str());
        found.unwrap().observed_generation
    };
    assert_eq!(generation(ConditionType::MigrationComplete), looked_at);
    assert_eq!(generation(ConditionType::Ready), stored.metadata.generation);
    let of = |type_: &str| {
        let found = after
            .conditions
            .iter()
            .find(|condition| condition.type_ == type_);
        found
            .map(|condition| (condition.status.as_str(), condition.reason.as_str()))
            .unwrap()
    };
    assert_eq!(of("MigrationComplete"), ("True", "AsExpected"));
    assert_eq!(of("DependenciesReady"), ("False", "SecretMissing"));
    assert_eq!(of("Ready"), ("False", "SecretMissing"));
}

#[test]
fn all_that_is_in_the_way_for_one_reason_is_told_at_once() {
    let findings = Findings {
        problems: vec![
            Problem::new(Reason::SecretMissing, "Secret a"),
            Problem::new(Reason::NameConflict, "Service cache"),
            Problem::new(Reason::SecretMissing, "Secret b"),
        ],
        ..healthy()
    };
    let (reason, message) = in_the_way(&findings).unwrap();
    assert_eq!(
        (reason, message.as_str()),
        (Reason::SecretMissing, "Secret a; Secret b")
    );
}

#[test]
fn a_stuck_rollout_is_degraded_though_old_pods_serve() {
    let mut findings = healthy();
    findings.rolled_out = false;
    findings.api.as_mut().unwrap().stuck = Some("has timed out progressing".to_owned());
    check(&findings, "True Available", "True", "True");
}

#[test]
fn what_holds_a_rollout_up_is_said_before_anybody_gives_up() {
    let mut findings = healthy();
    findings.rolled_out = false;
    findings.api.as_mut().unwrap().why = Some("pod a: ErrImagePull".to_owned());
    findings.worker.as_mut().unwrap().why = Some("pod w: ErrImagePull".to_owned());
    let verdict = progressing(&testing::stored("{}"), &findings);
    assert_eq!(
        (verdict.reason, verdict.message.as_str()),
        (
            Reason::RollingOut,
            "API and workers are being rolled out: API: pod a: ErrImagePull; worker: pod w: ErrImagePull"
        )
    );
}

fn any_setup() -> impl Strategy<Value = Setup> {
    prop_oneof![
        Just(Setup::Unknown),
        Just(Setup::Waiting),
        Just(Setup::Running),
        Just(Setup::Complete),
        ".{0,9}".prop_map(Setup::Retrying),
        ".{0,9}".prop_map(Setup::Failed),
    ]
}

fn any_findings() -> impl Strategy<Value = Findings> {
    let part = proptest::option::of((0..4, 0..4, any::<bool>()).prop_map(
        |(desired, ready, settled)| Rollout {
            settled,
            ..rollout(desired, ready)
        },
    ));
    let down = proptest::option::of(
        any::<bool>().prop_map(|down| down.then(cache_nats).into_iter().collect()),
    );
    let problem = proptest::option::of(Just(Problem::new(Reason::NameConflict, "Service cache")));
    (
        any_setup(),
        part.clone(),
        part,
        down,
        any::<bool>(),
        problem,
    )
        .prop_map(
            |(setup, api, worker, servers_down, rolled_out, problem)| Findings {
                problems: problem.into_iter().collect(),
                servers_down,
                setup_job: Some("cache-setup-0".to_owned()),
                setup,
                api,
                worker,
                rolled_out,
                ..Findings::default()
            },
        )
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
    fn ready_is_all_four_and_nothing_in_the_way(findings in any_findings()) {
        let stored = testing::stored("{}");
        let status = status(&stored, &testing::nest("{}"), &findings, Timestamp::UNIX_EPOCH);
        let holds: Vec<bool> = status.conditions.iter().map(|condition| condition.status == "True").collect();
        let expected = holds[1..5].iter().all(|holds| *holds) && findings.problems.is_empty();
        prop_assert_eq!(holds[0], expected);
    }
}

/// What tools that read kstatus call the nest.
fn kstatus(findings: &Findings) -> &'static str {
    let (stored, nest) = (testing::stored("{}"), testing::nest("{}"));
    let status = status(&stored, &nest, findings, Timestamp::UNIX_EPOCH);
    let holds = |type_: ConditionType| {
        let mut conditions = status.conditions.iter();
        conditions.any(|condition| condition.type_ == type_.as_str() && condition.status == "True")
    };
    // In this order.
    if holds(ConditionType::Reconciling) {
        "InProgress"
    } else if holds(ConditionType::Stalled) {
        "Failed"
    } else if holds(ConditionType::Ready) {
        "Current"
    } else {
        "InProgress"
    }
}

#[test]
fn only_what_a_person_must_mend_has_failed() {
    assert_eq!(kstatus(&healthy()), "Current");
    let problem = |reason| Findings {
        problems: vec![Problem::new(reason, "it")],
        ..healthy()
    };
    assert_eq!(kstatus(&problem(Reason::SecretMissing)), "Failed");
    // An object that is still being deleted.
    assert_eq!(
        kstatus(&problem(Reason::WaitingForDependencies)),
        "InProgress"
    );
    let setup = |setup| Findings {
        setup,
        rolled_out: false,
        ..healthy()
    };
    assert_eq!(kstatus(&setup(Setup::Running)), "InProgress");
    let retrying = Setup::Retrying("connection refused".to_owned());
    assert_eq!(kstatus(&setup(retrying)), "InProgress");
    assert_eq!(
        kstatus(&setup(Setup::Failed("too old".to_owned()))),
        "Failed"
    );
    let mut stuck = setup(Setup::Complete);
    assert_eq!(kstatus(&stuck), "InProgress");
    if let Some(api) = &mut stuck.api {
        api.stuck = Some("timed out progressing".to_owned());
    }
    assert_eq!(kstatus(&stuck), "Failed");
}

#[test]
fn since_when_a_release_runs_is_noted_when_it_is_another_one() {
    let mut stored = testing::stored("{}");
    let mut since = |findings: &Findings, second: i64, ran: Option<&str>| {
        if let (Some(status), Some(ran)) = (&mut stored.status, ran) {
            status.version = Some(ran.to_owned());
        }
        let now = Timestamp::from_second(second).unwrap();
        let status = status(&stored, &testing::nest("{}"), findings, now);
        stored.status = Some(status.clone());
        status.version_since.map(|since| since.0.as_second())
    };
    let changing = Findings {
        rolled_out: false,
        ..healthy()
    };
    assert_eq!(since(&changing, 100, None), None);
    assert_eq!(since(&healthy(), 200, None), Some(200));
    assert_eq!(since(&changing, 300, None), Some(200));
    assert_eq!(since(&healthy(), 400, None), Some(200));
    assert_eq!(since(&changing, 500, Some("0.0.1")), Some(200));
    assert_eq!(since(&healthy(), 600, None), Some(600));
}
