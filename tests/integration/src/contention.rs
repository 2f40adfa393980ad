//! Of several writers with the same condition one wins, whatever stalls or dies in between.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Proxy;
use reqwest::{Method, StatusCode};
use tokio::task::JoinHandle;

use crate::{
    conditions::{ABSENT, tag, trimmed},
    world::{Answer, Api, World, eventually},
};

const N_RACERS: usize = 8;

async fn two_apis(world: &World<'_>) -> Result<[Arc<Api>; 2]> {
    Ok([
        Arc::new(world.api().await?),
        Arc::new(Api::start(&world.env.replica()?).await?),
    ])
}

/// All write under one condition at once; returns the version of the one that won.
async fn race(apis: &[Arc<Api>; 2], key: &str, header: (&'static str, String)) -> Result<u64> {
    let racers: Vec<JoinHandle<Result<Answer>>> = (0..N_RACERS)
        .map(|n| {
            let (api, key, header) = (apis[n % 2].clone(), key.to_owned(), header.clone());
            tokio::spawn(async move {
                let headers = [(header.0, header.1.as_str())];
                api.post_if(&key, &headers, &n.to_string()).await
            })
        })
        .collect();
    let mut answers = Vec::new();
    for racer in racers {
        answers.push(racer.await??);
    }
    let won: Vec<&Answer> = answers
        .iter()
        .filter(|answer| answer.status == StatusCode::CREATED)
        .collect();
    ensure!(won.len() == 1, "{} won: {answers:#?}", won.len());
    let version = won[0].version()?;
    for lost in answers.iter().filter(|a| a.status != StatusCode::CREATED) {
        lost.mismatch(Some(version))?;
    }
    for api in apis {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(
            read.version()? == version,
            "{version} won, then came {read:?}"
        );
    }
    Ok(version)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_racers_one_wins_while_their_key_is_in_the_log() -> Result<()> {
    let world = World::shared().await?;
    let apis = two_apis(&world).await?;
    for round in 0..5 {
        let key = format!("k{round}");
        let absent = || ("if-none-match", "*".to_owned());
        let created = race(&apis, &key, absent()).await?;
        let replaced = race(&apis, &key, ("if-match", tag(created))).await?;
        assert!(replaced > created);
        apis[0].delete(&key).await?.expect(StatusCode::NO_CONTENT)?;
        race(&apis, &key, absent()).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_racers_one_wins_while_nothing_of_their_key_is_in_the_log() -> Result<()> {
    let world = World::shared().await?;
    let apis = two_apis(&world).await?;
    let _worker = world.eager_worker().await?;
    for round in 0..5 {
        let key = format!("k{round}");
        let absent = || ("if-none-match", "*".to_owned());
        let created = race(&apis, &key, absent()).await?;
        trimmed(&world).await?;
        race(&apis, &key, ("if-match", tag(created))).await?;
        apis[0].delete(&key).await?.expect(StatusCode::NO_CONTENT)?;
        trimmed(&world).await?;
        race(&apis, &key, absent()).await?;
    }
    Ok(())
}

/// An API whose conditional writes can be held between their pin and what PostgreSQL says, and behind that.
struct Held<'a> {
    world: &'a World<'a>,
    api: Arc<Api>,
    nats: Proxy,
    /// A transaction that keeps lookups waiting.
    lock: JoinHandle<Result<String>>,
}

impl<'a> Held<'a> {
    async fn start(world: &'a World<'static>, publish_timeout: &str) -> Result<Self> {
        let nats = world.stack.nats.proxy()?;
        let mut env = world.env.replica()?;
        env.through(&nats)
            .set("NATS_PUBLISH_TIMEOUT", publish_timeout);
        let api = Arc::new(Api::start(&env).await?);
        let (stack, database) = (world.stack, world.env.vars["POSTGRES_DB"].clone());
        let lock = tokio::spawn(async move {
            let sql = "begin; lock table dead_keys in access exclusive mode; select pg_sleep(60)";
            stack.psql(&database, sql).await
        });
        eventually("the lock is held", async || {
            let sleeping = "select count(*) from pg_stat_activity
                where datname = current_database() and wait_event = 'PgSleep'";
            Ok((world.sql(sleeping).await?.trim() == "1").then_some(()))
        })
        .await?;
        Ok(Self {
            world,
            api,
            nats,
            lock,
        })
    }

    /// Starts to create `key`; returns when its pin is in the log, and PostgreSQL was asked and does not answer.
    /// `n` counts those that wait then.
    async fn create(&self, key: &str, value: &str, n: usize) -> Result<JoinHandle<Result<Answer>>> {
        let (_, before) = self.world.log_depth().await?;
        let (api, key, value) = (self.api.clone(), key.to_owned(), value.to_owned());
        let writing = tokio::spawn(async move { api.post_if(&key, ABSENT, &value).await });
        eventually("the lookup waits", async || {
            let waiting = "select count(*) from pg_stat_activity
                where datname = current_database() and application_name = 'birb-nest api' and wait_event_type = 'Lock'";
            Ok((self.world.sql(waiting).await?.trim() == n.to_string()).then_some(()))
        })
        .await?;
        let (_, after) = self.world.log_depth().await?;
        ensure!(after == before + 1, "no pin: {before}, then {after}");
        Ok(writing)
    }

    async fn release_postgresql(&mut self) -> Result<()> {
        let end = "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and wait_event = 'PgSleep'";
        self.world.sql(end).await?;
        // It ends with an error: its connection was closed.
        (&mut self.lock).await?.err().context("the lock was held")?;
        Ok(())
    }

    /// Lets PostgreSQL answer, and returns when the condition was judged and the write is on its way, which goes no further
    /// than a stalled link.
    async fn go_on_up_to_publish(&mut self, key: &str) -> Result<()> {
        self.nats.stall();
        self.release_postgresql().await?;
        eventually("the writer takes its lease", async || {
            let found = self.world.in_redis(key).await?;
            Ok(found.filter(|value| value.starts_with('T')))
        })
        .await?;
        Ok(())
    }
}

/// Whatever the API had on its way to the log is there by then: it comes before what is asked now, or its connection is gone.
async fn link_works(api: &Api, key: &str) -> Result<()> {
    eventually("the link works again", async || {
        let headers = [("cache-control", "no-cache")];
        let answer = api.ask(Method::GET, key, &headers).await?;
        Ok((answer.status == StatusCode::OK).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_racer_stopped_between_pin_and_write_does_not_win_late() -> Result<()> {
    let world = World::shared().await?;
    for is_trimmed in [false, true] {
        let key = format!("k{is_trimmed}");
        let mut held = Held::start(&world, "20s").await?;
        let other = world.api().await?;
        let late = held.create(&key, "\"late\"", 1).await?;
        held.go_on_up_to_publish(&key).await?;
        held.api.process.pause().await?;
        // The pin of the one that was stopped serves the other.
        let won = other.post_if(&key, ABSENT, "\"won\"").await?;
        let won = won.expect(StatusCode::CREATED)?.version()?;
        if is_trimmed {
            let _worker = world.eager_worker().await?;
            trimmed(&world).await?;
        }
        held.nats.resume();
        held.api.process.resume().await?;
        let late = late.await??;
        // Its connection may have been given up for dead meanwhile.
        if late.status == StatusCode::SERVICE_UNAVAILABLE {
            late.refused("UNKNOWN_OUTCOME")?;
        } else {
            late.mismatch(Some(won))?;
        }
        link_works(&held.api, &key).await?;
        for api in [&other, &*held.api] {
            assert_eq!(api.read(&key).await?.as_deref(), Some("\"won\""));
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_write_of_unknown_outcome_is_repeated_safely_and_does_not_come_late() -> Result<()> {
    let world = World::shared().await?;
    let mut held = Held::start(&world, "4s").await?;
    let other = world.api().await?;
    let unknown = held.create("k", "\"first\"", 1).await?;
    held.go_on_up_to_publish("k").await?;
    unknown.await??.refused("UNKNOWN_OUTCOME")?;
    let repeated = other.post_if("k", ABSENT, "\"repeated\"").await?;
    let version = repeated.expect(StatusCode::CREATED)?.version()?;
    held.nats.resume();
    link_works(&held.api, "k").await?;
    let headers = [("cache-control", "no-cache")];
    let read = other.ask(Method::GET, "k", &headers).await?;
    assert_eq!(read.expect(StatusCode::OK)?.version()?, version);
    Ok(())
}

#[tokio::test]
async fn pins_of_a_killed_api_hinder_nobody_and_leave_the_log() -> Result<()> {
    let world = World::shared().await?;
    let other = world.api().await?;
    let worker = world.eager_worker().await?;
    other.write("stored", "1").await?;
    trimmed(&world).await?;
    drop(worker);
    let mut held = Held::start(&world, "20s").await?;
    let mut left = Vec::new();
    let keys = ["stored", "created", "replaced", "left"];
    for (n, key) in keys.iter().enumerate() {
        left.push(held.create(key, "\"dead\"", n + 1).await?);
    }
    held.api.process.kill().await?;
    held.release_postgresql().await?;
    for writing in left {
        ensure!(writing.await?.is_err(), "it was answered");
    }
    world.flush_redis().await?;
    assert_eq!(other.read("stored").await?.as_deref(), Some("1"));
    other.get("left").await?.expect(StatusCode::NOT_FOUND)?;
    other
        .post_if("created", ABSENT, "1")
        .await?
        .expect(StatusCode::CREATED)?;
    other.write("replaced", "1").await?;
    assert_eq!(world.log_depth().await?.0, 4, "no pins, nothing was shown");
    let _worker = world.eager_worker().await?;
    trimmed(&world).await?;
    let rows = world
        .sql("select key from cache_entries order by key")
        .await?;
    assert_eq!(
        rows.split_whitespace().collect::<Vec<_>>(),
        ["created", "replaced", "stored"]
    );
    other.get("left").await?.expect(StatusCode::NOT_FOUND)?;
    other
        .post_if("left", ABSENT, "1")
        .await?
        .expect(StatusCode::CREATED)?;
    Ok(())
}

/// A conditional write that succeeded: from which version, to which. `None` is a key without a value.
type Step = (Option<u64>, Option<u64>);

/// Knows the key by the answers to its own attempts, and tries to be the one that replaces what is there.
async fn contend(api: Arc<Api>, n_left: Arc<AtomicU64>) -> Result<Vec<Step>> {
    let (mut steps, mut known) = (Vec::new(), None);
    while n_left.load(Ordering::Relaxed) > 0 {
        let current = known.map(tag);
        let headers = match &current {
            Some(current) => [("if-match", current.as_str())],
            None => [("if-none-match", "*")],
        };
        let answer = if known.is_some() && rand::random_bool(0.3) {
            api.ask(Method::DELETE, "k", &headers).await?
        } else {
            api.post_if("k", &headers, "1").await?
        };
        let found = match answer.header("etag") {
            "" => None,
            _ => Some(answer.version()?),
        };
        match answer.status {
            StatusCode::CREATED | StatusCode::NO_CONTENT => {
                steps.push((known, found));
                let _ =
                    n_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
            }
            StatusCode::PRECONDITION_FAILED => {}
            _ => ensure!(false, "unexpected answer: {answer:?}"),
        }
        known = found;
    }
    Ok(steps)
}

/// Every version is replaced by exactly one write, so that all that succeeded form one chain: no update is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditional_writes_of_many_form_one_chain() -> Result<()> {
    let world = World::shared().await?;
    let apis = two_apis(&world).await?;
    // So the key is now in the log, now in PostgreSQL alone.
    let _worker = world.eager_worker().await?;
    let n_left = Arc::new(AtomicU64::new(400));
    let clients: Vec<_> = (0..6)
        .map(|n| tokio::spawn(contend(apis[n % 2].clone(), n_left.clone())))
        .collect();
    let mut steps = Vec::new();
    for client in clients {
        steps.extend(client.await??);
    }
    let mut next = BTreeMap::new();
    let (mut n_created, mut n_deleted, mut made) = (0, 0, BTreeSet::new());
    for (from, to) in &steps {
        match from {
            Some(from) => {
                let other = next.insert(*from, *to);
                ensure!(
                    other.is_none(),
                    "{from} was replaced by {to:?} and {other:?}"
                );
            }
            None => n_created += 1,
        }
        match to {
            Some(to) => {
                ensure!(made.insert(*to), "{to} was given twice");
                ensure!(from.is_none_or(|from| from < *to), "{from:?} became {to}");
            }
            None => n_deleted += 1,
        }
    }
    for from in next.keys() {
        ensure!(made.contains(from), "{from} was replaced and never written");
    }
    let last: Vec<u64> = made
        .iter()
        .copied()
        .filter(|version| !next.contains_key(version))
        .collect();
    let read = apis[0]
        .ask(Method::GET, "k", &[("cache-control", "no-cache")])
        .await?;
    let present = match read.status {
        StatusCode::NOT_FOUND => Vec::new(),
        _ => vec![read.expect(StatusCode::OK)?.version()?],
    };
    assert_eq!(last, present, "what nobody replaced is what is there");
    assert_eq!(n_created, n_deleted + present.len());
    println!(
        "{} writes: {n_created} created, {n_deleted} deleted",
        steps.len()
    );
    Ok(())
}
