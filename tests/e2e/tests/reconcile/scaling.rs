//! Workers by the backlog of a real log, and who says how many there are.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use birb_nest_e2e::eventually;
use birb_nest_operator::api::BirbNest;
use birb_nest_stack::{Stack, shared};
use k8s_openapi::{
    api::{apps::v1::Deployment, policy::v1::PodDisruptionBudget},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{log::Log, world::World};

fn replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.replicas
}

/// A nest whose servers are somebody else's; its log is on `stack`.
pub async fn create(world: &World, stack: &Stack, prefix: &str, scaling: &str) -> Result<()> {
    servers(world).await?;
    let spec = external(&address(stack), prefix, scaling);
    world.create("cache", &spec).await?;
    world.until_ready("cache", "True", "Available").await?;
    Ok(())
}

/// The Secret with the addresses of servers that nobody asks.
pub async fn servers(world: &World) -> Result<()> {
    let secret = [
        ("url", "redis://cache:6379"),
        ("postgres", "postgres://me@db/db"),
    ];
    world.secret("servers", &secret).await
}

/// Where its NATS is.
pub fn address(stack: &Stack) -> String {
    format!("127.0.0.1:{}", stack.nats.port())
}

/// A nest on servers of somebody else, of which NATS has this address.
pub fn external(nats: &str, prefix: &str, scaling: &str) -> String {
    format!(
        "redis: {{external: {{urlSecretRef: {{name: servers, key: url}}}}}}
postgres: {{external: {{urlSecretRef: {{name: servers, key: postgres}}}}}}
nats: {{external: {{url: 'nats://{nats}', prefix: {prefix}}}}}
worker: {{scaling: {scaling}}}"
    )
}

/// Waits until its worker Deployment asks for so many.
pub async fn until_workers(world: &World, number: i32) -> Result<Deployment> {
    let has = move |worker: &Deployment| replicas(worker) == Some(number);
    world.until("cache-worker", has).await
}

/// Waits until `kubectl get bn` shows this between name and age.
async fn until_shown(world: &World, expected: &[&str]) -> Result<()> {
    eventually("kubectl get shows it", || async {
        let line = world.kubectl(&["get", "bn", "--no-headers"], "").await?;
        let cells: Vec<&str> = line.split_whitespace().collect();
        let shown = cells.get(1..cells.len().saturating_sub(1));
        Ok(if shown == Some(expected) {
            Ok(())
        } else {
            Err(line)
        })
    })
    .await
}

