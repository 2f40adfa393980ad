//! Records what the operator decides by the lag of real logs: the traces that `operator/src/scaling/tests.rs` replays and
//! judges. The operator and NATS are real; so is the load. The workers are played, each with the same rate.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use birb_nest_e2e::{Operator, eventually};
use birb_nest_stack::{NatsOptions, Options, Process, Stack};
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};

use crate::{
    kubelet::Kubelet,
    log::Log,
    scaling::{address, external, servers},
    world::{Shared, World},
};

/// Everything is quicker than in production, so that each trace takes a minute or two.
const SCALING: &str =
    "{pollInterval: 1s, targetLag: 1000, drainSeconds: 10, scaleDownWindow: 20s, cooldown: 5s}";
/// The same for whoever replays them.
const SETTINGS: &str = "set targetLag=1000 drain=10 window=20 cooldown=5";
/// Messages that a worker stores at once.
const BATCH: u64 = 25;
/// From one batch to the next: 50 messages per second.
const PAUSE: Duration = Duration::from_millis(500);

async fn stack() -> Result<Stack> {
    let nats = NatsOptions {
        relaxed_sync: true,
        ..NatsOptions::default()
    };
    let options = Options {
        nats,
        ..Options::default()
    };
    Stack::fresh_with(options).await
}

/// A nest whose trace is recorded.
struct Recorded<'a> {
    world: &'a World,
    name: &'a str,
    log: Log,
    workers: JoinHandle<()>,
    /// Lines that were there when the last write had come.
    n_until_quiet: usize,
}

impl Drop for Recorded<'_> {
    fn drop(&mut self) {
        self.workers.abort();
    }
}

impl<'a> Recorded<'a> {
    async fn begin(world: &'a World, stack: &Stack, name: &'a str) -> Result<Self> {
        let prefix = name.replace('-', "_");
        let log = Log::new(stack, &prefix).await?;
        let spec = external(&address(stack), &prefix, SCALING);
        world.create(name, &spec).await?;
        world
            .until_condition(name, "ScalingActive", "True", "AsExpected")
            .await?;
        let workers = tokio::spawn(work(world.of(), format!("{name}-worker"), log.clone()));
        Ok(Self {
            world,
            name,
            log,
            workers,
            n_until_quiet: 0,
        })
    }

    /// Its lines in the log of `operator`.
    fn lines(&self, operator: &Process) -> Result<Vec<String>> {
        let marker = format!("/{}.{}: ", self.name, self.world.namespace);
        let log = operator.log()?;
        let own = log.lines().filter(|line| line.contains("scaling BirbNest"));
        let lines = own.filter_map(|line| Some(line.split_once(&marker)?.1.to_owned()));
        Ok(lines.collect())
    }

    /// Nobody writes any more.
    fn quiet(&mut self) -> Result<()> {
        self.n_until_quiet = self.lines(&self.world.shared.operator.process)?.len();
        Ok(())
    }

    /// Waits until `operator` has decided so: backlog and workers.
    async fn until(&self, operator: &Process, fits: impl Fn(u64, i32) -> bool) -> Result<()> {
        eventually(&format!("{} gets there", self.name), || async {
            let mut lines = self.lines(operator)?;
            if operator.pid() == self.world.shared.operator.process.pid() {
                // The reading under way when the last write came may not have seen it.
                lines.drain(..lines.len().min(self.n_until_quiet + 1));
            }
            let last = lines.pop().unwrap_or_default();
            let words: Vec<&str> = last.split_whitespace().collect();
            let is_so = match words[..] {
                [_, backlog, _, workers, _] => backlog
                    .parse()
                    .is_ok_and(|backlog| fits(backlog, workers.parse().unwrap_or(0))),
                _ => false,
            };
            Ok(if is_so { Ok(()) } else { Err(last) })
        })
        .await
    }

    /// Waits until all is stored and one worker is left; then writes the trace, that of `next` behind that of the first operator.
    async fn end(self, about: &str, next: Option<&Operator>) -> Result<()> {
        let first = &self.world.shared.operator.process;
        let last = next.map_or(first, |operator| &operator.process);
        self.until(last, |backlog, workers| backlog == 0 && workers == 1)
            .await?;
        let mut lines = self.lines(first)?;
        let at = lines[self.n_until_quiet - 1].split(' ').next();
        let quiet = format!("{} quiet", at.context("a time")?);
        lines.insert(self.n_until_quiet, quiet);
        if let Some(operator) = next {
            // Its clock begins when it does, a moment after the other was heard last.
            let end = lines.last().and_then(|line| line.split(' ').next());
            let later: f64 = end.context("a time")?.parse()?;
            for line in self.lines(&operator.process)? {
                let (second, rest) = line.split_once(' ').context("a time")?;
                let second = second.parse::<f64>()? + later;
                lines.push(format!("{second:.3} {rest}"));
            }
        }
        let file = format!("recorded_{}.txt", self.name.replace('-', "_"));
        let traces =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../operator/src/scaling/traces");
        let head = format!("# Recorded by make record-traces: {about}\n{SETTINGS}\n");
        fs::write(traces.join(&file), head + &lines.join("\n") + "\n")?;
        println!("{file}: {} lines", lines.len());
        Ok(())
    }
}

