//! What many nests ask of the API server while nothing happens.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::{Operator, PATIENCE, Request, requests};
use futures::{StreamExt, TryStreamExt, stream};

use crate::{
    log::Log,
    scaling::{address, external, servers},
    world::{Shared, World},
};

const N_NESTS: usize = 200;
/// How long they are watched.
const WINDOW: Duration = Duration::from_secs(300);
/// Most that an operator of so many nests may have in memory, in megabytes: one of a release, and one of a debug build, half of
/// which is the file of the program.
const MEMORY: [f64; 2] = [60.0, 80.0];
/// As in production, where other tests are in a hurry.
const FLAGS: [&str; 4] = [
    "--resync=10m",
    "--retry=30s",
    "--setup-retry=60s",
    "--log-level=info",
];

/// On the way, the operator is replaced: the new one applies everything once, as a resync does.
#[tokio::test]
#[ignore = "it measures for five minutes: make bench-operator"]
async fn two_hundred_nests_at_rest_ask_for_almost_nothing() -> Result<()> {
    let shared = Shared::with_flags("rest", &FLAGS).await?;
    let stack = birb_nest_stack::shared().await?;
    let mut world = World::on(shared).await?;
    world.play(crate::kubelet::Kubelet::default());
    servers(&world).await?;
    let _log = Log::new(stack, "rest").await?;
    let spec = external(&address(stack), "rest", "{}");
    let names: Vec<String> = (0..N_NESTS)
        .map(|number| format!("nest-{number}"))
        .collect();
    let begun = Instant::now();
    stream::iter(&names)
        .map(|name| world.create(name, &spec))
        .buffer_unordered(8)
        .try_collect::<Vec<_>>()
        .await?;
    for name in &names {
        world.until_ready(name, "True", "Available").await?;
        world
            .until_condition(name, "ScalingActive", "True", "AsExpected")
            .await?;
    }
    println!(
        "{N_NESTS} nests made and ready after {:.0} s",
        begun.elapsed().as_secs_f64()
    );
    until_quiet(&world).await?;
    world.shared.operator.process.terminate(PATIENCE).await?;

    let before = asked(&world)?.len();
    let (cluster, installation) = (&world.shared.cluster, &world.shared.installation);
    let operator =
        Operator::start_with(cluster, installation, &world.shared.dir, "next", &FLAGS).await?;
    until_quiet(&world).await?;
    println!("to apply all of them again:");
    print(&asked(&world)?[before..], N_NESTS as f64, "per nest");

    let before = asked(&world)?.len();
    let busy = processor_seconds(&operator)?;
    tokio::time::sleep(WINDOW).await;
    let all = asked(&world)?;
    let found = &all[before..];
    let minutes = WINDOW.as_secs_f64() / 60.0;
    println!("{N_NESTS} nests at rest for {WINDOW:?}:");
    print(found, minutes, "per minute");
    let [resident, own] = [memory(&operator, "VmRSS:")?, memory(&operator, "RssAnon:")?];
    let busy = processor_seconds(&operator)? - busy;
    println!(
        "{resident:.0} MB resident, {own:.0} of them not of its file; {:.1} % of a processor",
        busy / WINDOW.as_secs_f64() * 100.0
    );
    let writes: Vec<&Request> = found
        .iter()
        .filter(|request| request.is_write() && request.resource != "leases")
        .collect();
    ensure!(writes.is_empty(), "nothing had happened: {writes:#?}");
    let [release, debug] = MEMORY;
    let most = if Operator::is_optimised() {
        release
    } else {
        debug
    };
    ensure!(
        resident < most,
        "{resident:.1} MB, where {most} are too many"
    );
    world.finish().await
}

fn asked(world: &World) -> Result<Vec<Request>> {
    requests(&world.shared.cluster, &world.shared.installation)
}

/// Waits until nothing was asked for ten seconds but what the election and watches ask for.
async fn until_quiet(world: &World) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let n = || -> Result<usize> {
        let all = asked(world)?.into_iter();
        Ok(all
            .filter(|request| request.resource != "leases" && request.verb != "watch")
            .count())
    };
    let mut last = (n()?, Instant::now());
    while last.1.elapsed() < Duration::from_secs(10) {
        ensure!(Instant::now() < deadline, "requests do not cease");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = n()?;
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
    Ok(())
}

fn print(requests: &[Request], by: f64, unit: &str) {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for request in requests {
        *counts
            .entry((&request.verb, &request.resource))
            .or_default() += 1;
    }
    for ((verb, resource), n) in counts {
        println!("  {verb:8} {resource:24} {:8.2} {unit}", n as f64 / by);
    }
}

/// Megabytes on this line of its status.
fn memory(operator: &Operator, name: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", operator.process.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib: f64 = line
        .and_then(|line| line.split_whitespace().next())
        .context("a size")?
        .parse()?;
    Ok(kib / 1024.0)
}

/// How long it has kept processors busy, in steps of a hundredth.
fn processor_seconds(operator: &Operator) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", operator.process.pid()))?;
    // After the name, which may contain anything, the state is the third field; then the fourteenth and fifteenth are meant.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks: f64 = fields.get(11).context("user")?.parse::<f64>()?
        + fields.get(12).context("system")?.parse::<f64>()?;
    Ok(ticks / 100.0)
}
