//! The short form of the soak: every kind of fault, a few seconds each.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use birb_nest_soak::{Fault, Plan, run};

fn dir() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("soak")
}

/// Each seed has its share of the faults, so that few seeds have them all.
const N_PARTS: u64 = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_promise_breaks_under_any_fault() -> Result<()> {
    let seeds: Vec<u64> = match std::env::var("SOAK_SEED") {
        Ok(seed) => vec![seed.parse()?],
        Err(_) => (0..N_PARTS).collect(),
    };
    for seed in seeds {
        let part = Fault::ALL.iter().skip((seed % N_PARTS) as usize);
        let mut plan = Plan::short(seed, dir());
        plan.faults = part.step_by(N_PARTS as usize).copied().collect();
        plan.max_rounds = plan.faults.len();
        println!("{}", run(&plan).await?);
    }
    Ok(())
}

fn plan_for(name: &str, fault: Fault, n_keys: usize, variables: &[(&'static str, &str)]) -> Plan {
    let mut plan = Plan::short(1, dir().join(name));
    plan.faults = vec![fault];
    plan.n_keys = n_keys;
    plan.variables = variables
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    plan
}

/// A nest that makes this mistake must be found out, within some rounds of these faults.
async fn is_found_out(
    mistake: &str,
    fault: Fault,
    n_keys: usize,
    variables: &[(&'static str, &str)],
) -> Result<()> {
    let mut plan = plan_for(mistake, fault, n_keys, variables);
    plan.max_rounds = 20;
    // What stays wrong is wrong soon.
    plan.recovery = Duration::from_secs(20);
    plan.variables
        .push(("BIRBNEST_SABOTAGE", mistake.to_owned()));
    let found = run(&plan).await;
    let Err(error) = found else {
        anyhow::bail!("{mistake} was not noticed in {} rounds", plan.max_rounds);
    };
    let sentence = format!("{error:#}");
    println!("{mistake}: {:.600}", error.root_cause().to_string());
    ensure!(
        [
            "one operation after the other",
            "is older than",
            "do not agree",
            "two values"
        ]
        .iter()
        .any(|known| sentence.contains(known)),
        "it is something else: {sentence}"
    );
    Ok(())
}

/// What is written leaves Redis and the log at once.
const EAGER: &[(&str, &str)] = &[
    ("LOG_TRIM_LAG", "1ms"),
    ("LOG_TRIM_INTERVAL", "10ms"),
    ("WORKER_BATCH_TIMEOUT", "1ms"),
    ("REDIS_DEFAULT_TTL", "30ms"),
];

#[tokio::test]
async fn older_values_that_replace_newer_ones_are_found_out() -> Result<()> {
    is_found_out("older-replaces-newer", Fault::SlowLinks, 1, &[]).await
}

#[tokio::test]
async fn installing_without_a_token_is_found_out() -> Result<()> {
    is_found_out("install-without-token", Fault::SlowLinks, 1, EAGER).await
}

/// What a worker stores while Redis is away is owed to it, and paid by emptying it: that would hide the mistake.
#[tokio::test]
async fn believing_a_redis_that_was_restarted_is_found_out() -> Result<()> {
    is_found_out("no-marker-check", Fault::OldRedisAlone, 400, &[]).await
}

#[tokio::test]
async fn asking_postgresql_before_the_log_is_found_out() -> Result<()> {
    is_found_out("postgres-before-log", Fault::None, 1, EAGER).await
}

#[tokio::test]
async fn conditions_without_a_pin_are_found_out() -> Result<()> {
    is_found_out("condition-without-pin", Fault::None, 1, &[]).await
}

#[tokio::test]
async fn trimming_before_the_commit_is_found_out() -> Result<()> {
    is_found_out("trim-before-commit", Fault::ReadOnly, 1, &[]).await
}

/// Where the settings of the mistakes are unusual, it is the mistake that is found, and not the settings.
#[tokio::test]
async fn without_a_mistake_the_same_is_found_right() -> Result<()> {
    for (name, fault, n_keys, variables) in [
        ("eager", Fault::None, 1, EAGER),
        ("eager-slow", Fault::SlowLinks, 1, EAGER),
        ("many-keys", Fault::OldRedisAlone, 400, &[]),
    ] {
        let mut plan = plan_for(name, fault, n_keys, variables);
        plan.max_rounds = 3;
        println!("{}", run(&plan).await?);
    }
    Ok(())
}
