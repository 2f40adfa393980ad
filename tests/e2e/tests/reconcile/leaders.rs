//! Several operators, of which one acts.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use birb_nest_e2e::{Installation, Operator, client, eventually, forbidden};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;

use crate::world::{World, shared};

/// Two operators in a namespace of their own, so that the one all tests share is not disturbed: their Lease is elsewhere, and
/// what they would do to nests it does too.
#[tokio::test]
async fn a_killed_leader_is_followed_within_its_lease_and_a_stopped_one_at_once() -> Result<()> {
    let shared = shared().await?;
    let world = World::new().await?;
    // Its Role knows one Lease only.
    let lease_name = "leaders-test";
    let namespace = format!("--namespace={}", shared.installation.namespace);
    let account = format!(
        "--serviceaccount={}:{}",
        shared.installation.namespace, shared.installation.name
    );
    for arguments in [
        [
            "create",
            "role",
            "leaders-test",
            &namespace,
            "--verb=get,create,update",
            "--resource=leases",
        ]
        .as_slice(),
        &[
            "create",
            "rolebinding",
            "leaders-test",
            &namespace,
            "--role=leaders-test",
            &account,
        ],
    ] {
        shared.cluster.kubectl(arguments, "").await?;
    }
    let dir = shared.dir.join("leaders");
    fs::create_dir_all(&dir)?;
    let start =
        async |name: &'static str| start(&shared.installation, &dir, name, lease_name).await;
    let first = start("first").await?;
    let leases: Api<Lease> = Api::namespaced(
        client(&shared.cluster).await?,
        &shared.installation.namespace,
    );
    until_held_by(&leases, lease_name, "first").await?;
    let second = start("second").await?;
    assert_eq!(first.metric("birbnest_operator_leader ").await?, 1.0);
    assert_eq!(second.metric("birbnest_operator_leader ").await?, 0.0);

    first.process.kill().await?;
    let killed = Instant::now();
    until_held_by(&leases, lease_name, "second").await?;
    assert!(
        killed.elapsed() >= Duration::from_secs(2),
        "the lease was taken before it had ended"
    );
    let third = start("third").await?;

    let stopped = Instant::now();
    let end = second.process.terminate(Duration::from_secs(20)).await?;
    assert!(end.success(), "{end}: {}", second.process.log()?);
    until_held_by(&leases, lease_name, "third").await?;
    // Given back: nobody had to wait for its end.
    assert!(
        second.process.log()?.contains("gave back the Lease"),
        "{}",
        second.process.log()?
    );
    println!(
        "took over {:.1} s after SIGTERM",
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
    fourth.process.terminate(Duration::from_secs(20)).await?;
    world.finish().await
}

async fn start(
    installation: &Installation,
    dir: &std::path::Path,
    name: &str,
    lease: &str,
) -> Result<Operator> {
    let shared = shared().await?;
    Operator::start_with(
        &shared.cluster,
        installation,
        dir,
        name,
        &[&format!("--lease-name={lease}")],
    )
    .await
}

async fn until_held_by(leases: &Api<Lease>, name: &str, holder: &str) -> Result<()> {
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
