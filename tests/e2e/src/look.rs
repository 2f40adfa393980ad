//! Asking an API server, and waiting for what should be there.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use birb_nest_cluster::Cluster;
use birb_nest_operator::api::BirbNest;
use k8s_openapi::{api::events::v1::Event, apimachinery::pkg::apis::meta::v1::Condition};
use kube::{
    Api, Client, ResourceExt,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};

/// How long anything is waited for, on a machine that compiles beside it.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Waits until `look` returns something, looking again and again; fails with what `look` said last.
///
/// # Errors
/// It did not in time, or `look` failed.
pub async fn eventually<T, F: Future<Output = Result<std::result::Result<T, String>>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match look()
            .await
            .with_context(|| format!("while waiting: {what}"))?
        {
            Ok(found) => return Ok(found),
            Err(instead) if Instant::now() > deadline => {
                bail!("waited {PATIENCE:?} in vain: {what}; instead: {instead}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// A condition of `nest`, if it is about the nest's newest generation.
pub fn condition<'a>(nest: &'a BirbNest, type_: &str) -> Option<&'a Condition> {
    nest.status.as_ref()?.conditions.iter().find(|condition| {
        condition.type_ == type_ && condition.observed_generation == nest.metadata.generation
    })
}

/// Names of `objects`, sorted.
pub fn names_of<K: ResourceExt>(objects: &[K]) -> Vec<String> {
    let mut names: Vec<String> = objects.iter().map(ResourceExt::name_any).collect();
    names.sort();
    names
}

/// A client of the administrator's for the runtime of one test.
///
/// # Errors
/// The kubeconfig cannot be used.
pub async fn client(cluster: &Cluster) -> Result<Client> {
    // The first test installs it; all want the same.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig())?;
    let config =
        kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Waits until events told of the nest called `name`, for this reason, `times` times: an event follows the status that it
/// tells of.
///
/// # Errors
/// It was told too often, or not in time; or as of any request.
pub async fn told(
    client: &Client,
    namespace: &str,
    name: &str,
    reason: &str,
    times: i32,
) -> Result<()> {
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    eventually(&format!("{reason} is told {times} times"), || async {
        let mut so_far = 0;
        let mut all = Vec::new();
        for event in api.list(&ListParams::default()).await? {
            let about = event.regarding.as_ref();
            if about.and_then(|about| about.name.as_deref()) != Some(name) {
                continue;
            }
            let (its, n) = (
                event.reason.unwrap_or_default(),
                event.series.map_or(1, |series| series.count),
            );
            so_far += if its == reason { n } else { 0 };
            all.push((its, n));
        }
        ensure!(so_far <= times, "too often: {all:?}");
        Ok(if so_far == times {
            Ok(())
        } else {
            Err(format!("{all:?}"))
        })
    })
    .await
}
