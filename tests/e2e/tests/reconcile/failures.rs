//! What fails is tried again, later each time, and does not keep others waiting.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::{Fault, Proxy, eventually};
use birb_nest_operator::render::Kind;
use k8s_openapi::{api::core::v1::Service, jiff::Timestamp};
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::{
    kubelet::Kubelet,
    links::every_watch_lives,
    world::{Shared, World},
};

/// As many workers as are said, so that no other manager says how many.
const FIXED: &str = "{worker: {scaling: {mode: Fixed, replicas: 2}}}";
/// Of an API server that is overloaded: what kube would try again by itself, if it were let.
const OVERLOADED: u16 = 503;

/// A pass that failed, as the operator's log has it.
#[derive(Clone, Debug)]
struct Failed {
    at: Timestamp,
    /// Seconds until the next one is to be made.
    pause: f64,
}

impl Failed {
    /// Whether the pause is that after so many failures in a row.
    fn is_number(&self, number: i32) -> bool {
        let most = f64::from(1 << (number - 1));
        // Up to a quarter less; and the log rounds.
        (most * 0.75 - 0.05..=most + 0.05).contains(&self.pause)
    }
}

impl World {
    fn failed(&self, nest: &str) -> Result<Vec<Failed>> {
        let words = format!(
            "the pass over nest {}/{nest} failed; again in ",
            self.namespace
        );
        let log = self.shared.operator.process.log()?;
        let failed = log.lines().filter_map(|line| {
            let (head, pause) = line.split_once(&words)?;
            Some(Failed {
                at: head.split(' ').next()?.parse().ok()?,
                pause: pause.split(' ').next()?.parse().ok()?,
            })
        });
        Ok(failed.collect())
    }

    /// Waits until more than `before` passes have failed; returns the first of those.
    async fn until_failed(&self, nest: &str, before: usize) -> Result<Failed> {
        eventually(&format!("a pass over {nest} fails"), || async {
            let all = self.failed(nest)?;
            Ok(all.get(before).cloned().ok_or_else(|| format!("{all:?}")))
        })
        .await
    }

    /// Services that were changed by being applied, and that were put back, as the operator counts them.
    async fn counted_services(&self) -> Result<[f64; 2]> {
        let kind = "kind=\"Service\"";
        let applied = format!("birbnest_operator_applies_total{{changed=\"true\",{kind}}}");
        let put_back = format!("birbnest_operator_drift_repaired_total{{{kind}}}");
        let operator = &self.shared.operator;
        Ok([
            operator.metric(&applied).await?,
            // Nothing is shown before the first.
            operator.metric(&put_back).await.unwrap_or(0.0),
        ])
    }

    /// Asks for another Service.
    async fn annotate(&self, nest: &str, value: &str) -> Result<()> {
        let change =
            format!("{{api: {{service: {{annotations: {{example.com/changed: {value}}}}}}}}}");
        self.change(nest, &change).await.map(drop)
    }

    async fn until_annotated(&self, nest: &str, value: &str) -> Result<()> {
        self.until::<Service>(nest, |service| {
            let found = service.annotations().get("example.com/changed");
            found.map(String::as_str) == Some(value)
        })
        .await?;
        self.until_ready(nest, "True", "Available").await.map(drop)
    }
}

