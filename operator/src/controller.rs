//! What makes a pass happen: changes of nests, of their objects, of Secrets they read; and time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, channel::mpsc};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    batch::v1::Job,
    core::v1::{ConfigMap, Secret, Service, ServiceAccount},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, ResourceExt,
    api::PartialObjectMeta,
    runtime::{
        Controller, WatchStreamExt,
        controller::{self, Action},
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    api::BirbNest,
    context::Context,
    error::{Error, Result},
    metrics::METRICS,
    pass::{RELEASE, pass},
    render::{self, CONTROLLER, MANAGED_BY_LABEL},
    resolve::resolve,
    scaling::{self, follow::follow},
};

/// Longest pass: one that takes longer waits for an API server that hangs.
const PASS_LIMIT: Duration = Duration::from_secs(60);
/// Changes within this time, such as the echo of our own writes, cause one pass.
const DEBOUNCE: Duration = Duration::from_millis(500);
/// Passes at once, each over another nest.
const CONCURRENCY: u16 = 8;
/// Decisions about workers that may wait for the controller to hear of them.
const DECISIONS: usize = 64;

/// Makes passes until `stopping`; passes under way are finished.
pub async fn run(context: Arc<Context>, stopping: CancellationToken) {
    let client = context.client.clone();
    let owned = watcher::Config::default().labels(&format!("{MANAGED_BY_LABEL}={CONTROLLER}"));
    let nests = Controller::new(
        Api::<BirbNest>::all(client.clone()),
        watcher::Config::default(),
    );
    let store = nests.store();
    scaling::observe(&context.scaling);
    let (decided, decisions) = mpsc::channel(DECISIONS);
    let scaling = Arc::clone(&context.scaling);
    let follow = follow(&scaling, nests.store(), decided);
    // Only metadata of them is ever watched.
    let secrets = watcher(
        Api::<PartialObjectMeta<Secret>>::all(client.clone()),
        watcher::Config::default().fields("type!=helm.sh/release.v1"),
    );
    let images = context.config.images.clone();
    let readers = move |secret: PartialObjectMeta<Secret>| readers(&store, &images, &secret);
    let passes = nests
        .with_config(
            controller::Config::default()
                .debounce(DEBOUNCE)
                .concurrency(CONCURRENCY),
        )
        .owns(Api::<ConfigMap>::all(client.clone()), owned.clone())
        .owns(Api::<Deployment>::all(client.clone()), owned.clone())
        .owns(Api::<Job>::all(client.clone()), owned.clone())
        .owns(
            Api::<PodDisruptionBudget>::all(client.clone()),
            owned.clone(),
        )
        .owns(Api::<Service>::all(client.clone()), owned.clone())
        .owns(Api::<ServiceAccount>::all(client.clone()), owned.clone())
        .owns(Api::<StatefulSet>::all(client), owned)
        .watches_stream(secrets.touched_objects(), readers)
        .reconcile_on(decisions)
        .graceful_shutdown_on(stopping.cancelled_owned())
        .run(reconcile, on_error, context)
        .for_each(async |result| {
            // A failed pass was told of where it was handled; and that a nest was deleted in between is no error.
            if let Err(controller::Error::QueueError(error)) = result {
                METRICS.watch_error();
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a watch failed; beginning it again"
                );
            }
        });
    tokio::select! {
        () = passes => {}
        () = follow => {}
    }
}

/// Nests that read `secret`.
fn readers(
    store: &Store<BirbNest>,
    images: &crate::config::Images,
    secret: &PartialObjectMeta<Secret>,
) -> Vec<ObjectRef<BirbNest>> {
    let name = secret.name_any();
    store
        .state()
        .iter()
        .filter(|nest| nest.namespace() == secret.namespace())
        .filter(|nest| {
            let keys = render::secret_keys(&resolve(nest, images, RELEASE));
            keys.iter().any(|key| key.name == name)
        })
        .map(|nest| ObjectRef::from_obj(nest.as_ref()))
        .collect()
}

async fn reconcile(nest: Arc<BirbNest>, context: Arc<Context>) -> Result<Action> {
    let began = Instant::now();
    let result = tokio::time::timeout(PASS_LIMIT, fresh_pass(&nest, &context))
        .await
        .unwrap_or(Err(Error::TimedOut));
    METRICS.pass(
        result.as_ref().map_or_else(Error::metric_label, |_| "ok"),
        began.elapsed(),
    );
    if result.is_ok() {
        context.succeeded(&nest.uid().unwrap_or_default());
    }
    result
}

/// Looks at the nest as it is now: the watch may lag behind what we wrote ourselves.
async fn fresh_pass(nest: &BirbNest, context: &Context) -> Result<Action> {
    let namespace = nest.namespace().expect("a nest lives in a namespace");
    let found = Api::<BirbNest>::namespaced(context.client.clone(), &namespace)
        .get_opt(&nest.name_any())
        .await
        .map_err(|source| Error::Nest {
            what: "read the nest",
            source,
        })?;
    match found {
        Some(nest) if nest.metadata.deletion_timestamp.is_none() => {
            pass(context, &nest).await.map(Action::requeue)
        }
        // Its objects go with it; whoever follows its lag notices by itself.
        _ => {
            context.succeeded(&nest.uid().unwrap_or_default());
            Ok(Action::await_change())
        }
    }
}

fn on_error(nest: Arc<BirbNest>, error: &Error, context: Arc<Context>) -> Action {
    let name = format!(
        "{}/{}",
        nest.namespace().unwrap_or_default(),
        nest.name_any()
    );
    if error.is_namespace_ending() {
        tracing::debug!("the namespace of nest {name} is ending, and the nest with it");
        return Action::await_change();
    }
    if error.is_conflict() {
        tracing::debug!(
            "somebody else wrote at the same time as the pass over nest {name}; again at once"
        );
        return Action::requeue(Duration::from_millis(100));
    }
    let pause = context.failed(&nest.uid().unwrap_or_default());
    tracing::warn!(
        error = error as &dyn std::error::Error,
        nest.name = nest.name_any(),
        nest.namespace = nest.namespace(),
        "the pass over nest {name} failed; again in {:.1} s",
        pause.as_secs_f64(),
    );
    Action::requeue(pause)
}