#[tokio::test]
async fn workers_follow_the_backlog_and_hold_while_it_is_not_known() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, Stack::fresh().await?);
    let log = Log::new(&stack, "follow").await?;
    let scaling = "{targetLag: 100, pollInterval: 1s, scaleDownWindow: 3s, cooldown: 0s}";
    create(&world, &stack, "follow", scaling).await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    until_workers(&world, 1).await?;
    until_shown(&world, &["True", "Available", "2/2", "1/1", "0"]).await?;
    let seen = world.watch_replicas("cache-worker").await?;

    log.write(350).await?;
    until_workers(&world, 4).await?;
    // Whoever says how many there are, several have a budget.
    world
        .until::<PodDisruptionBudget>("cache-worker", allows_one)
        .await?;
    // It may have gone there by way of less, while the backlog was being written.
    world
        .until::<BirbNest>("cache", |nest| {
            let worker = nest.status.as_ref().map(|status| &status.worker);
            let reason = worker.and_then(|worker| worker.last_scale_reason.as_ref());
            reason.is_some_and(|reason| reason.contains("to 4 workers"))
        })
        .await?;
    let labels = format!("namespace=\"{}\",nest=\"cache\"", world.namespace);
    let operator = &world.shared.operator;
    let shown = async |name: &str, more: &str| {
        let line = format!("birbnest_operator_{name}{{{labels}{more}}}");
        operator.metric(&line).await
    };
    // Of all nests together.
    let asked = async |result: &str| {
        let labels = format!("dependency=\"nats\",result=\"{result}\"");
        let line = format!("birbnest_operator_external_calls_total{{{labels}}}");
        operator.metric(&line).await.unwrap_or(0.0)
    };
    eventually("lag and workers are among the metrics", || async {
        let now = (
            shown("lag_messages", "").await?,
            shown("workers_desired", "").await?,
            shown("workers_ready", "").await?,
        );
        Ok(if now == (350.0, 4.0, 4.0) {
            Ok(())
        } else {
            Err(format!("{now:?}"))
        })
    })
    .await?;
    assert_eq!(shown("scaling_held", ",reason=\"none\"").await?, 1.0);
    assert!(asked("ok").await > 0.0, "no reading was counted");
    let unreachable = asked("unreachable").await;

    stack.nats.stop().await?;
    let message = world
        .until_condition("cache", "ScalingActive", "False", "LagUnknown")
        .await?;
    assert!(message.contains("stays as it is"), "{message}");
    let nest = world.of::<BirbNest>().get("cache").await?;
    assert_eq!(nest.status.unwrap_or_default().worker.lag, None);
    until_shown(&world, &["True", "Available", "2/2", "4/4"]).await?;
    assert_eq!(shown("workers_desired", "").await?, 4.0);
    assert_eq!(shown("scaling_held", ",reason=\"unknown\"").await?, 1.0);
    let lag = shown("lag_messages", "").await;
    assert!(lag.is_err(), "{lag:?} of what is not known");
    eventually("readings in vain are counted", || async {
        let now = asked("unreachable").await;
        Ok(if now > unreachable {
            Ok(())
        } else {
            Err(format!("{now} after {unreachable}"))
        })
    })
    .await?;

    stack.nats.start().await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    log.drain().await?;
    until_workers(&world, 1).await?;
    world
        .until_gone::<PodDisruptionBudget>("cache-worker")
        .await?;
    // What is read in the middle of writing or draining may ask for numbers in between.
    let seen = seen.finish().await;
    let peak = seen.iter().position(|number| *number == 4).unwrap_or(0);
    assert!(
        seen[..=peak].is_sorted() && seen[peak..].is_sorted_by(|a, b| a > b),
        "{seen:?}"
    );
    assert_eq!(
        (seen[0], seen[peak], seen[seen.len() - 1]),
        (1, 4, 1),
        "{seen:?}"
    );
    world.finish().await
}

/// Nests whose NATS takes connections and never says a word.
const N_HANGING: u32 = 20;
/// How long one of them at least is waited for, each time its lag is to be read.
const HANGS: Duration = Duration::from_secs(2);

#[tokio::test]
async fn nests_whose_servers_hang_do_not_slow_their_neighbour() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    let log = Log::new(stack, "neighbour").await?;
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let hole = listener.local_addr()?.port();
    servers(&world).await?;
    let scaling = "{targetLag: 100, pollInterval: 1s}";
    let names = (1..=N_HANGING).map(|number| (number, format!("hangs-{number}")));
    for (number, name) in names.clone() {
        // An address each, since nests of one address share a connection.
        let spec = external(&format!("127.0.1.{number}:{hole}"), "hole", scaling);
        world.create(&name, &spec).await?;
    }
    for (_, name) in names {
        let name = name.as_str();
        world.until_ready(name, "True", "Available").await?;
        world
            .until_condition(name, "ScalingActive", "False", "LagUnknown")
            .await?;
    }

    let begun = Instant::now();
    let spec = external(&address(stack), "neighbour", scaling);
    world.create("cache", &spec).await?;
    world.until_ready("cache", "True", "Available").await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    log.write(350).await?;
    until_workers(&world, 4).await?;
    let took = begun.elapsed();
    // One after the other they take that long before the neighbour is asked once.
    let limit = HANGS * N_HANGING;
    ensure!(took < limit, "{took:?}");
    println!("ready and scaled after {took:?}, beside {N_HANGING} nests whose servers hang");
    drop(listener);
    world.finish().await
}

#[tokio::test]
async fn a_log_without_consumers_is_not_an_empty_one() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    let log = Log::new(stack, "gap").await?;
    let scaling = "{minReplicas: 3, pollInterval: 1s, scaleDownWindow: 0s, cooldown: 0s}";
    create(&world, stack, "gap", scaling).await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    until_workers(&world, 3).await?;
    log.lose_consumer(5).await?;
    let message = world
        .until_condition("cache", "ScalingActive", "False", "LagUnknown")
        .await?;
    assert!(message.contains("BIRB_gap_5"), "{message}");
    world
        .change("cache", "{worker: {scaling: {minReplicas: 1}}}")
        .await?;
    let message = world
        .until_condition("cache", "ScalingActive", "False", "LagUnknown")
        .await?;
    assert!(message.contains("BIRB_gap_5"), "{message}");
    until_workers(&world, 3).await?;
    world.finish().await
}