#[tokio::test]
async fn a_nest_whose_passes_fail_is_tried_again_later_each_time_until_one_succeeds_or_it_changes()
-> Result<()> {
    let flags = ["--lease-duration=120s", "--resync=1h"];
    let (shared, proxy) = Shared::behind_proxy("failures", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create("cache", FIXED).await?;
    world.until_ready("cache", "True", "Available").await?;

    proxy.fault(Fault::RefuseServices("cache", OVERLOADED));
    // The nest itself stays as it is: a change of it begins the pauses anew.
    let edit = json!({ "metadata": { "labels": { "app.kubernetes.io/component": "edited" } } });
    world
        .of::<Service>()
        .patch("cache", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    let neighbour = async {
        world.create("other", FIXED).await?;
        world.until_ready("other", "True", "Available").await
    };
    tokio::try_join!(pauses_grow(&world, &proxy), neighbour)?;

    proxy.heal();
    world.until_annotated("cache", "two").await?;
    let [made, put_back] = world.counted_services().await?;
    // Nobody changes the nest from here on.
    let n_before = world.failed("cache")?.len();
    proxy.fault(Fault::RefuseServices("cache", OVERLOADED));
    let edit = json!({ "metadata": { "annotations": { "example.com/changed": "three" } } });
    world
        .of::<Service>()
        .patch("cache", &PatchParams::default(), &Patch::Merge(edit))
        .await?;
    let first = world.until_failed("cache", n_before).await?;
    ensure!(first.is_number(1), "{:?}", world.failed("cache")?);
    let counted = world.counted_services().await?;
    ensure!(counted == [made, put_back], "{counted:?}");
    proxy.heal();
    world.until_annotated("cache", "two").await?;
    // Once, however often that was tried.
    eventually("what was put back is counted", || async {
        let counted = world.counted_services().await?;
        Ok(if counted == [made + 1.0, put_back + 1.0] {
            Ok(())
        } else {
            Err(format!("{counted:?} after {:?}", [made, put_back]))
        })
    })
    .await?;
    // Their status, which others write, is no reason to change them.
    let same = "birbnest_operator_applies_total{changed=\"false\",kind=\"Deployment\"}";
    let n_same = world.shared.operator.metric(same).await?;
    ensure!(n_same >= 1.0, "{n_same}");
    world.finish().await
}

async fn pauses_grow(world: &World, proxy: &Proxy) -> Result<()> {
    for number in 1..=4 {
        let failed = world.until_failed("cache", number - 1).await?;
        let number = i32::try_from(number)?;
        ensure!(failed.is_number(number), "{:?}", world.failed("cache")?);
    }
    // Each pass asks once and leaves it at that.
    let n_asked = proxy.hits().len();
    let n_failed = world.failed("cache")?.len();
    ensure!(
        n_asked <= n_failed + 1,
        "{n_asked} requests, {n_failed} passes"
    );

    let fourth = world.until_failed("cache", 3).await?;
    world.annotate("cache", "two").await?;
    let fifth = world.until_failed("cache", 4).await?;
    ensure!(fifth.is_number(1), "{:?}", world.failed("cache")?);
    let waited = Duration::try_from(fifth.at.duration_since(fourth.at)).context("in order")?;
    ensure!(
        waited.as_secs_f64() < fourth.pause,
        "{waited:?} after {fourth:?}"
    );
    Ok(())
}

/// More nests than passes at once, each of which waits for an API server that hangs.
const N_HANGING: usize = 9;

#[tokio::test]
async fn passes_that_hang_end_and_let_others_have_their_turn() -> Result<()> {
    let flags = ["--lease-duration=120s", "--resync=1h", "--pass-limit=10s"];
    let (shared, proxy) = Shared::behind_proxy("hanging", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    proxy.fault(Fault::HoldServices("held"));
    for number in 1..=N_HANGING {
        world.create(&format!("held-{number}"), FIXED).await?;
    }
    eventually("all turns are taken", || async {
        let n_held = proxy.hits().len();
        Ok(if n_held >= N_HANGING - 1 {
            Ok(())
        } else {
            Err(format!("{n_held} are"))
        })
    })
    .await?;
    world.create("other", FIXED).await?;
    world.until_ready("other", "True", "Available").await?;
    world.until_failed("held-1", 0).await?;
    let log = world.shared.operator.process.log()?;
    ensure!(
        log.contains("the API server did not answer in time"),
        "{log}"
    );
    let passes = "birbnest_operator_reconciles_total{reason=\"timeout\",result=\"error\"}";
    let n_timed_out = world.shared.operator.metric(passes).await?;
    ensure!(n_timed_out >= 1.0, "{n_timed_out}");

    proxy.heal();
    world.annotate("held-1", "one").await?;
    world.until_annotated("held-1", "one").await?;
    world.finish().await
}

/// At least, between the attempts to begin a watch again that was cut.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(800),
    Duration::from_millis(1600),
    Duration::from_millis(3200),
];

#[tokio::test]
async fn a_watch_that_fails_is_begun_again_later_each_time() -> Result<()> {
    let flags = ["--lease-duration=120s", "--resync=1h"];
    let (shared, proxy) = Shared::behind_proxy("watches", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create("cache", FIXED).await?;
    world.until_ready("cache", "True", "Available").await?;
    proxy.fault(Fault::Refuse(OVERLOADED));
    // Of a kind that nothing but its watch asks for while no pass gets that far.
    let attempts = eventually("its watch is begun again and again", || async {
        let hits = proxy.hits().into_iter();
        let attempts: Vec<Instant> = hits
            .filter(|hit| hit.resource == "networkpolicies")
            .map(|hit| hit.at)
            .collect();
        Ok(if attempts.len() > PAUSES.len() {
            Ok(attempts)
        } else {
            Err(format!("{} times", attempts.len()))
        })
    })
    .await?;
    let pauses: Vec<Duration> = attempts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    for (pause, least) in pauses.iter().zip(PAUSES) {
        ensure!(*pause >= least, "{pauses:?}");
    }
    proxy.heal();
    world.annotate("cache", "one").await?;
    world.until_annotated("cache", "one").await?;
    world.finish().await
}

/// The connection stays, and nobody says anything: an API server that forgets a request, or a machine that is gone.
#[tokio::test]
async fn a_listing_that_is_never_answered_is_made_again() -> Result<()> {
    let flags = [
        "--lease-duration=120s",
        "--resync=1h",
        "--retry=1h",
        "--silence-limit=5s",
    ];
    let (shared, proxy) = Shared::behind_proxy("silence", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create("before", FIXED).await?;
    world.until_ready("before", "True", "Available").await?;
    let mut watched: BTreeSet<String> = Kind::ALL
        .into_iter()
        .map(|kind| kind.api_resource().plural)
        .collect();
    watched.insert("birbnests".to_owned());
    proxy.fault(Fault::LoseLists);
    eventually("all that is watched is listed in vain", || async {
        let missing: Vec<String> = watched.difference(&proxy.hit()).cloned().collect();
        Ok(if missing.is_empty() {
            Ok(())
        } else {
            Err(format!("{missing:?} are not"))
        })
    })
    .await?;
    // Those that come from now on are answered.
    proxy.heal();
    world.create("after", FIXED).await?;
    world.until_ready("after", "True", "Available").await?;
    every_watch_lives(&world).await?;
    world.finish().await
}
