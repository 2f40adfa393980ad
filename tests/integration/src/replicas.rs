//! Three NATS servers that replicate the log: any one of them may go, and reads ask the one that leads.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::stream::Info;
use birb_nest_stack::{Options, Role, Server, Stack};
use futures::StreamExt;
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::{
    dead_letters::REFUSE,
    world::{Api, PATIENCE, World, eventually},
};

async fn cluster() -> Result<Stack> {
    Stack::fresh_with(Options {
        n_nats_peers: 2,
        ..Options::default()
    })
    .await
}

/// What the cluster says of a shard's stream, asked of any server that answers.
async fn info(world: &World<'_>, shard: usize) -> Result<Info> {
    eventually("the stream has a leader", async || {
        for server in world.stack.nats_servers() {
            let url = format!("nats://127.0.0.1:{}", server.port());
            let Ok(client) = async_nats::connect(url).await else {
                continue;
            };
            let name = format!("{}_{shard}", world.env.vars["NATS_STREAM_NAME"]);
            if let Ok(stream) = async_nats::jetstream::new(client).get_stream(name).await {
                return Ok(Some(stream.cached_info().clone()));
            }
        }
        Ok(None)
    })
    .await
}

/// The server that leads a shard's stream, and one that follows.
async fn leader_and_follower(world: &World<'_>, shard: usize) -> Result<(Server, Server)> {
    let info = info(world, shard).await?;
    let leader = info.cluster.and_then(|cluster| cluster.leader);
    let leader = leader.context("a leader")?;
    let leads = |server: &&Server| leader.ends_with(&format!("-{}", server.port()));
    let servers = || world.stack.nats_servers();
    let follower = servers().find(|server| !leads(server));
    Ok((
        servers().find(leads).context("the leader")?.clone(),
        follower.context("a follower")?.clone(),
    ))
}

/// Waits until every server has all of every shard.
async fn in_step(world: &World<'_>) -> Result<()> {
    for shard in 0..8 {
        eventually("all replicas are current", async || {
            let cluster = info(world, shard).await?.cluster.context("a cluster")?;
            let current = cluster.replicas.iter().filter(|peer| peer.current);
            Ok((current.count() == 2).then_some(()))
        })
        .await?;
    }
    Ok(())
}

/// Each of many writers takes the version it finds and asks to replace just that, while leaders are killed: whoever was
/// told that it succeeded replaced what it had seen, and nobody else replaced the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_are_atomic_while_leaders_are_killed() -> Result<()> {
    let stack = cluster().await?;
    let world = World::on(&stack).await?;
    let apis = [
        Arc::new(world.api().await?),
        Arc::new(Api::start(&world.env.replica()?).await?),
    ];
    let _worker = world.eager_worker().await?;
    let done = Arc::new(AtomicBool::new(false));
    // Who replaced which version of which key by which.
    let replaced = Arc::new(Mutex::new(HashMap::<(String, u64), u64>::new()));
    let keys: Vec<String> = (0..24).map(|n| format!("k{n}")).collect();
    for key in &keys {
        apis[0].write(key, "0").await?;
    }
    let writers: Vec<_> = (0..8)
        .map(|n| {
            let (api, done, replaced) = (apis[n % 2].clone(), done.clone(), replaced.clone());
            let keys = keys.clone();
            tokio::spawn(async move {
                for round in n.. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let key = &keys[round % keys.len()];
                    let seen = api.get(key).await?;
                    if seen.status == StatusCode::SERVICE_UNAVAILABLE {
                        continue;
                    }
                    let seen = seen.expect(StatusCode::OK)?.version()?;
                    let tag = format!("\"{seen}\"");
                    let answer = api.post_if(key, &[("if-match", tag.as_str())], "1").await?;
                    if answer.status == StatusCode::CREATED {
                        let version = answer.version()?;
                        let other = replaced
                            .lock()
                            .unwrap()
                            .insert((key.clone(), seen), version);
                        ensure!(
                            other.is_none() && version > seen,
                            "{key}: {seen} was replaced by {other:?} and by {version}"
                        );
                    } else {
                        let refusals = [
                            StatusCode::PRECONDITION_FAILED,
                            StatusCode::SERVICE_UNAVAILABLE,
                        ];
                        ensure!(refusals.contains(&answer.status), "{answer:?}");
                    }
                }
                anyhow::Ok(())
            })
        })
        .collect();
    let n_replaced = || replaced.lock().unwrap().len();
    for shard in 0..3 {
        let goal = n_replaced() + 100;
        eventually("versions are replaced", async || {
            Ok((n_replaced() >= goal).then_some(()))
        })
        .await?;
        let (leader, _) = leader_and_follower(&world, shard).await?;
        leader.kill().await?;
        let goal = n_replaced() + 100;
        eventually("and without that leader", async || {
            Ok((n_replaced() >= goal).then_some(()))
        })
        .await?;
        leader.start().await?;
        in_step(&world).await?;
    }
    done.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await??;
    }
    Ok(())
}

