//! A log that lost its tail is noticed before anybody writes to it, and replaced; nothing acknowledged after that is lost.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use birb_nest_core::{Base, Key, Shard};
use birb_nest_stack::Role;
use birb_nest_store::{Clock, LogConfig, jetstream::Log, postgres::Database};
use reqwest::{Method, StatusCode};

use crate::{
    shown::{is_counted, is_told},
    world::{Api, PATIENCE, World, breakable, eventually, write_all},
};

pub async fn bases(world: &World<'_>) -> Result<Vec<u64>> {
    let rows = world
        .sql("select base from shard_state order by shard")
        .await?;
    rows.lines().map(|line| Ok(line.trim().parse()?)).collect()
}

/// Waits until a write of every shard succeeds.
pub async fn takes_writes(api: &Api) -> Result<()> {
    for n in 0..64 {
        eventually("writes are taken again", async || {
            let answer = api.post(&format!("probe{n}"), "{\"value\":0}").await?;
            if answer.status == StatusCode::SERVICE_UNAVAILABLE {
                ensure!(!answer.header("retry-after").is_empty(), "{answer:?}");
                return Ok(None);
            }
            answer.expect(StatusCode::CREATED).map(Some)
        })
        .await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_put_back_to_an_earlier_copy_is_fenced_and_begins_another_life() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = Arc::new(world.api().await?);
    let other = Arc::new(Api::start(&world.env.replica()?).await?);
    let worker = world.worker().await?;
    let before = write_all(&api, "before", 200).await?;
    let copy = stack.nats.snapshot().await?;
    // Acknowledged, stored, and gone from the log that comes back.
    let lost = write_all(&api, "lost", 200).await?;
    world.all_stored(lost.iter()).await?;
    let old_bases = bases(&world).await?;
    // One API does not notice anything while it happens.
    other.process.pause().await?;
    stack.nats.kill().await?;
    stack.nats.restore(&copy).await?;
    stack.nats.start().await?;
    takes_writes(&api).await?;
    let new_bases = bases(&world).await?;
    ensure!(
        old_bases.iter().zip(&new_bases).all(|(old, new)| new > old),
        "{old_bases:?} {new_bases:?}"
    );
    is_counted(
        &world.env.worker_url(),
        "birbnest_log_lives_begun_total",
        "",
    )
    .await?;
    let begins = "the log of a shard is stored to its end, and begins another life";
    is_told(&worker, begins).await?;
    // Who dials later than that sees nothing change.
    let changed = "the log of a shard changed its life";
    eventually("one of them says that the log changed", async || {
        let told = [api.process.log()?, worker.log()?].concat();
        Ok(told.contains(changed).then_some(()))
    })
    .await?;
    let fences = "the log of a shard lost its tail: fencing it";
    let told = [api.process.log()?, worker.log()?].concat();
    ensure!(told.contains(fences), "nobody says who fenced it: {told}");
    other.process.resume().await?;
    takes_writes(&other).await?;

    let (one, two) = tokio::try_join!(
        write_all(&api, "after", 200),
        write_all(&other, "other", 200)
    )?;
    let mut newest = before
        .values()
        .chain(lost.values())
        .copied()
        .max()
        .context("some")?;
    ensure!(
        one.values()
            .chain(two.values())
            .all(|version| *version > newest),
        "a version went back"
    );
    // Overwriting what the log lost gives a newer version of the key.
    let again = write_all(&other, "lost", 200).await?;
    for (key, version) in &again {
        ensure!(
            version > &lost[key],
            "{key} went from {} to {version}",
            lost[key]
        );
        newest = newest.max(*version);
    }
    let all = before.iter().chain(&one).chain(&two).chain(&again);
    world.all_stored(all.clone()).await?;
    for (key, version) in all {
        for api in [&api, &other] {
            let read = api.get(key).await?.expect(StatusCode::OK)?.version()?;
            ensure!(
                read == *version,
                "{key}: read {read}, {version} was acknowledged"
            );
        }
    }
    Ok(())
}

/// No worker runs: the log stays fenced, and what it holds is older than what PostgreSQL has.
#[tokio::test]
async fn a_log_that_came_back_older_does_not_hide_newer_rows() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let old = write_all(&api, "k", 40).await?;
    world.all_stored(old.iter()).await?;
    let copy = stack.nats.snapshot().await?;
    let new = write_all(&api, "k", 40).await?;
    world.all_stored(new.iter()).await?;
    worker.kill().await?;
    stack.nats.kill().await?;
    stack.nats.restore(&copy).await?;
    stack.nats.start().await?;
    eventually("the log is back, and fenced", async || {
        let answer = api.post("k0", "{\"value\":0}").await?;
        let health = api
            .send(reqwest::Method::GET, "/health", None)
            .await?
            .json()?;
        Ok(
            (health["checks"]["nats"] == "ok" && answer.status == StatusCode::SERVICE_UNAVAILABLE)
                .then_some(()),
        )
    })
    .await?;
    for flushed in [false, true] {
        if flushed {
            world.flush_redis().await?;
        }
        for (key, version) in &new {
            let read = api.get(key).await?.expect(StatusCode::OK)?;
            ensure!(
                read.version()? == *version,
                "{key}: {version} was stored, {read:?} was read"
            );
        }
    }
    let _heir = world.worker().await?;
    takes_writes(&api).await?;
    for (key, version) in &new {
        ensure!(api.get(key).await?.expect(StatusCode::OK)?.version()? == *version);
    }
    Ok(())
}

