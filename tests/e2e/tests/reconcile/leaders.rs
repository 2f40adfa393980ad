//! Several operators, of which one acts.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{Installation, Operator, PATIENCE, client, eventually, forbidden, install};
use birb_nest_stack::Root;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;

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

    first.process.kill().await?;
    let last = leases.get(lease_name).await?.spec.context("a spec")?;
    assert_eq!(last.holder_identity.as_deref(), Some("first"));
    until_held_by(&leases, lease_name, "second").await?;
    let next = leases.get(lease_name).await?.spec.context("a spec")?;
    let (renewed, acquired) = (
        last.renew_time.context("a time")?,
        next.acquire_time.context("a time")?,
    );
    let between = acquired.0.duration_since(renewed.0);
    assert!(
        between.unsigned_abs() >= LEASE,
        "taken {between:?} after its last renewal, before it had ended"
    );
    // The other one has seen that renewal late, by as much as it looks in between.
    assert!(
        between.unsigned_abs() <= LEASE * 2,
        "taken {between:?} after its last renewal only"
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
    Ok(())
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