/// As many workers as the Deployment called `name` asks for, without end.
async fn work(deployments: Api<Deployment>, name: String, log: Log) {
    let consumers = log.consumers().await.expect("they were just made");
    let mut ticks = interval(PAUSE);
    // What could not be stored while NATS was away is not made up for.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for turn in 0.. {
        ticks.tick().await;
        // Perhaps it is not there yet.
        let Ok(found) = deployments.get(&name).await else {
            continue;
        };
        let workers = found.spec.and_then(|spec| spec.replicas).unwrap_or(0);
        let n = u64::try_from(workers).unwrap_or(0) * BATCH;
        for (shard, consumer) in (0_u64..).zip(&consumers) {
            let n_shards = consumers.len() as u64;
            // All shares together are `n`, and each turn others have one more.
            let share = (n + (shard + turn) % n_shards) / n_shards;
            let batch = consumer
                .fetch()
                .max_messages(usize::try_from(share).unwrap_or(0));
            // NATS may be away.
            let Ok(mut messages) = batch.messages().await else {
                break;
            };
            let mut last = None;
            while let Some(Ok(message)) = messages.next().await {
                last = Some(message);
            }
            // With it those before it are acknowledged.
            if let Some(last) = last {
                let _ = last.ack().await;
            }
        }
    }
}

async fn burst(world: &World, stack: &Stack) -> Result<()> {
    let mut nest = Recorded::begin(world, stack, "burst").await?;
    nest.log.write(2000).await?;
    nest.quiet()?;
    nest.end("2000 writes at once.", None).await
}

async fn sawtooth(world: &World, stack: &Stack) -> Result<()> {
    let mut nest = Recorded::begin(world, stack, "sawtooth").await?;
    let mut teeth = interval(Duration::from_secs(12));
    for tooth in 0..5 {
        teeth.tick().await;
        nest.log.write_from(tooth * 700, 700).await?;
    }
    nest.quiet()?;
    nest.end("700 writes every 12 s, five times.", None).await
}

async fn slow_growth(world: &World, stack: &Stack) -> Result<()> {
    let mut nest = Recorded::begin(world, stack, "slow-growth").await?;
    let mut seconds = interval(Duration::from_secs(1));
    let mut n_written = 0;
    for second in 0..45 {
        seconds.tick().await;
        let n = 40 + 2 * second;
        nest.log.write_from(n_written, n).await?;
        n_written += n;
    }
    nest.quiet()?;
    let about = "40 writes per second, and two more each second.";
    nest.end(about, None).await
}

async fn hot_key(world: &World, stack: &Stack) -> Result<()> {
    let mut nest = Recorded::begin(world, stack, "hot-key").await?;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(30) {
        nest.log.write(1).await?;
    }
    nest.quiet()?;
    let about = "one key, written without a pause for half a minute.";
    nest.end(about, None).await
}

async fn nats_outage(world: &World) -> Result<()> {
    let stack = stack().await?;
    let mut nest = Recorded::begin(world, &stack, "nats-outage").await?;
    nest.log.write(3000).await?;
    nest.quiet()?;
    let operator = &world.shared.operator.process;
    nest.until(operator, |backlog, workers| workers > 2 && backlog < 2500)
        .await?;
    stack.nats.stop().await?;
    // Longer than the window.
    tokio::time::sleep(Duration::from_secs(30)).await;
    stack.nats.start().await?;
    let about = "3000 writes at once; while they are stored, NATS is away for half a minute.";
    nest.end(about, None).await
}

async fn leader_change(stack: &Stack) -> Result<()> {
    let flags = ["--lease-duration=5s"];
    let shared = Shared::with_flags("traces", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    servers(&world).await?;
    let mut nest = Recorded::begin(&world, stack, "leader-change").await?;
    nest.log.write(4000).await?;
    nest.quiet()?;
    let shared = &world.shared;
    let first = &shared.operator.process;
    nest.until(first, |backlog, workers| workers > 3 && backlog < 3500)
        .await?;
    first.kill().await?;
    let (cluster, installation) = (&shared.cluster, &shared.installation);
    let second = Operator::start_with(cluster, installation, &shared.dir, "second", &flags).await?;
    let about =
        "4000 writes at once; while they are stored, the leader is killed, and another follows.";
    nest.end(about, Some(&second)).await?;
    world.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it writes the traces: make record-traces"]
async fn traces_are_recorded() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, stack().await?);
    servers(&world).await?;
    tokio::try_join!(
        burst(&world, &stack),
        sawtooth(&world, &stack),
        slow_growth(&world, &stack),
        hot_key(&world, &stack),
        nats_outage(&world),
        leader_change(&stack),
    )?;
    world.finish().await
}