/// Nobody can ask PostgreSQL how far it has stored, and the API that writes next knows nothing of what the log lost. The
/// worker does: it stored it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_lost_while_postgresql_is_down_is_noticed_by_whoever_saw_it() -> Result<()> {
    let stack = breakable().await?;
    let world = World::on(&stack).await?;
    let fresh = Arc::new(Api::start(&world.env.replica()?).await?);
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let before = write_all(&api, "before", 100).await?;
    world.all_stored(before.iter()).await?;
    let copy = stack.nats.snapshot().await?;
    let lost = write_all(&api, "lost", 100).await?;
    world.all_stored(lost.iter()).await?;
    api.process.kill().await?;
    fresh.process.pause().await?;
    stack.postgres.kill().await?;
    stack.nats.kill().await?;
    stack.nats.restore(&copy).await?;
    stack.nats.start().await?;
    eventually("the worker fences all shards", async || {
        let n_fenced = worker.log()?.matches("lost its tail: fencing it").count();
        Ok((n_fenced >= 8).then_some(()))
    })
    .await?;
    fresh.process.resume().await?;
    for key in lost.keys() {
        fresh
            .post(key, "{\"value\":\"repeated\"}")
            .await?
            .refused("UNAVAILABLE")?;
    }
    stack.postgres.start().await?;
    takes_writes(&fresh).await?;
    // What is only there is not read before it is known to be back.
    eventually("all is well again", async || {
        let health = fresh.send(Method::GET, "/health", None).await?.json()?;
        Ok((health["status"] == "healthy").then_some(()))
    })
    .await?;
    for (key, version) in before.iter().chain(&lost) {
        let read = fresh.get(key).await?.expect(StatusCode::OK)?.version()?;
        ensure!(read == *version, "{key}: read {read}, {version} was stored");
    }
    let again = write_all(&fresh, "lost", 100).await?;
    ensure!(again.iter().all(|(key, version)| *version > lost[key]));
    world.all_stored(again.iter()).await
}

/// Workers that own the shards learn of it, though nothing happens to their own connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_by_somebody_else_is_noticed_by_owners_that_read_on() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let _worker = world.worker().await?;
    let before = write_all(&api, "k", 40).await?;
    world.all_stored(before.iter()).await?;
    let old = bases(&world).await?;
    world.fence_all().await?;
    takes_writes(&api).await?;
    let new = bases(&world).await?;
    ensure!(
        old.iter().zip(&new).all(|(old, new)| new > old),
        "{old:?} {new:?}"
    );
    for (key, version) in write_all(&api, "k", 40).await? {
        ensure!(
            version > before[&key],
            "{key} went from {} to {version}",
            before[&key]
        );
    }
    Ok(())
}

/// Whoever judged the former life may fence it late, when the next one has writes already: they are there, and stay there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_fence_of_the_former_life_loses_nothing_of_the_next() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let old = write_all(&api, "k", 40).await?;
    world.all_stored(old.iter()).await?;
    let former = world.subjects().await?;
    world.fence_all().await?;
    takes_writes(&api).await?;
    worker.terminate(PATIENCE).await?;
    // Nobody stores them meanwhile.
    let new = write_all(&api, "k", 40).await?;
    world.fence(&former).await?;
    let other = Api::start(&world.env.replica()?).await?;
    for flushed in [false, true] {
        if flushed {
            world.flush_redis().await?;
        }
        for (key, version) in &new {
            for api in [&api, &other] {
                let answer = api.get(key).await?;
                if answer.status == StatusCode::SERVICE_UNAVAILABLE {
                    continue;
                }
                let read = answer.expect(StatusCode::OK)?;
                ensure!(read.version()? == *version, "{version} is newest: {read:?}");
            }
        }
    }
    let _worker = world.worker().await?;
    takes_writes(&api).await?;
    world.all_stored(new.iter()).await?;
    world.flush_redis().await?;
    for (key, version) in &new {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == *version, "{version} is newest: {read:?}");
    }
    Ok(())
}

