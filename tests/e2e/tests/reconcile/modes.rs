//! Changes of the scaling mode over a real log that is known to be empty: one worker would be enough for it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use birb_nest_e2e::eventually;
use birb_nest_stack::shared;
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Patch, PatchParams};
use serde_json::json;

use crate::{log::Log, scaling::create, world::World};

/// Short, so that it is seen to end.
const WINDOW: Duration = Duration::from_secs(2);

impl World {
    async fn until_workers(&self, number: i32) -> Result<()> {
        let has = |worker: &Deployment| {
            worker.spec.as_ref().and_then(|spec| spec.replicas) == Some(number)
        };
        self.until("cache-worker", has).await.map(drop)
    }

    async fn change_mode(&self, scaling: &str) -> Result<()> {
        let change = format!("{{worker: {{scaling: {scaling}}}}}");
        self.change("cache", &change).await?;
        let (status, reason) = if scaling.contains("mode: Lag") {
            // The seven are still written where mode Fixed looks.
            ("True", "ScaleIgnored")
        } else {
            ("False", "ScalingDisabled")
        };
        self.until_condition("cache", "ScalingActive", status, reason)
            .await
            .map(drop)
    }

    /// Decisions about the nest up to now, as the operator's log has them.
    fn decisions(&self) -> Result<Vec<String>> {
        let marker = format!("/cache.{}: ", self.namespace);
        let log = self.shared.operator.process.log()?;
        let own = log.lines().filter(|line| line.contains("scaling BirbNest"));
        let decisions = own.filter_map(|line| line.split_once(&marker));
        // `begin` is none.
        let decisions = decisions.map(|(_, decision)| decision.to_owned());
        Ok(decisions
            .filter(|decision| decision.split(' ').count() == 5)
            .collect())
    }

    /// Waits until it was found twice more that nothing waits, and that so many workers stay for the window's sake.
    async fn held_by_the_window(&self, workers: i32) -> Result<()> {
        let n_before = self.decisions()?.len();
        let expected = format!(" 0 - {workers} window");
        eventually("the window holds them", || async {
            let all = self.decisions()?;
            let new = &all[n_before..];
            Ok(
                if new.len() >= 2 && new.iter().all(|it| it.ends_with(&expected)) {
                    Ok(())
                } else {
                    Err(format!("{new:?}"))
                },
            )
        })
        .await?;
        let held = format!(
            "birbnest_operator_scaling_held{{namespace=\"{}\",nest=\"cache\",reason=\"window\"}}",
            self.namespace
        );
        ensure!(self.shared.operator.metric(&held).await? == 1.0);
        Ok(())
    }
}

/// What is known from the first reading on is that one is enough; only that the seven were wanted a moment ago keeps them.
#[tokio::test]
async fn an_empty_log_takes_workers_in_mode_lag_alone_and_after_its_window() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    Log::new(stack, "modes").await?;
    let fixed = "{mode: Fixed, replicas: 7, maxReplicas: 8, pollInterval: 1s, scaleDownWindow: 300s, cooldown: 0s}";
    create(&world, stack, "modes", fixed).await?;
    let seen = world.watch_replicas("cache-worker").await?;
    // All six pairs.
    for mode in ["Lag", "External", "Lag", "Fixed", "External", "Fixed"] {
        world.change_mode(&format!("{{mode: {mode}}}")).await?;
        if mode == "Lag" {
            world.held_by_the_window(7).await?;
        }
    }

    // What somebody else has made of them counts, and not what was wanted before.
    world.change_mode("{mode: External}").await?;
    let scale = json!({ "spec": { "replicas": 5 } });
    world
        .of::<Deployment>()
        .patch_scale(
            "cache-worker",
            &PatchParams::default(),
            &Patch::Merge(scale),
        )
        .await?;
    world.change_mode("{mode: Lag}").await?;
    world.held_by_the_window(5).await?;

    world
        .change_mode(&format!(
            "{{mode: External, scaleDownWindow: {}s}}",
            WINDOW.as_secs()
        ))
        .await?;
    let begun = Instant::now();
    world.change_mode("{mode: Lag}").await?;
    world.until_workers(1).await?;
    let took = begun.elapsed();
    ensure!(took >= WINDOW, "{took:?}");
    assert_eq!(seen.finish().await, [7, 5, 1]);
    world.finish().await
}
