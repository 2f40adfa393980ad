//! What an API server, and the way to it, may do to an operator.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{
    Fault, Installation, Operator, PATIENCE, Proxy, Request, THROUGH_PROXY, client, eventually,
    install, nothing_forbidden, requests,
};
use birb_nest_operator::{api::BirbNest, render::Kind};
use birb_nest_stack::Root;
use jiff::Timestamp;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Service};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    drift::meddle,
    kubelet::Kubelet,
    leaders::{LEASE, until_held_by},
    world::{Shared, World},
};

/// As many workers as are said, so that no other manager says how many.
const FIXED: &str = "{worker: {scaling: {mode: Fixed, replicas: 2}}}";

/// Nothing but watches brings a pass about here: the resync and the repetition of what is blocked are far away.
#[tokio::test]
async fn no_refusal_and_no_cut_ends_a_watch() -> Result<()> {
    let flags = ["--lease-duration=120s", "--retry=1h", "--resync=1h"];
    let (shared, proxy) = Shared::behind_proxy("refusals", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create("before", FIXED).await?;
    world.until_ready("before", "True", "Available").await?;
    let mut watched: BTreeSet<String> = Kind::ALL
        .into_iter()
        .map(|kind| kind.api_resource().plural)
        .collect();
    watched.insert("birbnests".to_owned());

    for (number, fault) in [
        Fault::Refuse(429),
        Fault::Refuse(500),
        Fault::WatchError(410),
        Fault::WatchError(429),
        Fault::WatchError(500),
        Fault::WatchGarbage,
        Fault::HoldAll,
    ]
    .into_iter()
    .enumerate()
    {
        proxy.fault(fault);
        eventually(&format!("all watches meet {fault:?}"), || async {
            let missing: Vec<String> = watched.difference(&proxy.hit()).cloned().collect();
            Ok(if missing.is_empty() {
                Ok(())
            } else {
                Err(format!("{missing:?} do not"))
            })
        })
        .await?;
        proxy.heal();
        let name = format!("after-{number}");
        world.create(&name, FIXED).await?;
        world.until_ready(&name, "True", "Available").await?;
        println!("{fault:?}: survived");
    }
    every_watch_lives(&world).await?;
    let text = reqwest::get(format!("{}/metrics", world.shared.operator.url))
        .await?
        .text()
        .await?;
    ensure!(
        text.contains("birbnest_operator_watch_errors_total{kind=\"BirbNest\"}"),
        "{text}"
    );
    world.finish().await
}

/// What is deleted of the nest called `before` is made again, of whatever kind; and a Secret that comes is seen.
pub async fn every_watch_lives(world: &World) -> Result<()> {
    for (kind, name, _) in world.objects("before").await? {
        if [Kind::Secret, Kind::Job].contains(&kind) {
            continue;
        }
        let resource = kind.api_resource();
        let api: Api<DynamicObject> =
            Api::namespaced_with(world.client.clone(), &world.namespace, &resource);
        let before = api.get(&name).await?.uid();
        api.delete(&name, &DeleteParams::background()).await?;
        eventually(
            &format!("{} {name} is there again", kind.as_str()),
            || async {
                let now = api.get_opt(&name).await?.and_then(|object| object.uid());
                Ok(if now.is_some() && now != before {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                })
            },
        )
        .await?;
    }
    let external = "{postgres: {external: {urlSecretRef: {name: servers, key: postgres}}}}";
    world.create("reader", external).await?;
    world
        .until_ready("reader", "False", "SecretMissing")
        .await?;
    world
        .secret("servers", &[("postgres", "postgres://birb@db/birb")])
        .await?;
    world
        .until_ready("reader", "True", "Available")
        .await
        .map(drop)
}

/// Neither an event nor an error: the resync alone is left, and it must not believe what is remembered.
#[tokio::test]
async fn what_no_watch_told_of_is_put_back_by_the_resync() -> Result<()> {
    let flags = ["--lease-duration=120s", "--retry=1h", "--resync=5s"];
    let (shared, proxy) = Shared::behind_proxy("resync", &flags).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create("cache", FIXED).await?;
    world.until_ready("cache", "True", "Available").await?;
    proxy.fault(Fault::Mute);
    let services: Api<Service> = world.of();
    let before = services.get("cache").await?;
    let edit = json!({ "metadata": { "labels": { "app.kubernetes.io/component": "edited" } } });
    let params = PatchParams::default();
    services
        .patch("cache", &params, &Patch::Merge(edit))
        .await?;
    eventually("the proxy swallows that", || async {
        let hit = proxy.hit();
        Ok(if hit.contains("services") {
            Ok(())
        } else {
            Err(format!("{hit:?}"))
        })
    })
    .await?;
    let is_as_before = |service: &Service| service.labels() == before.labels();
    world.until::<Service>("cache", is_as_before).await?;
    let told = format!("put back Service {}/cache", world.namespace);
    // Said when the answer has come back through the proxy.
    eventually("that is said", || async {
        let log = world.shared.operator.process.log()?;
        Ok(if log.contains(&told) {
            Ok(())
        } else {
            Err(log)
        })
    })
    .await?;
    world.finish().await
}

/// Kubernetes would kill it after a minute, and the next one would wait for the Lease all that time.
#[tokio::test]
async fn a_leader_that_was_never_answered_ends_when_it_is_told_to() -> Result<()> {
    let root = Root::temporary("unanswered", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let installation = install(&cluster, false).await?;
    let leases = Api::namespaced(client(&cluster).await?, &installation.namespace);
    let proxy = Proxy::start(&cluster).await?;
    proxy.fault(Fault::Refuse(500));
    let (dir, name) = (root.path(), "unanswered");
    let operator = Operator::start_through(&proxy, &cluster, &installation, dir, name, &[]).await?;
    until_held_by(&leases, &installation.name, name).await?;
    eventually("it asks for nests", || async {
        let hit = proxy.hit();
        Ok(if hit.contains("birbnests") {
            Ok(())
        } else {
            Err(format!("{hit:?}"))
        })
    })
    .await?;
    let end = operator.process.terminate(PATIENCE).await?;
    let log = operator.process.log()?;
    ensure!(
        end.success() && log.contains("gave back the Lease"),
        "{end}: {log}"
    );
    nothing_forbidden(&cluster, &installation)
}

/// What a pass has begun it ends, status and all; the next one need not find out what was half done.
#[tokio::test]
async fn a_pass_under_way_is_finished_by_a_leader_that_is_told_to_end() -> Result<()> {
    let (shared, proxy) = Shared::behind_proxy("ending", &["--lease-duration=120s"]).await?;
    let world = World::on(Arc::clone(&shared)).await?;
    let operator = &shared.operator.process;
    proxy.fault(Fault::HoldWrites);
    world.create("cache", "{}").await?;
    eventually("a write is held", || async {
        let hit = proxy.hit();
        Ok(if hit.is_empty() {
            Err("no write yet".to_owned())
        } else {
            Ok(())
        })
    })
    .await?;
    let ending = operator.terminate(PATIENCE);
    tokio::pin!(ending);
    let told = eventually("it knows that it is to end", || async {
        let log = operator.log()?;
        Ok(if log.contains("finishing the passes under way") {
            Ok(())
        } else {
            Err(log)
        })
    });
    tokio::select! {
        end = &mut ending => bail!("it ended amidst its pass: {}", end?),
        told = told => told?,
    }
    proxy.heal();
    let end = ending.await?;
    let log = operator.log()?;
    ensure!(
        end.success() && log.contains("gave back the Lease"),
        "{end}: {log}"
    );
    let ready = world
        .until_ready("cache", "False", "ServerNotReady")
        .await?;
    println!("{ready}");
    world.finish().await
}

#[tokio::test]
async fn a_leader_that_cannot_renew_stops_before_the_next_one_starts() -> Result<()> {
    // It could go on writing for ever.
    cut_off(Fault::HoldElection).await
}

#[tokio::test]
async fn a_leader_that_is_cut_off_stops_before_the_next_one_starts() -> Result<()> {
    // What it was about to write may arrive when the link is there again.
    cut_off(Fault::HoldAll).await
}

/// A rollout of the operator's own Deployment: the new one is ready, then the old one is told to end.
#[tokio::test]
async fn a_replaced_operator_is_followed_at_once_and_their_writes_never_mingle() -> Result<()> {
    // Far longer than any takeover may take: it is given back, or the test fails.
    let pair = Pair::start(Duration::from_secs(120)).await?;
    let since = Timestamp::now();
    let nests: Api<BirbNest> = Api::default_namespaced(pair.client.clone());
    let change =
        json!({ "spec": { "api": { "service": { "annotations": { "changed": "yes" } } } } });
    let change = async {
        let (params, change) = (PatchParams::default(), Patch::Merge(change));
        anyhow::Ok(nests.patch("cache", &params, &change).await?)
    };
    let (end, _) = tokio::try_join!(pair.first.process.terminate(PATIENCE), change)?;
    let services: Api<Service> = Api::default_namespaced(pair.client.clone());
    eventually("the change is applied", || async {
        let service = services.get("cache").await?;
        let found = service.annotations().get("changed").cloned();
        Ok(found
            .map(drop)
            .ok_or_else(|| format!("{:?}", service.metadata)))
    })
    .await?;
    pair.until_put_back(2, 15).await?;
    pair.meddler.abort();
    let (last, next) = pair.one_after_the_other()?;
    let (silence, after) = (next.duration_since(last), next.duration_since(since));
    println!(
        "{silence:?} between their writes; {after:?} from SIGTERM to the first write of the other"
    );
    ensure!(after.unsigned_abs() < LEASE * 4, "only after {after:?}");
    let log = pair.first.process.log()?;
    ensure!(
        end.success() && log.contains("gave back the Lease"),
        "{end}: {log}"
    );
    nothing_forbidden(&pair.cluster, &pair.installation)
}

/// Two operators, of which the first leads, and reaches the API server through a proxy; and somebody who never ceases to change
/// what a leader puts back.
struct Pair {
    first: Operator,
    _second: Operator,
    proxy: Proxy,
    meddler: JoinHandle<()>,
    client: Client,
    leases: Api<Lease>,
    installation: Installation,
    cluster: Cluster,
    _root: Root,
}

impl Pair {
    /// The first one has put back what was changed, and the second one is ready.
    async fn start(lease: Duration) -> Result<Self> {
        let root = Root::temporary("pair", |_| Ok(()))?;
        let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
        let installation = install(&cluster, false).await?;
        let client = client(&cluster).await?;
        let leases = Api::namespaced(client.clone(), &installation.namespace);
        let lease = format!("--lease-duration={}s", lease.as_secs());
        let proxy = Proxy::start(&cluster).await?;
        let (dir, flags) = (root.path(), [lease.as_str()]);
        let first =
            Operator::start_through(&proxy, &cluster, &installation, dir, "first", &flags).await?;
        until_held_by(&leases, &installation.name, "first").await?;
        let second = Operator::start_with(&cluster, &installation, dir, "second", &flags).await?;

        let nests: Api<BirbNest> = Api::default_namespaced(client.clone());
        let nest = BirbNest::new("cache", Default::default());
        nests.create(&PostParams::default(), &nest).await?;
        let meddler = meddle(Api::default_namespaced(client.clone()), "cache");
        let pair = Self {
            first,
            _second: second,
            proxy,
            meddler,
            client,
            leases,
            installation,
            cluster,
            _root: root,
        };
        pair.until_put_back(1, 3).await?;
        Ok(pair)
    }

    /// Writes of the first and of the second, but for those of the election.
    fn writes(&self) -> Result<(Vec<Request>, Vec<Request>)> {
        let all = requests(&self.cluster, &self.installation)?.into_iter();
        let writes = all.filter(|request| request.is_write() && request.resource != "leases");
        Ok(writes.partition(|request| request.user_agent == THROUGH_PROXY))
    }

    /// Waits until the first one or the second one has written so many Services.
    async fn until_put_back(&self, number: u32, n_services: usize) -> Result<()> {
        let what = format!("operator {number} puts back what was changed");
        eventually(&what, || async {
            let (first, second) = self.writes()?;
            let writes = if number == 1 { first } else { second };
            let n = writes
                .iter()
                .filter(|write| write.resource == "services")
                .count();
            Ok(if n >= n_services {
                Ok(())
            } else {
                Err(format!("{n} times"))
            })
        })
        .await
    }

    /// When the last write of the first one was answered and the first write of the second one came. Fails unless it was in this
    /// order.
    fn one_after_the_other(&self) -> Result<(Timestamp, Timestamp)> {
        let (first, second) = self.writes()?;
        let last = first.iter().map(|write| write.answered).max();
        let next = second.iter().map(|write| write.received).min();
        let last = last.context("the first wrote")?;
        let next = next.context("the second wrote")?;
        ensure!(
            last < next,
            "the first wrote until {last}, the second from {next} on"
        );
        Ok((last, next))
    }
}

/// The leader's link has this fault.
async fn cut_off(fault: Fault) -> Result<()> {
    let pair = Pair::start(LEASE).await?;
    let since = Timestamp::now();
    pair.proxy.fault(fault);
    until_held_by(&pair.leases, &pair.installation.name, "second").await?;
    let held_until = Timestamp::now();
    // An answer to what is held would tell the first that it has lost the Lease.
    if fault == Fault::HoldAll {
        pair.proxy.heal();
    }
    // Its first pass alone writes the five Services; after that each change is a race that the first might win.
    pair.until_put_back(2, 15).await?;
    let end = tokio::time::timeout(PATIENCE, pair.first.process.wait()).await;
    pair.meddler.abort();
    let (last, next) = pair.one_after_the_other()?;
    let (of_first, _) = pair.writes()?;
    let n_late = of_first
        .iter()
        .filter(|write| write.received > since)
        .count();
    println!(
        "{fault:?}: {n_late} writes of the first after its link failed; then {:?} of silence",
        next.duration_since(last)
    );
    let after = of_first.iter().find(|write| write.received > held_until);
    ensure!(
        after.is_none(),
        "the first wrote when the second led: {after:?}"
    );
    // Else this would show the link's cut, and not that it stops.
    ensure!(
        fault != Fault::HoldElection || n_late > 0,
        "the first did not go on at all"
    );

    let log = pair.first.process.log()?;
    let end = end.with_context(|| format!("the first still runs: {log}"))??;
    ensure!(
        end.code() == Some(1) && log.contains("may not lead any more"),
        "{end}: {log}"
    );
    nothing_forbidden(&pair.cluster, &pair.installation)
}
