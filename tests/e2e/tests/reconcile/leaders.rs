//! Several operators, of which one acts.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{
    Installation, Operator, PATIENCE, client, eventually, forbidden, install, nothing_forbidden,
};
use birb_nest_operator::{config::Election, leader::Elector};
use birb_nest_stack::Root;
use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{Api, api::PostParams};
use serde_json::json;
use tokio::sync::oneshot;

use crate::world::{World, shared};

/// Short, so that the test need not wait for long; and long enough for a machine that compiles beside it.
pub const LEASE: Duration = Duration::from_secs(6);

/// In a control plane of their own: the operator that all other tests share must not be disturbed.
#[tokio::test]
async fn a_killed_leader_is_followed_after_its_lease_and_a_stopped_one_at_once() -> Result<()> {
    let root = Root::temporary("leaders", |_| Ok(()))?;
    let dir = root.path().join("cluster");
    let cluster = Cluster::kept(&dir, Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let lease_name = installation.name.as_str();
    let leases: Api<Lease> = Api::namespaced(client(&cluster).await?, &installation.namespace);
    let start = async |name: &str| {
        let lease = format!("--lease-duration={}s", LEASE.as_secs());
        Operator::start_with(&cluster, &installation, root.path(), name, &[&lease]).await
    };
    let first = start("first").await?;
    until_held_by(&leases, lease_name, "first").await?;
    let second = start("second").await?;
    assert_eq!(first.metric("birbnest_operator_leader ").await?, 1.0);
    assert_eq!(second.metric("birbnest_operator_leader ").await?, 0.0);

    // Who has just come cannot know when that was done last.
    until_renewed(&leases, lease_name).await?;
    let killed = Timestamp::now();
    first.process.kill().await?;
    let last = leases.get(lease_name).await?.spec.context("a spec")?;
    assert_eq!(last.holder_identity.as_deref(), Some("first"));
    until_held_by(&leases, lease_name, "second").await?;
    let next = leases.get(lease_name).await?.spec.context("a spec")?;
    let (renewed, acquired) = (
        last.renew_time.context("a time")?,
        next.acquire_time.context("a time")?,
    );
    let between = acquired.0.duration_since(renewed.0).unsigned_abs();
    let after = acquired.0.duration_since(killed).unsigned_abs();
    println!("taken {between:?} after the last renewal, {after:?} after SIGKILL");
    assert!(
        between >= LEASE,
        "taken {between:?} after its last renewal, before it had ended"
    );
    // It had renewed the Lease when it was killed or before that. What comes on top is what a few requests take: of a busy machine
    // that is all that can be said here; the next test knows it better.
    let most = LEASE * 3 / 2;
    assert!(
        between <= most && after <= most,
        "taken {between:?} after its last renewal and {after:?} after SIGKILL"
    );
    let third = start("third").await?;

    let stopped = Instant::now();
    let end = second.process.terminate(PATIENCE).await?;
    assert!(end.success(), "{end}: {}", second.process.log()?);
    until_held_by(&leases, lease_name, "third").await?;
    // Given back: nobody had to wait for its end.
    assert!(
        second.process.log()?.contains("gave back the Lease"),
        "{}",
        second.process.log()?
    );
    println!(
        "the next one leads {:.1} s after SIGTERM",
        stopped.elapsed().as_secs_f64()
    );

    // Paused for longer than its lease, the leader is none any more; it must notice before it acts.
    let fourth = start("fourth").await?;
    third.process.pause().await?;
    until_held_by(&leases, lease_name, "fourth").await?;
    third.process.resume().await?;
    let end = third.process.wait().await?;
    assert_eq!(end.code(), Some(1), "{}", third.process.log()?);
    assert!(
        third.process.log()?.contains("may not lead any more"),
        "{}",
        third.process.log()?
    );
    fourth.process.terminate(PATIENCE).await?;
    nothing_forbidden(&cluster, &installation)
}

#[tokio::test]
async fn a_dead_leader_is_followed_the_moment_its_lease_has_run_out() -> Result<()> {
    let world = World::new().await?;
    let names = ["one", "two", "three", "four", "five"];
    let mut late = try_join_all(names.map(|name| lateness(&world, name))).await?;
    late.sort();
    println!("taken so long after its end: {late:?}");
    // One that looks every now and then is late by as long as that, since it has just looked. Of five, one is not slowed down by
    // other tests.
    assert!(late[0] <= LEASE / 6, "{late:?}");
    world.finish().await
}

/// How long after the end of a Lease it is taken by one who stood by, and had just looked when it was renewed for the last time.
async fn lateness(world: &World, name: &str) -> Result<Duration> {
    let (leases, params) = (world.of::<Lease>(), PostParams::default());
    let lease: Lease = serde_json::from_value(json!({
        "metadata": { "name": name },
        "spec": { "holderIdentity": "dead", "leaseDurationSeconds": LEASE.as_secs() },
    }))?;
    let mut lease = leases.create(&params, &lease).await?;
    let election = Election {
        lease_namespace: world.namespace.clone(),
        lease_name: name.to_owned(),
        lease_holder: None,
        lease_duration: LEASE,
    };
    let elector = Elector::new(world.client.clone(), &election, "next");
    let (looked, has_looked) = oneshot::channel();
    let renewal = async {
        has_looked.await?;
        let began = Instant::now();
        lease.metadata.annotations = Some([("renewed".to_owned(), "once".to_owned())].into());
        leases.replace(name, &params, &lease).await?;
        anyhow::Ok((began, Instant::now()))
    };
    let mut looked = Some(looked);
    let taking = async {
        let contact = || {
            if let Some(looked) = looked.take() {
                let _ = looked.send(());
            }
        };
        elector.acquire(contact).await;
        Instant::now()
    };
    let (renewed, taken) = tokio::join!(renewal, taking);
    // It was renewed at some time in between.
    let (began, ended) = renewed?;
    ensure!(taken >= began + LEASE, "it was taken before its end");
    Ok(taken.saturating_duration_since(ended + LEASE))
}

/// Each is wrong by more than any lease lasts, so what it knows of the times in the Lease says the opposite of the truth.
#[tokio::test]
async fn a_wrong_clock_neither_takes_a_lease_nor_leaves_it() -> Result<()> {
    let root = Root::temporary("clocks", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let leases: Api<Lease> = Api::namespaced(client(&cluster).await?, &installation.namespace);
    let lease_name = installation.name.as_str();
    let (dir, lease) = (
        root.path(),
        format!("--lease-duration={}s", LEASE.as_secs()),
    );
    let flags = [lease.as_str()];
    let wrong = async |offset, name| {
        Operator::start_wrong(offset, &cluster, &installation, dir, name, &flags).await
    };
    let right = Operator::start_with(&cluster, &installation, dir, "right", &flags).await?;
    until_held_by(&leases, lease_name, "right").await?;
    let ahead = wrong("+1h", "ahead").await?;
    let behind = wrong("-1h", "behind").await?;

    // Alive for longer than the whole lease, and led by one alone.
    let since = Timestamp::now();
    eventually("it was renewed for the whole of a lease", || async {
        let spec = leases.get(lease_name).await?.spec.context("a spec")?;
        ensure!(
            spec.holder_identity.as_deref() == Some("right") && spec.lease_transitions == Some(1),
            "taken from a leader that lives: {spec:?}"
        );
        let renewed = spec.renew_time.context("a time")?.0.duration_since(since);
        Ok(if renewed.unsigned_abs() > LEASE && renewed.is_positive() {
            Ok(())
        } else {
            Err(format!("{renewed}"))
        })
    })
    .await?;

    // The first to follow has one wrong clock or the other, and is followed in turn.
    let mut left = vec![("ahead", ahead), ("behind", behind)];
    let mut dead = right;
    while !left.is_empty() {
        let killed = Instant::now();
        dead.process.kill().await?;
        let next = eventually("another one holds the Lease", || async {
            let spec = leases.get(lease_name).await?.spec.context("a spec")?;
            let holder = spec.holder_identity.unwrap_or_default();
            let at = left.iter().position(|(name, _)| *name == holder);
            Ok(at.ok_or(holder))
        })
        .await?;
        let after = killed.elapsed();
        let (name, operator) = left.remove(next);
        let spec = leases.get(lease_name).await?.spec.context("a spec")?;
        let acquired = spec.acquire_time.context("a time")?.0;
        let off = acquired.duration_since(Timestamp::now()).as_secs();
        println!("{name}, whose clock is {off} s off, leads {after:?} after SIGKILL");
        ensure!((3500..3700).contains(&off.abs()), "the clock is not off");
        // Its last renewal was at most two thirds of a lease old when it was killed.
        ensure!(after > LEASE / 3 && after < LEASE * 2, "{after:?}");
        dead = operator;
    }
    nothing_forbidden(&cluster, &installation)
}

/// Waits until `holder` holds the Lease called `name`.
pub async fn until_held_by(leases: &Api<Lease>, name: &str, holder: &str) -> Result<()> {
    eventually(&format!("{holder} holds the Lease"), || async {
        let lease = leases.get_opt(name).await?;
        let held = lease.and_then(|lease| lease.spec?.holder_identity);
        Ok(if held.as_deref() == Some(holder) {
            Ok(())
        } else {
            Err(format!("{held:?}"))
        })
    })
    .await
    .context("the Lease")
}

/// Waits until the Lease called `name` is renewed.
async fn until_renewed(leases: &Api<Lease>, name: &str) -> Result<()> {
    let renewed = async || {
        let lease = leases.get(name).await?;
        anyhow::Ok(lease.spec.and_then(|spec| spec.renew_time))
    };
    let before = renewed().await?;
    eventually("it is renewed", || async {
        let now = renewed().await?;
        Ok(if now != before {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        })
    })
    .await
}

/// An operator without its rights is found out: what `World::finish` relies on.
#[tokio::test]
async fn a_missing_right_is_found_in_the_audit_log() -> Result<()> {
    let shared = shared().await?;
    let Some(_) = shared.cluster.audit_log() else {
        eprintln!("not checked: the given cluster's audit log is not known");
        return Ok(());
    };
    let world = World::new().await?;
    world
        .kubectl(&["create", "serviceaccount", "powerless"], "")
        .await?;
    let powerless = Installation {
        namespace: world.namespace.clone(),
        name: "powerless".to_owned(),
    };
    let dir = shared.dir.join("powerless");
    fs::create_dir_all(&dir)?;
    let operator = Operator::spawn(&shared.cluster, &powerless, &dir, "powerless", &[]).await?;
    eventually("its request is found", || async {
        let found = forbidden(&shared.cluster, &powerless)?;
        Ok(if found.iter().any(|request| request.contains("leases")) {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        })
    })
    .await?;
    operator.process.kill().await?;
    world.finish().await
}