#[tokio::test]
async fn no_change_of_mode_passes_through_one_worker() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .create(
            "cache",
            "{worker: {scaling: {mode: Fixed, replicas: 7, maxReplicas: 8}}}",
        )
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let seen = world.watch_replicas("cache-worker").await?;
    // All six pairs.
    for mode in ["Lag", "External", "Fixed", "External", "Lag", "Fixed"] {
        let change = format!("{{worker: {{scaling: {{mode: {mode}}}}}}}");
        world.change("cache", &change).await?;
        let reason = match mode {
            "Lag" => "LagUnknown",
            _ => "ScalingDisabled",
        };
        world
            .until_condition("cache", "ScalingActive", "False", reason)
            .await?;
        let worker = world
            .until::<Deployment>("cache-worker", |worker| {
                let main = says_replicas(worker, "birb-nest-operator");
                let autoscaler = says_replicas(worker, "birb-nest-autoscaler");
                match mode {
                    "Fixed" => main,
                    "Lag" => autoscaler && !main,
                    _ => !main,
                }
            })
            .await?;
        assert_eq!(replicas(&worker), Some(7), "{mode}");
    }
    assert_eq!(seen.finish().await, [7]);
    world.finish().await
}

fn says_replicas(deployment: &Deployment, manager: &str) -> bool {
    deployment.managed_fields().iter().any(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        entry.manager.as_deref() == Some(manager)
            && fields.is_some_and(|fields| fields.pointer("/f:spec/f:replicas").is_some())
    })
}

#[tokio::test]
async fn what_others_scale_in_mode_lag_is_put_back_or_ignored() -> Result<()> {
    let (world, stack) = (World::where_all_works().await?, shared().await?);
    Log::new(stack, "others").await?;
    create(
        &world,
        stack,
        "others",
        "{minReplicas: 2, pollInterval: 1s}",
    )
    .await?;
    world
        .until_condition("cache", "ScalingActive", "True", "AsExpected")
        .await?;
    let seen = world.watch_replicas("cache-worker").await?;
    world
        .kubectl(&["scale", "birbnest", "cache", "--replicas=4"], "")
        .await?;
    let message = world
        .until_condition("cache", "ScalingActive", "True", "ScaleIgnored")
        .await?;
    assert!(message.contains("minReplicas"), "{message}");
    let scale = json!({ "spec": { "replicas": 5 } });
    let params = PatchParams::default();
    world
        .of::<Deployment>()
        .patch_scale("cache-worker", &params, &Patch::Merge(scale))
        .await?;
    until_workers(&world, 2).await?;
    assert_eq!(seen.finish().await, [2, 5, 2]);
    world.finish().await
}

fn allows_one(budget: &PodDisruptionBudget) -> bool {
    let spec = budget.spec.as_ref();
    spec.and_then(|spec| spec.max_unavailable.as_ref()) == Some(&IntOrString::Int(1))
}

#[tokio::test]
async fn budgets_guard_what_has_several_pods_and_nothing_else() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .create("cache", "{worker: {scaling: {mode: Fixed, replicas: 3}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let budgets = world.of::<PodDisruptionBudget>();
    for name in ["cache-api", "cache-worker"] {
        let budget = budgets.get(name).await?;
        assert!(allows_one(&budget), "{budget:?}");
    }

    let none = Patch::Merge(json!({ "spec": { "maxUnavailable": 0 } }));
    budgets
        .patch("cache-api", &PatchParams::default(), &none)
        .await?;
    world
        .until::<PodDisruptionBudget>("cache-api", allows_one)
        .await?;
    let before = budgets.get("cache-worker").await?.uid();
    budgets
        .delete("cache-worker", &DeleteParams::default())
        .await?;
    world
        .until::<PodDisruptionBudget>("cache-worker", |budget| budget.uid() != before)
        .await?;

    world
        .change("cache", "{worker: {scaling: {replicas: 1}}}")
        .await?;
    world
        .until_gone::<PodDisruptionBudget>("cache-worker")
        .await?;
    world.change("cache", "{api: {replicas: 1}}").await?;
    world.until_gone::<PodDisruptionBudget>("cache-api").await?;
    world.change("cache", "{api: {replicas: 3}}").await?;
    world
        .until::<PodDisruptionBudget>("cache-api", allows_one)
        .await?;
    world.finish().await
}