#[derive(Default)]
struct Clients {
    done: AtomicBool,
    n_writes: AtomicU64,
    n_refused: AtomicU64,
    newest: Mutex<HashMap<String, u64>>,
}

/// Writes through one API and reads through the other, until told to stop.
async fn client(n: usize, apis: [Arc<Api>; 2], clients: Arc<Clients>) -> Result<()> {
    let mut round = 0u64;
    while !clients.done.load(Ordering::Relaxed) {
        round += 1;
        let key = format!("c{n}-{}", round % 5);
        let (writer, reader) = (&apis[n % 2], &apis[(n + 1) % 2]);
        let answer = writer.post(&key, format!("{{\"value\":{round}}}")).await?;
        if answer.status == StatusCode::CREATED {
            let version = answer.version()?;
            clients.n_writes.fetch_add(1, Ordering::Relaxed);
            let known = clients.newest.lock().unwrap().insert(key.clone(), version);
            ensure!(
                Some(version) > known,
                "{key} went from {known:?} to {version}"
            );
            // What Redis could not be told of may be missed for a while.
            if !answer.header("birb-cache").is_empty() {
                continue;
            }
            let read = reader.get(&key).await?;
            ensure!(
                read.status == StatusCode::SERVICE_UNAVAILABLE
                    || read.header("birb-cache") == "unconfirmed"
                    || read.clone().expect(StatusCode::OK)?.version()? >= version,
                "{key}: {version} was acknowledged, {read:?} was read"
            );
        } else {
            answer.expect(StatusCode::SERVICE_UNAVAILABLE)?;
            clients.n_refused.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_replicas_lose_no_acknowledged_write_when_their_leader_is_killed() -> Result<()> {
    let stack = cluster().await?;
    let world = World::on(&stack).await?;
    let apis = [
        Arc::new(world.api().await?),
        Arc::new(Api::start(&world.env.replica()?).await?),
    ];
    let _worker = world.worker().await?;
    let replicas = info(&world, 0).await?.config.num_replicas;
    ensure!(replicas == 3, "the streams have {replicas} replicas");
    let clients = Arc::new(Clients::default());
    let tasks: Vec<_> = (0..4)
        .map(|n| tokio::spawn(client(n, apis.clone(), clients.clone())))
        .collect();
    let progress = async |what: &str, n: u64| {
        let goal = clients.n_writes.load(Ordering::Relaxed) + n;
        eventually(what, async || {
            Ok((clients.n_writes.load(Ordering::Relaxed) >= goal).then_some(()))
        })
        .await
    };
    for shard in 0..3 {
        progress("writes begin", 200).await?;
        let (leader, _) = leader_and_follower(&world, shard).await?;
        leader.kill().await?;
        progress("writes go on without it", 200).await?;
        leader.start().await?;
        in_step(&world).await?;
    }
    clients.done.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await??;
    }
    let newest = clients.newest.lock().unwrap().clone();
    world.all_stored(newest.iter()).await?;
    for flushed in [false, true] {
        if flushed {
            world.flush_redis().await?;
        }
        for (key, version) in &newest {
            for api in &apis {
                let read = api.get(key).await?.expect(StatusCode::OK)?.version()?;
                // What was refused as unknown may have come after the last acknowledged one.
                ensure!(read >= *version, "{key}: read {read}, not {version}");
            }
        }
    }
    println!(
        "{} writes acknowledged and {} refused while three leaders were killed",
        clients.n_writes.load(Ordering::Relaxed),
        clients.n_refused.load(Ordering::Relaxed)
    );
    Ok(())
}

/// A follower that stood still does not know the newest writes when it goes on: an API that is connected to it must not
/// be answered by it.
#[tokio::test]
async fn a_server_that_lags_behind_the_leader_answers_no_read() -> Result<()> {
    let stack = cluster().await?;
    let world = World::on_with(&stack, &[("NATS_SHARDS", "1")]).await?;
    let (leader, follower) = leader_and_follower(&world, 0).await?;
    let at = async |server: &Server| {
        let mut env = world.env.replica()?;
        env.set("NATS_URL", format!("nats://127.0.0.1:{}", server.port()));
        Api::start(&env).await
    };
    let (near, far) = (at(&leader).await?, at(&follower).await?);
    let fillers = [0, 100].map(|first| {
        let keys = (first..first + 100).map(|n| format!("filler{n}"));
        let entries: Vec<_> = keys.map(|key| json!({"key": key, "value": 1})).collect();
        json!({ "entries": entries }).to_string()
    });
    let mut n_answered = 0;
    for round in 0..10 {
        eventually("the follower answers", async || {
            let answer = far.get("k").await?;
            Ok((answer.status != StatusCode::SERVICE_UNAVAILABLE).then_some(()))
        })
        .await?;
        follower.pause().await?;
        // It has much to catch up with, and the newest of it comes last.
        for batch in &fillers {
            near.send(Method::POST, "/v1/cache/batch/set", Some(batch.clone()))
                .await?
                .expect(StatusCode::OK)?;
        }
        let newest = near.write("k", &round.to_string()).await?;
        // Nothing but the log has it.
        world.flush_redis().await?;
        // The question is the first thing that it hears of.
        let mut asked = pin!(far.get("k"));
        let about_to_ask = eventually("the reader is about to ask the log", async || {
            let lease = world.in_redis("k").await?;
            Ok(lease.filter(|value| value.starts_with('T')))
        });
        // Who stood still for seconds has lost its clients: then nobody asks it.
        let early = tokio::select! {
            answer = &mut asked => Some(answer?),
            lease = about_to_ask => lease.map(|_| None)?,
        };
        follower.resume().await?;
        let read = match early {
            Some(answer) => answer,
            None => asked.await?,
        };
        if read.status == StatusCode::SERVICE_UNAVAILABLE {
            continue;
        }
        n_answered += 1;
        let read = read.expect(StatusCode::OK)?.version()?;
        ensure!(read == newest, "read {read}, {newest} was acknowledged");
    }
    ensure!(n_answered > 0, "nothing was answered at all");
    Ok(())
}

/// What each server is asked that any replica may answer, whether it has heard of the newest messages or not.
struct Watch(Vec<(async_nats::Client, async_nats::Subscriber)>);

impl Watch {
    const ALL: &str = "$JS.API.DIRECT.GET.>";
    const END: &str = "$JS.API.DIRECT.GET.THE_END";

    async fn begin(stack: &Stack) -> Result<Self> {
        let mut watched = Vec::new();
        for server in stack.nats_servers() {
            let url = format!("nats://127.0.0.1:{}", server.port());
            let client = async_nats::connect(url).await?;
            let asked = client.subscribe(Self::ALL).await?;
            client.flush().await?;
            watched.push((client, asked));
        }
        Ok(Self(watched))
    }

    /// The streams that were asked for something in this way; a server has told of what it was asked before.
    async fn end(self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for (client, mut asked) in self.0 {
            client.publish(Self::END, "".into()).await?;
            client.flush().await?;
            loop {
                let next = tokio::time::timeout(PATIENCE, asked.next()).await?;
                let subject = next.context("the server goes on telling")?.subject;
                if subject.as_str() == Self::END {
                    break;
                }
                names.push(subject.to_string());
            }
        }
        Ok(names)
    }
}

/// Processes that run do not learn that `setup` gave the log more replicas: they ask its leader from the beginning.
#[tokio::test]
async fn an_api_that_ran_when_the_log_got_replicas_asks_its_leader() -> Result<()> {
    let stack = cluster().await?;
    let mut world = World::not_set_up(&stack).await?;
    world.env.set("NATS_SHARDS", "1").set("NATS_REPLICAS", "1");
    world.env.setup().await?;
    let api = world.api().await?;
    let version = api.write("k", "1").await?;
    let mut env = world.env.clone();
    env.set("NATS_REPLICAS", "3");
    env.setup().await?;
    ensure!(info(&world, 0).await?.config.num_replicas == 3);
    let watch = Watch::begin(&stack).await?;
    // Nothing but the log has it.
    world.flush_redis().await?;
    let read = eventually("the log answers", async || {
        let read = api.get("k").await?;
        Ok((read.status != StatusCode::SERVICE_UNAVAILABLE).then_some(read))
    })
    .await?;
    ensure!(read.expect(StatusCode::OK)?.version()? == version);
    let asked = watch.end().await?;
    let name = &world.env.vars["NATS_STREAM_NAME"];
    ensure!(
        asked.iter().all(|subject| !subject.contains(name)),
        "{asked:?}"
    );
    Ok(())
}

/// Where there are no replicas, a direct get is the fastest, and says the same.
#[tokio::test]
async fn a_server_that_is_alone_is_asked_directly() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let version = api.write("k", "1").await?;
    world.flush_redis().await?;
    let watch = Watch::begin(world.stack).await?;
    let read = api.get("k").await?.expect(StatusCode::OK)?;
    ensure!(read.version()? == version);
    let asked = watch.end().await?;
    let name = &world.env.vars["NATS_STREAM_NAME"];
    ensure!(
        asked.iter().any(|subject| subject.contains(name)),
        "{asked:?}"
    );
    Ok(())
}

/// One that lags may say of a letter that there is none: its retry would end then, and it would look as if it were gone.
#[tokio::test]
async fn dead_letters_are_asked_of_their_leader() -> Result<()> {
    let stack = cluster().await?;
    let mut world = World::not_set_up(&stack).await?;
    world
        .env
        .set("NATS_SHARDS", "1")
        .set("NATS_DLQ_MAX_BYTES", "16MiB")
        .set("API_MAX_VALUE_BYTES", "3500KiB")
        // So much on three disks takes its time.
        .set("NATS_PUBLISH_TIMEOUT", "20s")
        .set("POSTGRES_TIMEOUT", "20s");
    world.env.setup().await?;
    world.sql(REFUSE).await?;
    let watch = Watch::begin(&stack).await?;
    let api = world.api().await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_DEAD_LETTER_RETRY", "100ms");
    let _worker = env.start(Role::Worker).await?;
    // Its leader's answers are a third larger than what is in it, and may be larger than what the server takes.
    let value = "x".repeat(3_500_000);
    let version = api.write("poison", &format!("\"{value}\"")).await?;
    let dead = async || {
        world
            .sql("select reason, next_try_at is null from dead_keys")
            .await
    };
    let why = eventually("it was tried again, and is parked", async || {
        let row = dead().await?;
        Ok(row.trim().strip_suffix("|t").map(str::to_owned))
    })
    .await?;
    ensure!(why.starts_with("no poison here"), "{why}");
    world.flush_redis().await?;
    let read = api.get("poison").await?.expect(StatusCode::OK)?;
    ensure!(read.version()? == version && read.json()?["value"] == value.as_str());
    let letters = api.send(Method::GET, "/v1/dead-letters", None).await?;
    let id = letters.json()?["dead_letters"][0]["id"].clone();
    let id = id.as_str().context("an id")?;
    let letter = format!("/v1/dead-letters/{id}");
    let one = api.send(Method::GET, &letter, None).await?;
    let entry = &one.expect(StatusCode::OK)?.json()?["entry"];
    ensure!(entry["version"] == version && entry["value"] == value.as_str());
    world.sql("drop trigger refuse on cache_entries").await?;
    api.send(Method::POST, &format!("{letter}/replay"), None)
        .await?
        .expect(StatusCode::ACCEPTED)?;
    world.stored("poison", version).await?;
    let name = &world.env.vars["NATS_DLQ_STREAM_NAME"];
    let jetstream = world.jetstream().await?;
    eventually("the letter is removed", async || {
        let stream = jetstream.get_stream(name).await?;
        Ok((stream.cached_info().state.messages == 0).then_some(()))
    })
    .await?;
    let asked = watch.end().await?;
    ensure!(
        asked.iter().all(|subject| !subject.contains(name)),
        "{asked:?}"
    );
    Ok(())
}
