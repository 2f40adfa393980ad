//! Another release of the operator, and the nests that follow it.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use anyhow::Result;
use birb_nest_e2e::{Operator, PATIENCE, eventually};
use birb_nest_operator::api::BirbNest;
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;

use crate::{
    kubelet::Kubelet,
    world::{Shared, World},
};

fn image(deployment: &Deployment) -> Option<&str> {
    let pod = deployment.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.as_deref()
}

/// A kubelet that notes whose API begins with release 2.0.0, in order, and under which that works for none but `first` before
/// `works`.
fn kubelet(
    first: &'static str,
    works: &Arc<AtomicBool>,
    begun: &Arc<Mutex<Vec<String>>>,
) -> Kubelet {
    let (works, begun) = (works.clone(), begun.clone());
    Kubelet {
        works: Arc::new(move |deployment| {
            let name = deployment.name_any();
            let Some(nest) = name.strip_suffix("-api") else {
                return true;
            };
            if !image(deployment).is_some_and(|image| image.ends_with(":2.0.0")) {
                return true;
            }
            let mut begun = begun.lock().expect("nobody panicked");
            if !begun.iter().any(|other| other == nest) {
                begun.push(nest.to_owned());
            }
            nest == first || works.load(Ordering::Relaxed)
        }),
        ..Kubelet::default()
    }
}

async fn until_runs(world: &World, nest: &str, release: &str) -> Result<()> {
    eventually(&format!("{nest} runs {release}"), || async {
        let found = world.of::<BirbNest>().get(nest).await?;
        let runs = found.status.clone().and_then(|status| status.version);
        Ok(if runs.as_deref() == Some(release) {
            Ok(())
        } else {
            Err(format!("{:?}", found.status))
        })
    })
    .await
}

/// What the operator counts is what its watch has seen.
async fn until_behind(operator: &Operator, number: f64) -> Result<()> {
    eventually(&format!("{number} nests are behind"), || async {
        let found = operator.metric("birbnest_operator_nests_behind ").await?;
        Ok(if found == number {
            Ok(())
        } else {
            Err(format!("{found}"))
        })
    })
    .await
}

/// Also when operators change while one nest is on its way.
#[tokio::test]
async fn nests_follow_an_operator_one_after_the_other() -> Result<()> {
    let shared = Shared::with_flags("upgrades", &["--data-plane-release=1.0.0"]).await?;
    let mut world = World::on(shared).await?;
    let (works, begun) = (Arc::default(), Arc::default());
    world.play(kubelet("a", &works, &begun));
    for (nest, spec) in [
        ("d", "{}"),
        ("c", "{}"),
        ("a", "{}"),
        ("b", "{}"),
        ("pinned", "{version: 1.0.0}"),
    ] {
        world.create(nest, spec).await?;
    }
    for nest in ["a", "b", "c", "d", "pinned"] {
        until_runs(&world, nest, "1.0.0").await?;
    }
    world.shared.operator.process.terminate(PATIENCE).await?;
    let upgraded = async |name: &str| {
        let (cluster, installation) = (&world.shared.cluster, &world.shared.installation);
        let flags = ["--data-plane-release=2.0.0"];
        Operator::start_with(cluster, installation, &world.shared.dir, name, &flags).await
    };

    let second = upgraded("second").await?;
    until_runs(&world, "a", "2.0.0").await?;
    let wait = ["c", "d"];
    for nest in wait {
        let why = world
            .until_condition(nest, "Progressing", "False", "WaitingForTurn")
            .await?;
        assert!(why.contains("release 2.0.0 follows"), "{why}");
    }
    world
        .until_condition("b", "Progressing", "True", "RollingOut")
        .await?;
    until_behind(&second, 3.0).await?;

    // What is changed of a nest that waits is changed, in the release that it runs.
    world.change("c", "{api: {replicas: 3}}").await?;
    let changed = world
        .until::<Deployment>("c-api", |api| {
            api.spec.as_ref().and_then(|spec| spec.replicas) == Some(3)
        })
        .await?;
    assert_eq!(image(&changed), Some("ghcr.io/birbparty/birb-nest:1.0.0"));

    second.process.kill().await?;
    let third = upgraded("third").await?;
    for nest in wait {
        // A pass of the third, which has forgotten whose turn it was.
        world.change(nest, "{api: {replicas: 4}}").await?;
        world
            .until::<Deployment>(&format!("{nest}-api"), |api| {
                api.spec.as_ref().and_then(|spec| spec.replicas) == Some(4)
            })
            .await?;
    }
    assert_eq!(*begun.lock().expect("nobody panicked"), ["a", "b"]);

    works.store(true, Ordering::Relaxed);
    for nest in ["b", "c", "d"] {
        until_runs(&world, nest, "2.0.0").await?;
        world
            .until_condition(nest, "Progressing", "False", "AsExpected")
            .await?;
    }
    until_runs(&world, "pinned", "1.0.0").await?;
    until_behind(&third, 0.0).await?;
    assert_eq!(
        *begun.lock().expect("nobody panicked"),
        ["a", "b", "c", "d"]
    );
    world.finish().await
}

/// What the leader before knew of its turn, the next one has to read from its status.
#[tokio::test]
async fn the_next_leader_waits_for_the_nest_that_moved_and_lost_its_servers() -> Result<()> {
    let shared = Shared::with_flags("turns", &["--data-plane-release=1.0.0"]).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    for nest in ["a", "b"] {
        world.create(nest, "{}").await?;
        until_runs(&world, nest, "1.0.0").await?;
    }
    world.shared.operator.process.terminate(PATIENCE).await?;
    let shared = world.shared.clone();
    let upgraded = async |name: &str| {
        let (cluster, installation) = (&shared.cluster, &shared.installation);
        let flags = ["--data-plane-release=2.0.0", "--upgrade-pause=1h"];
        Operator::start_with(cluster, installation, &shared.dir, name, &flags).await
    };
    let second = upgraded("second").await?;
    until_runs(&world, "a", "2.0.0").await?;
    let down = Kubelet {
        servers: false,
        ..Kubelet::default()
    };
    world.play(down);
    for nest in ["a", "b"] {
        world.until_ready(nest, "False", "ServerNotReady").await?;
    }

    second.process.kill().await?;
    let third = upgraded("third").await?;
    world.change("b", "{api: {replicas: 3}}").await?;
    world.until_ready("b", "False", "ServerNotReady").await?;
    let nest = world.of::<BirbNest>().get("b").await?;
    let goes_to = nest.status.and_then(|status| status.resolved?.version);
    assert_eq!(goes_to.as_deref(), Some("1.0.0"));
    let log = third.process.log()?;
    assert!(log.contains("is not ready: others wait"), "{log}");
    world.finish().await
}