/// An owner may be stopped before its last steps, the purge of what it stored and the opening of the life that it recorded. When it
/// goes on, the life after that one has writes already: they are there, and stay there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_former_owner_that_purges_and_opens_late_takes_nothing_from_the_next_life() -> Result<()>
{
    let world = World::shared().await?;
    let clock = Arc::new(Clock::new());
    let config: LogConfig = world.config()?;
    let database =
        Database::open(&world.config()?, "test", clock.clone(), config.nats_shards).await?;
    let log = Log::open(config, 0, database.progress(), clock).await?;
    let api = Arc::new(world.api().await?);
    let worker = world.worker().await?;
    let old = write_all(&api, "k", 40).await?;
    world.all_stored(old.iter()).await?;
    let former = log.session().context("the log is there")?;
    let mut late = Vec::new();
    for (shard, base) in (0..8).map(Shard::from_index).zip(bases(&world).await?) {
        let base = Base::new(base).context("a base")?;
        let drained = base.sequence(former.depth(shard).await?.last);
        late.push((shard, base, drained));
    }
    world.fence_all().await?;
    takes_writes(&api).await?;
    worker.terminate(PATIENCE).await?;
    // Nobody stores them meanwhile.
    let mut versions = write_all(&api, "k", 40).await?;
    for (shard, base, drained) in late {
        former.open_life(shard, base, Some(drained)).await?;
    }
    // One knows better than the log, the other asks PostgreSQL: neither writes into the former life.
    let other = Api::start(&world.env.replica()?).await?;
    for api in [&*api, &other] {
        for key in versions.keys() {
            let answer = api.post(key, "{\"value\":\"late\"}").await?;
            ensure!(
                answer.status == StatusCode::SERVICE_UNAVAILABLE,
                "{answer:?}"
            );
        }
    }
    let _worker = world.worker().await?;
    takes_writes(&api).await?;
    world.all_stored(versions.iter()).await?;
    world.flush_redis().await?;
    for (key, version) in &versions {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == *version, "{version} is newest: {read:?}");
    }
    let newer = write_all(&api, "k", 40).await?;
    ensure!(newer.iter().all(|(key, version)| *version > versions[key]));
    versions.extend(newer);
    world.all_stored(versions.iter()).await
}

/// Its owner is stopped when the log is fenced; another one stores it to its end, and what the first wakes up with does no harm.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_is_stopped_over_a_fenced_log_is_replaced() -> Result<()> {
    let mut world = World::shared().await?;
    world
        .env
        .set("WORKER_STALL_TIMEOUT", "2s")
        .set("WORKER_REBALANCE_INTERVAL", "100ms");
    let api = Arc::new(world.api().await?);
    let stopped = world.worker().await?;
    let before = write_all(&api, "before", 40).await?;
    world.all_stored(before.iter()).await?;
    stopped.pause().await?;
    let mut versions = write_all(&api, "unstored", 40).await?;
    world.fence_all().await?;
    let mut env = world.env.replica()?;
    env.set("WORKER_STALL_TIMEOUT", "2s")
        .set("WORKER_REBALANCE_INTERVAL", "100ms");
    let _next = env.start(Role::Worker).await?;
    takes_writes(&api).await?;
    versions.extend(write_all(&api, "after", 40).await?);
    stopped.resume().await?;
    versions.extend(write_all(&api, "later", 40).await?);
    versions.extend(before);
    world.all_stored(versions.iter()).await?;
    world.flush_redis().await?;
    for (key, version) in &versions {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == *version, "{version} is newest: {read:?}");
    }
    ensure!(world.sql("select count(*) from dead_keys").await?.trim() == "0");
    Ok(())
}

