//! What makes a pass happen: changes of nests, of their objects, of Secrets they read; and time.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, channel::mpsc, stream};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, PartialObjectMeta},
    runtime::{
        Controller,
        controller::Action,
        reflector::{self, store::Writer},
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::Liveness,
    api::BirbNest,
    context::Context,
    error::{Error, Result},
    metrics::METRICS,
    pass::{Ended, pass},
    render::Kind,
    scaling::{self, follow::follow},
    upgrades, watches,
};

/// A pass waits this long before it looks, so that changes which come together, such as the echo of our own writes, cause one.
/// The controller's own debounce would not do: it begins anew with each change, and somebody who changes an object without end
/// would keep the nest from its passes for ever.
const SETTLE: Duration = Duration::from_millis(500);
/// Decisions about workers that may wait for the controller to hear of them.
const DECISIONS: usize = 64;

/// How often the loop shows that it goes on.
const BEAT: Duration = Duration::from_secs(1);

/// Makes passes until `stopping`; passes under way are finished. Fills `owned` with what is watched.
pub async fn run(
    context: Arc<Context>,
    owned: Vec<(Kind, Writer<DynamicObject>)>,
    liveness: Liveness,
    stopping: CancellationToken,
) {
    let (nests, writer) = reflector::store();
    scaling::observe(&context.scaling);
    upgrades::observe(&context.upgrades);
    let (decided, decisions) = mpsc::channel(DECISIONS);
    let scaling = Arc::clone(&context.scaling);
    let follow = follow(&scaling, nests.clone(), decided);
    let turns = context.upgrades.open(nests.clone());
    let listed = nests.clone();
    let index = Arc::clone(&context);
    let readers = move |secret: PartialObjectMeta<Secret>| {
        let namespace = secret.namespace().unwrap_or_default();
        index.readers.of(&namespace, &secret.name_any())
    };
    let mut controller = Controller::for_stream(watches::nests(&context, writer), nests)
        .watches_stream(watches::secrets(&context), readers)
        .reconcile_on(stream::select(decisions, turns));
    for (kind, writer) in owned {
        let objects = watches::owned(&context, kind, writer);
        let of = |object: DynamicObject| watches::nests_of(&object);
        controller = controller.watches_stream_with(objects, of, kind.api_resource());
    }
    let closing = Arc::clone(&context);
    let stopped = stopping.clone();
    let passes = controller
        .graceful_shutdown_on(async move {
            stopped.cancelled_owned().await;
            closing.turns.close();
        })
        .run(reconcile, on_error, context)
        // A failed pass was told of where it was handled; and that a nest was deleted in between is no error.
        .for_each(async |_| {});
    // Beside the passes in one task: it stops with them.
    let beats = async {
        let mut ticks = tokio::time::interval(BEAT);
        loop {
            ticks.tick().await;
            liveness.beat();
        }
    };
    // The controller begins no pass before all nests are listed, and when told to stop before that, it waits for the list
    // without reading on: for ever.
    let stopped_before_the_first_pass = async {
        tokio::select! {
            () = stopping.cancelled() => {}
            _ = listed.wait_until_ready() => std::future::pending().await,
        }
    };
    tokio::select! {
        () = passes => {}
        () = stopped_before_the_first_pass => {}
        () = follow => {}
        () = beats => {}
    }
}

async fn reconcile(nest: Arc<BirbNest>, context: Arc<Context>) -> Result<Action> {
    tokio::time::sleep(SETTLE).await;
    // Passes under way are finished, others are not begun, when the process ends.
    let Ok(_turn) = context.turns.acquire().await else {
        return Ok(Action::await_change());
    };
    let began = Instant::now();
    let result = tokio::time::timeout(context.config.pass_limit, fresh_pass(&nest, &context))
        .await
        .unwrap_or(Err(Error::TimedOut));
    let (label, reason) = match &result {
        Ok(Some(ended)) if ended.is_blocked => ("blocked", ended.readiness.as_str()),
        Ok(Some(ended)) => ("ok", ended.readiness.as_str()),
        Ok(None) => ("ok", "Deleted"),
        Err(error) => ("error", error.metric_label()),
    };
    METRICS.pass(label, reason, began.elapsed());
    let ended = result?;
    match ended {
        Some(ended) => {
            context.backoff.forget(&nest.uid().unwrap_or_default());
            Ok(Action::requeue(ended.again))
        }
        // Its objects go with it; whoever follows its lag notices by itself.
        None => {
            context.forget(&nest);
            Ok(Action::await_change())
        }
    }
}

/// Looks at the nest as it is now: the watch may lag behind what we wrote ourselves. Nothing if it is gone, or going.
async fn fresh_pass(nest: &BirbNest, context: &Context) -> Result<Option<Ended>> {
    let namespace = nest.namespace().expect("a nest lives in a namespace");
    let found = Api::<BirbNest>::namespaced(context.client.clone(), &namespace)
        .get_opt(&nest.name_any())
        .await
        .map_err(|source| Error::Nest {
            what: "read the nest",
            source,
        })?;
    match found {
        // Whoever deletes its objects, or keeps them for a while, is not disturbed.
        Some(nest) if nest.metadata.deletion_timestamp.is_some() => {
            let name = nest.name_any();
            tracing::debug!("nest {namespace}/{name} is being deleted and is left alone");
            Ok(None)
        }
        Some(nest) => pass(context, &nest).await.map(Some),
        None => Ok(None),
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
    let pause = context
        .backoff
        .failed(&nest.uid().unwrap_or_default(), nest.metadata.generation);
    tracing::warn!(
        error = error as &dyn std::error::Error,
        nest.name = nest.name_any(),
        nest.namespace = nest.namespace(),
        "the pass over nest {name} failed; again in {:.1} s",
        pause.as_secs_f64(),
    );
    Action::requeue(pause)
}
