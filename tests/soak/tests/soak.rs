//! The short form of the soak: every kind of fault, a few seconds each.

use std::{path::PathBuf, time::Duration};

use anyhow::{Result, ensure};
use birb_nest_soak::{
    Fault, Plan,
    faults::{Attack, Side},
    run,
    site::Site,
};
use birb_nest_stack::Stack;

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
        println!("{}", run(&part(seed)).await?);
    }
    Ok(())
}

fn part(seed: u64) -> Plan {
    let part = Fault::ALL.iter().skip((seed % N_PARTS) as usize);
    let mut plan = Plan::short(seed, dir());
    plan.faults = part.step_by(N_PARTS as usize).copied().collect();
    plan.max_rounds = plan.faults.len();
    plan
}

#[test]
fn in_the_short_form_a_worker_is_taken_over() {
    let mut rounds = (0..N_PARTS).flat_map(|seed| part(seed).rounds().collect::<Vec<_>>());
    assert!(rounds.any(|drawn| drawn.attack.heir().is_some()));
}

/// All keys of the soak, and its settings but for these. `test` is the one that asks.
fn plan_for(test: &str, fault: Fault, variables: &[(&'static str, &str)]) -> Plan {
    // A test has a thread of its own name, unless they run one after the other.
    let thread = std::thread::current();
    assert!(
        thread.name().is_some_and(|it| it == test || it == "main"),
        "{thread:?} is not {test}"
    );
    let mut plan = Plan::short(1, dir().join(test));
    plan.again = format!("make test-integration T={test}");
    plan.faults = vec![fault];
    plan.variables = variables
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    plan
}

/// What the checker says of what it finds.
const BEHIND: &str = "is older than what was acknowledged before it";
const NOT_ONE_AFTER_THE_OTHER: &str = "cannot have happened one operation after the other";
const DISAGREE: &str = "the stores do not agree";
const EXPIRED: &str = "shows what has expired";
const NOT_STORED: &str = "is not in PostgreSQL";
const LEFT_OVER: &str = ", and only what goes to";
const CHANGED: &str = "what an earlier round left behind";
const LABEL: &str = "an answer has a label and nothing was wrong";

/// A nest that makes this mistake must be found out, within some rounds of this fault, and by a violation of its own kind.
async fn is_found_out(
    test: &str,
    mistake: &str,
    by: &[&str],
    fault: Fault,
    variables: &[(&'static str, &str)],
) -> Result<()> {
    let mut plan = plan_for(test, fault, variables);
    plan.max_rounds = 20;
    // What stays wrong is wrong soon.
    plan.recovery = Duration::from_secs(20);
    plan.variables
        .push(("BIRBNEST_SABOTAGE", mistake.to_owned()));
    let found = run(&plan).await;
    let Err(error) = found else {
        anyhow::bail!("{mistake} was not noticed in {} rounds", plan.max_rounds);
    };
    let first = error.to_string();
    ensure!(
        first.starts_with(&format!("`{}` makes the same rounds", plan.again)),
        "{first}"
    );
    // The first one has the ends of logs.
    let sentences: Vec<String> = error.chain().skip(1).map(ToString::to_string).collect();
    let sentence = sentences.join(": ");
    println!("{mistake}: {sentence:.600}");
    ensure!(
        by.iter().any(|by| sentence.contains(by)),
        "it is something else: {error:#}"
    );
    Ok(())
}

/// What is written leaves Redis and the log at once.
const EAGER: &[(&str, &str)] = &[
    ("LOG_TRIM_LAG", "1ms"),
    ("LOG_TRIM_INTERVAL", "10ms"),
    ("REDIS_DEFAULT_TTL", "30ms"),
];

/// It leaves Redis at once: whoever installs late finds the place empty, and not something newer there.
const HASTY: &[(&str, &str)] = &[("REDIS_DEFAULT_TTL", "5ms")];

#[tokio::test]
async fn older_values_that_replace_newer_ones_are_found_out() -> Result<()> {
    is_found_out(
        "older_values_that_replace_newer_ones_are_found_out",
        "older-replaces-newer",
        &[BEHIND, DISAGREE, CHANGED],
        Fault::SlowLinks,
        &[],
    )
    .await
}

#[tokio::test]
async fn installing_without_a_token_is_found_out() -> Result<()> {
    is_found_out(
        "installing_without_a_token_is_found_out",
        "install-without-token",
        &[BEHIND, DISAGREE, CHANGED],
        Fault::SlowLinks,
        HASTY,
    )
    .await
}

/// What a worker stores while Redis is away is owed to it, and paid by emptying it: that would hide the mistake.
#[tokio::test]
async fn believing_a_redis_that_was_restarted_is_found_out() -> Result<()> {
    is_found_out(
        "believing_a_redis_that_was_restarted_is_found_out",
        "no-marker-check",
        &[BEHIND, DISAGREE, CHANGED],
        Fault::OldRedisAlone,
        &[],
    )
    .await
}

#[tokio::test]
async fn asking_postgresql_before_the_log_is_found_out() -> Result<()> {
    is_found_out(
        "asking_postgresql_before_the_log_is_found_out",
        "postgres-before-log",
        &[BEHIND, NOT_ONE_AFTER_THE_OTHER, DISAGREE, CHANGED],
        Fault::None,
        EAGER,
    )
    .await
}

/// A delete of a version that takes something newer away shows as a write that is missing.
#[tokio::test]
async fn conditions_without_a_pin_are_found_out() -> Result<()> {
    is_found_out(
        "conditions_without_a_pin_are_found_out",
        "condition-without-pin",
        &[BEHIND, NOT_ONE_AFTER_THE_OTHER],
        Fault::None,
        &[],
    )
    .await
}

#[tokio::test]
async fn conditions_on_nothing_that_is_not_held_are_found_out() -> Result<()> {
    is_found_out(
        "conditions_on_nothing_that_is_not_held_are_found_out",
        "condition-by-absence",
        &[BEHIND, NOT_ONE_AFTER_THE_OTHER],
        Fault::None,
        EAGER,
    )
    .await
}

/// A tombstone that was written an hour ago, by such a clock, is reaped at once: Redis has it, and PostgreSQL has nothing.
#[tokio::test]
async fn clocks_that_are_believed_are_found_out() -> Result<()> {
    is_found_out(
        "clocks_that_are_believed_are_found_out",
        "own-clock",
        &[
            BEHIND,
            EXPIRED,
            NOT_STORED,
            DISAGREE,
            NOT_ONE_AFTER_THE_OTHER,
        ],
        Fault::WrongClock,
        &[],
    )
    .await
}

#[tokio::test]
async fn labels_that_outlive_their_reason_are_found_out() -> Result<()> {
    is_found_out(
        "labels_that_outlive_their_reason_are_found_out",
        "ever-pending",
        &[LABEL],
        Fault::CutRedis,
        &[],
    )
    .await
}

#[tokio::test]
async fn trimming_before_the_commit_is_found_out() -> Result<()> {
    is_found_out(
        "trimming_before_the_commit_is_found_out",
        "trim-before-commit",
        &[
            BEHIND,
            NOT_ONE_AFTER_THE_OTHER,
            DISAGREE,
            NOT_STORED,
            LEFT_OVER,
        ],
        Fault::ReadOnly,
        &[],
    )
    .await
}

/// Keys that are written all the time hide it: the next write is stored.
#[tokio::test]
async fn entries_that_are_left_out_of_batches_are_found_out() -> Result<()> {
    is_found_out(
        "entries_that_are_left_out_of_batches_are_found_out",
        "skip-an-entry",
        &[NOT_STORED],
        Fault::KillWorker,
        &[],
    )
    .await
}

#[tokio::test]
async fn deletes_that_are_not_stored_are_found_out() -> Result<()> {
    is_found_out(
        "deletes_that_are_not_stored_are_found_out",
        "no-tombstones",
        &[NOT_STORED],
        Fault::None,
        &[],
    )
    .await
}

/// Where the settings of the mistakes are unusual, it is the mistake that is found, and not the settings.
#[tokio::test]
async fn without_a_mistake_the_same_is_found_right() -> Result<()> {
    let test = "without_a_mistake_the_same_is_found_right";
    for (fault, variables) in [(Fault::None, EAGER), (Fault::SlowLinks, HASTY)] {
        let mut plan = plan_for(test, fault, variables);
        plan.max_rounds = 3;
        println!("{}", run(&plan).await?);
    }
    Ok(())
}

/// Each store is changed behind the back of the nest.
#[tokio::test]
async fn what_differs_between_the_stores_is_found() -> Result<()> {
    let stack = Stack::fresh().await?;
    // What differs there is to be there: a Redis that is not told in time keeps nothing.
    let mut site = Site::start(&stack, &[("REDIS_TIMEOUT", "5s".to_owned())]).await?;
    let url = format!("{}/v1/cache/", site.urls()[0]);
    let http = reqwest::Client::new();
    let write = async |key: &str| -> Result<()> {
        let write = http.post(format!("{url}{key}"));
        let write = write.header("content-type", "application/json");
        write
            .body("{\"value\":1}")
            .send()
            .await?
            .error_for_status()?;
        Ok(())
    };
    for n in 0..20 {
        write(&format!("key-{n}")).await?;
    }
    site.stores_agree(Duration::from_secs(60)).await?;
    let mut attack = Attack::draw(Fault::KillWorker, Duration::ZERO, &mut rand::rng());
    attack.side = Side::Both;
    site.begin(&attack).await?;
    for (change, back, sentence) in [
        (
            "update cache_entries set version = version - 1 where key = 'key-3'",
            "update cache_entries set version = version + 1 where key = 'key-3'",
            "another version",
        ),
        (
            "update cache_entries set value = '2' where key = 'key-4'",
            "update cache_entries set value = '1' where key = 'key-4'",
            "another value",
        ),
        (
            "insert into dead_keys (key, shard, version, dlq_seq, sqlstate, reason) values ('key-5', 0, 1, 1, 'P0001', 'no')",
            "delete from dead_keys",
            "1 dead letters",
        ),
        (
            "update shard_state set applied_to = applied_to - 1 where shard = 2",
            "update shard_state set applied_to = applied_to + 1 where shard = 2",
            "the log of shard 2",
        ),
    ] {
        is_noticed(&site, [change, back], sentence).await?;
    }
    write("key-6").await?;
    let found = site.stores_agree(Duration::ZERO).await;
    ensure!(found.is_err(), "what nobody stores is not noticed");
    site.heal(&attack).await?;
    site.stores_agree(Duration::from_secs(60)).await?;
    // A debt is paid by whoever sees it.
    let both = [Fault::KillWorker, Fault::KillApi].map(|fault| {
        let mut attack = Attack::draw(fault, Duration::ZERO, &mut rand::rng());
        attack.side = Side::Both;
        attack
    });
    for attack in &both {
        site.begin(attack).await?;
    }
    let owe = ["true", "false"]
        .map(|owes| format!("update shard_state set redis_debt = {owes} where shard = 2"));
    is_noticed(&site, [&owe[0], &owe[1]], "was not told").await?;
    for attack in &both {
        site.heal(attack).await?;
    }
    site.stores_agree(Duration::from_secs(60)).await?;
    site.all_run()?;
    for n in 0..4 {
        let mut attack = both[usize::from(n < 2)];
        attack.side = if n % 2 == 0 {
            Side::First
        } else {
            Side::Second
        };
        site.processes()[n].kill().await?;
        ensure!(site.all_run().is_err(), "process {n} has ended, unnoticed");
        let killed = site.begin(&attack).await;
        ensure!(killed.is_err(), "process {n} is killed a second time");
        site.heal(&attack).await?;
    }
    site.all_run()
}

/// Whether the comparison fails with that sentence after the first of these statements, and no more after the second.
async fn is_noticed(site: &Site<'_>, [change, back]: [&str; 2], sentence: &str) -> Result<()> {
    site.sql(change).await?;
    let found = site.stores_agree(Duration::ZERO).await;
    let Err(error) = found else {
        anyhow::bail!("{change} is not noticed");
    };
    let error = format!("{error:#}");
    ensure!(error.contains(sentence), "{change}: {error}");
    site.sql(back).await?;
    site.stores_agree(Duration::ZERO).await?;
    Ok(())
}