/// What is refused for good becomes a dead letter also when a fenced log is stored to its end; its shard goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_write_in_a_fenced_log_does_not_keep_its_shard_closed() -> Result<()> {
    let world = World::shared().await?;
    world.sql(crate::dead_letters::REFUSE).await?;
    let api = Arc::new(world.api().await?);
    let neighbours = write_all(&api, "k", 40).await?;
    let poison = api.write("poison", "1").await?;
    world.fence_all().await?;
    let _worker = world.worker().await?;
    takes_writes(&api).await?;
    world.all_stored(neighbours.iter()).await?;
    let dead = world.sql("select key, version from dead_keys").await?;
    ensure!(dead.trim() == format!("poison|{poison}"), "{dead}");
    ensure!(api.get("poison").await?.version()? == poison);
    Ok(())
}

/// A fenced log is stored from its first message on, and so is what was refused before: it has its letter already,
/// unless that is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_write_that_comes_again_from_a_fenced_log_has_one_letter() -> Result<()> {
    let world = World::shared_with(&[("NATS_SHARDS", "1"), ("LOG_TRIM_LAG", "1h")]).await?;
    world.sql(crate::dead_letters::REFUSE).await?;
    let api = Arc::new(world.api().await?);
    let mut poisons = Vec::new();
    for key in ["poison kept", "poison lost"] {
        poisons.push((key, api.write(key, "1").await?));
    }
    let _worker = world.worker().await?;
    let dead = async || {
        let rows = world
            .sql("select dlq_seq from dead_keys order by key")
            .await?;
        let rows = rows.lines().filter(|row| !row.is_empty());
        Ok::<_, anyhow::Error>(rows.map(str::parse).collect::<Result<Vec<u64>, _>>()?)
    };
    let before = eventually("both are dead", async || {
        Ok(Some(dead().await?).filter(|dead| dead.len() == 2))
    })
    .await?;
    let jetstream = world.jetstream().await?;
    let name = &world.env.vars["NATS_DLQ_STREAM_NAME"];
    let letters = jetstream.get_stream(name).await?;
    ensure!(letters.delete_message(before[1]).await?);
    world.fence_all().await?;
    takes_writes(&api).await?;
    world.flush_redis().await?;
    for (key, version) in poisons {
        let read = api.get(key).await?.expect(StatusCode::OK)?;
        ensure!(read.version()? == version, "{key}: {read:?}");
    }
    let after = dead().await?;
    ensure!(
        after[0] == before[0] && after[1] > before[1],
        "{before:?}, {after:?}"
    );
    Ok(())
}

/// The log loses its tail under a connection that stands, and nobody else knows: the number of the next acknowledgement is the
/// only sign.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledgement_with_a_number_that_was_used_fences_the_log() -> Result<()> {
    let world = World::shared().await?;
    let api = Arc::new(world.api().await?);
    let mut before = 0;
    for n in 0..3 {
        before = api.write("k", &n.to_string()).await?;
    }
    let log: LogConfig = world.config()?;
    let shard = log.nats_shards.shard_of(&Key::parse("k")?);
    let jetstream = world.jetstream().await?;
    let name = format!("{}_{shard}", log.nats_stream_name);
    let settings = jetstream
        .get_stream(&name)
        .await?
        .cached_info()
        .config
        .clone();
    jetstream.delete_stream(&name).await?;
    jetstream.create_stream(settings).await?;
    let unknown = api.post("k", r#"{"value":"reused"}"#).await?;
    unknown
        .expect(StatusCode::SERVICE_UNAVAILABLE)?
        .refused("UNKNOWN_OUTCOME")?;
    is_counted(&api.url, "birbnest_errors_total", "log_lost_its_tail").await?;
    let refused = api.post("k", r#"{"value":"refused"}"#).await?;
    refused
        .expect(StatusCode::SERVICE_UNAVAILABLE)?
        .refused("UNAVAILABLE")?;
    let ready = api.send(Method::GET, "/readyz", None).await?.json()?;
    ensure!(ready["fenced_shards"] == 1, "{ready}");
    eventually("the metric says so, too", async || {
        let fenced = api.metric("birbnest_shards_fenced").await?;
        Ok((fenced.values().sum::<f64>() == 1.0).then_some(()))
    })
    .await?;
    let _worker = world.worker().await?;
    takes_writes(&api).await?;
    let after = api.write("k", "\"after\"").await?;
    ensure!(after > before, "{after} came after {before}");
    world.stored("k", after).await?;
    eventually("all is told to be well", async || {
        let ready = api.send(Method::GET, "/readyz", None).await?.json()?;
        Ok((ready["fenced_shards"] == 0).then_some(()))
    })
    .await
}
