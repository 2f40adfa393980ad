//! What an API server, and the way to it, may do to an operator.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{
    Fault, Operator, PATIENCE, Proxy, Request, THROUGH_PROXY, client, eventually, install, requests,
};
use birb_nest_operator::{api::BirbNest, render::Kind};
use birb_nest_stack::Root;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, DynamicObject, PostParams},
};

use crate::{
    drift::meddle,
    kubelet::Kubelet,
    leaders::{LEASE, until_held_by},
    world::{Shared, World},
};

/// As many workers as are said, so that no other manager says how many.
const FIXED: &str = "{worker: {scaling: {mode: Fixed, replicas: 2}}}";

/// Nothing but watches brings a pass about here: the resync and the repetition of what is blocked are far away.
#[tokio::test]
async fn no_refusal_and_no_cut_ends_a_watch() -> Result<()> {
    let flags = ["--lease-duration=120s", "--retry=1h", "--resync=1h"];
    let (shared, proxy) = Shared::behind_proxy("refusals", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create("before", FIXED).await?;
    world.until_ready("before", "True", "Available").await?;
    let mut watched: BTreeSet<String> = Kind::ALL
        .into_iter()
        .map(|kind| kind.api_resource().plural)
        .collect();
    watched.insert("birbnests".to_owned());

    for (number, fault) in [
        Fault::Refuse(429),
        Fault::Refuse(500),
        Fault::WatchError(410),
        Fault::WatchError(429),
        Fault::WatchError(500),
        Fault::WatchGarbage,
        Fault::HoldAll,
    ]
    .into_iter()
    .enumerate()
    {
        proxy.fault(fault);
        eventually(&format!("all watches meet {fault:?}"), || async {
            let missing: Vec<String> = watched.difference(&proxy.hit()).cloned().collect();
            Ok(if missing.is_empty() {
                Ok(())
            } else {
                Err(format!("{missing:?} do not"))
            })
        })
        .await?;
        proxy.heal();
        let name = format!("after-{number}");
        world.create(&name, FIXED).await?;
        world.until_ready(&name, "True", "Available").await?;
        println!("{fault:?}: survived");
    }
    every_watch_lives(&world).await?;
    let text = reqwest::get(format!("{}/metrics", world.shared.operator.url))
        .await?
        .text()
        .await?;
    ensure!(
        text.contains("birbnest_operator_watch_errors_total{kind=\"BirbNest\"}"),
        "{text}"
    );
    world.finish().await
}

/// What is deleted is made again, of whatever kind; and a Secret that comes is seen.
async fn every_watch_lives(world: &World) -> Result<()> {
    for (kind, name, _) in world.objects("before").await? {
        if [Kind::Secret, Kind::Job].contains(&kind) {
            continue;
        }
        let resource = kind.api_resource();
        let api: Api<DynamicObject> =
            Api::namespaced_with(world.client.clone(), &world.namespace, &resource);
        let before = api.get(&name).await?.uid();
        api.delete(&name, &DeleteParams::background()).await?;
        eventually(
            &format!("{} {name} is there again", kind.as_str()),
            || async {
                let now = api.get_opt(&name).await?.and_then(|object| object.uid());
                Ok(if now.is_some() && now != before {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                })
            },
        )
        .await?;
    }
    let external = "{postgres: {external: {urlSecretRef: {name: servers, key: postgres}}}}";
    world.create("reader", external).await?;
    world
        .until_ready("reader", "False", "SecretMissing")
        .await?;
    world
        .secret("servers", &[("postgres", "postgres://birb@db/birb")])
        .await?;
    world
        .until_ready("reader", "True", "Available")
        .await
        .map(drop)
}

/// Kubernetes would kill it after a minute, and the next one would wait for the Lease all that time.
#[tokio::test]
async fn a_leader_that_was_never_answered_ends_when_it_is_told_to() -> Result<()> {
    let root = Root::temporary("unanswered", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let leases = Api::namespaced(client(&cluster).await?, &installation.namespace);
    let proxy = Proxy::start(&cluster).await?;
    proxy.fault(Fault::Refuse(500));
    let (dir, name) = (root.path(), "unanswered");
    let operator = Operator::start_through(&proxy, &cluster, &installation, dir, name, &[]).await?;
    until_held_by(&leases, &installation.name, name).await?;
    eventually("it asks for nests", || async {
        let hit = proxy.hit();
        Ok(if hit.contains("birbnests") {
            Ok(())
        } else {
            Err(format!("{hit:?}"))
        })
    })
    .await?;
    let end = operator.process.terminate(PATIENCE).await?;
    let log = operator.process.log()?;
    ensure!(
        end.success() && log.contains("gave back the Lease"),
        "{end}: {log}"
    );
    Ok(())
}

/// What a pass has begun it ends, status and all; the next one need not find out what was half done.
#[tokio::test]
async fn a_pass_under_way_is_finished_by_a_leader_that_is_told_to_end() -> Result<()> {
    let (shared, proxy) = Shared::behind_proxy("ending", &["--lease-duration=120s"]).await?;
    let world = World::on(shared).await?;
    let operator = &world.shared.operator.process;
    proxy.fault(Fault::HoldWrites);
    world.create("cache", "{}").await?;
    eventually("a write is held", || async {
        let hit = proxy.hit();
        Ok(if hit.is_empty() {
            Err("no write yet".to_owned())
        } else {
            Ok(())
        })
    })
    .await?;
    let ending = operator.terminate(PATIENCE);
    tokio::pin!(ending);
    let told = eventually("it knows that it is to end", || async {
        let log = operator.log()?;
        Ok(if log.contains("finishing the passes under way") {
            Ok(())
        } else {
            Err(log)
        })
    });
    tokio::select! {
        end = &mut ending => bail!("it ended amidst its pass: {}", end?),
        told = told => told?,
    }
    proxy.heal();
    let end = ending.await?;
    let log = operator.log()?;
    ensure!(
        end.success() && log.contains("gave back the Lease"),
        "{end}: {log}"
    );
    let ready = world
        .until_ready("cache", "False", "ServerNotReady")
        .await?;
    println!("{ready}");
    Ok(())
}

#[tokio::test]
async fn a_leader_that_cannot_renew_stops_before_the_next_one_starts() -> Result<()> {
    // It could go on writing for ever.
    cut_off(Fault::HoldElection).await
}

#[tokio::test]
async fn a_leader_that_is_cut_off_stops_before_the_next_one_starts() -> Result<()> {
    // What it was about to write may arrive when the link is there again.
    cut_off(Fault::HoldAll).await
}

/// Two operators, of which the leader's link has this fault; and somebody who never ceases to change what a leader puts back.
async fn cut_off(fault: Fault) -> Result<()> {
    let root = Root::temporary("partition", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let client = client(&cluster).await?;
    let leases = Api::namespaced(client.clone(), &installation.namespace);
    let lease = format!("--lease-duration={}s", LEASE.as_secs());
    let proxy = Proxy::start(&cluster).await?;
    let (dir, flags) = (root.path(), [lease.as_str()]);
    let first =
        Operator::start_through(&proxy, &cluster, &installation, dir, "first", &flags).await?;
    until_held_by(&leases, &installation.name, "first").await?;
    let _second = Operator::start_with(&cluster, &installation, dir, "second", &flags).await?;

    let nests: Api<BirbNest> = Api::default_namespaced(client.clone());
    let nest = BirbNest::new("cache", Default::default());
    nests.create(&PostParams::default(), &nest).await?;
    let meddler = meddle(Api::default_namespaced(client), "cache");
    // Writes of the first and of the second, but for those of the election.
    let writes = || -> Result<(Vec<Request>, Vec<Request>)> {
        let all = requests(&cluster, &installation)?.into_iter();
        let writes = all.filter(|request| request.is_write() && request.resource != "leases");
        Ok(writes.partition(|request| request.user_agent == THROUGH_PROXY))
    };
    eventually("the first puts back what was changed", || async {
        let n = writes()?
            .0
            .iter()
            .filter(|write| write.resource == "services")
            .count();
        Ok(if n >= 3 {
            Ok(())
        } else {
            Err(format!("{n} times"))
        })
    })
    .await?;

    let since = jiff::Timestamp::now();
    proxy.fault(fault);
    until_held_by(&leases, &installation.name, "second").await?;
    let held_until = jiff::Timestamp::now();
    // An answer to what is held would tell the first that it has lost the Lease.
    if fault == Fault::HoldAll {
        proxy.heal();
    }
    // Its first pass alone writes the five Services; after that each change is a race that the first might win.
    eventually("the second puts back what was changed", || async {
        let of_second = writes()?.1.into_iter();
        let n = of_second
            .filter(|write| write.resource == "services")
            .count();
        Ok(if n >= 15 {
            Ok(())
        } else {
            Err(format!("{n} times"))
        })
    })
    .await?;
    let end = tokio::time::timeout(PATIENCE, first.process.wait()).await;
    meddler.abort();
    let (of_first, of_second) = writes()?;
    let last = of_first
        .iter()
        .map(|write| write.answered)
        .max()
        .context("the first wrote")?;
    let next = of_second
        .iter()
        .map(|write| write.received)
        .min()
        .context("the second wrote")?;
    ensure!(
        last < next,
        "the first wrote until {last}, the second from {next} on"
    );
    let n_late = of_first
        .iter()
        .filter(|write| write.received > since)
        .count();
    println!(
        "{fault:?}: {n_late} writes of the first after its link failed; then {:?} of silence",
        next.duration_since(last)
    );
    let after = of_first.iter().find(|write| write.received > held_until);
    ensure!(
        after.is_none(),
        "the first wrote when the second led: {after:?}"
    );
    // Else this would show the link's cut, and not that it stops.
    ensure!(
        fault != Fault::HoldElection || n_late > 0,
        "the first did not go on at all"
    );

    let log = first.process.log()?;
    let end = end.with_context(|| format!("the first still runs: {log}"))??;
    ensure!(
        end.code() == Some(1) && log.contains("may not lead any more"),
        "{end}: {log}"
    );
    Ok(())
}
