//! Somebody else who writes at the same time.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use birb_nest_e2e::{Fault, eventually};
use k8s_openapi::api::{core::v1::Service, events::v1::Event};
use kube::{ResourceExt, api::ListParams};

use crate::{
    kubelet::Kubelet,
    world::{Shared, World},
};

/// In a row. If each were a failure, the pauses after them would come to 95 s at least.
const N_CONFLICTS: u32 = 7;
/// By a conflict's own pauses they take 5 s.
const AT_ONCE: Duration = Duration::from_secs(60);

/// Nothing else makes a pass while they last: nobody changes anything, and no watch is cut.
#[tokio::test]
async fn a_conflict_is_tried_again_at_once_and_nobody_is_told() -> Result<()> {
    let flags = ["--lease-duration=120s", "--resync=1h"];
    let (shared, proxy) = Shared::behind_proxy("conflicts", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    let spec = "{worker: {scaling: {mode: Fixed, replicas: 2}}}";
    world.create("cache", spec).await?;
    world.until_ready("cache", "True", "Available").await?;
    let operator = &world.shared.operator;
    let conflicts = "birbnest_operator_reconciles_total{reason=\"conflict\",result=\"error\"}";
    let before = operator.metric(conflicts).await.unwrap_or(0.0);

    let begun = Instant::now();
    proxy.fault(Fault::Conflict(N_CONFLICTS));
    let change = "{api: {service: {annotations: {example.com/changed: 'yes'}}}}";
    world.change("cache", change).await?;
    world
        .until::<Service>("cache", |service| {
            service.annotations().contains_key("example.com/changed")
        })
        .await?;
    let took = begun.elapsed();
    ensure!(took < AT_ONCE, "{took:?}");
    eventually("the last pass is counted", || async {
        let met = operator.metric(conflicts).await? - before;
        Ok(if met == f64::from(N_CONFLICTS) {
            Ok(())
        } else {
            Err(format!("{met} conflicts"))
        })
    })
    .await?;
    println!("{N_CONFLICTS} conflicts took {took:?}");

    world.until_ready("cache", "True", "Available").await?;
    let log = operator.process.log()?;
    let failed = format!("the pass over nest {}/cache failed", world.namespace);
    ensure!(!log.contains(&failed), "{log}");
    let told = world.of::<Event>().list(&ListParams::default()).await?;
    let is_warning = |event: &&Event| {
        event.type_.as_deref() == Some("Warning")
            && event
                .note
                .as_deref()
                .is_some_and(|note| note.contains("the test says"))
    };
    let warning = told.items.iter().find(is_warning);
    ensure!(warning.is_none(), "{warning:?}");
    world.finish().await
}
