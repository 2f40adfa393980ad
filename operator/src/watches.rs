//! What is watched, so that no object, however odd, and no refusal of the API server stops the others.
//!
//! **Invariant:** a stream from here never ends and never yields an error. A watch that fails is counted, told of, and begun
//! again by itself, later each time.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream::select_all};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DynamicObject, PartialObjectMeta},
    core::{ApiResource, DeserializeGuard, DynamicResourceScope, error_boundary::InvalidObject},
    runtime::{
        Predicate, PredicateConfig, WatchStreamExt,
        events::{Event as Told, EventType},
        predicates,
        reflector::{ObjectRef, Store, store::Writer},
        watcher::{self, Event},
    },
};
use serde_json::Value;

use crate::{
    api::BirbNest,
    context::Context,
    metrics::METRICS,
    render::{CONTROLLER, INSTANCE_LABEL, Kind, MANAGED_BY_LABEL},
    united::united,
};

/// How long an event about a nest that cannot be read may take: the watch waits for it.
const TELL_LIMIT: Duration = Duration::from_secs(5);

/// Nests whose specification, annotations or finalizers have changed; `writer` gets all of them. A nest that cannot be read is
/// told of and then treated as if it were not there: its objects stay as they are.
pub fn nests(
    context: &Arc<Context>,
    writer: Writer<BirbNest>,
) -> impl Stream<Item = watcher::Result<BirbNest>> + Send + use<> {
    let store = writer.as_reader();
    let (reading, noting) = (Arc::clone(context), Arc::clone(context));
    let watch = |api: Api<DeserializeGuard<BirbNest>>| {
        let reading = Arc::clone(&reading);
        endless("BirbNest", watcher::watcher(api, config()))
            .filter_map(move |event| {
                let context = Arc::clone(&reading);
                async move { readable(&context, event).await.map(Ok) }
            })
            .map(|event| {
                // Larger than all the rest, and nobody asks for it.
                event.map(|event| {
                    event.modify(|nest: &mut BirbNest| nest.managed_fields_mut().clear())
                })
            })
            .boxed()
    };
    let apis = apis(context, Api::all, Api::namespaced);
    let events = united(apis.into_iter().map(watch).collect())
        .reflect(writer)
        .inspect(move |event| note(&noting, &store, event));
    let changes = predicates::generation
        .combine(predicates::annotations)
        .combine(predicates::finalizers);
    // The echo of the operator's own status is no change.
    events
        .applied_objects()
        .predicate_filter(changes, PredicateConfig::default())
}

async fn readable(
    context: &Context,
    event: watcher::Result<Event<DeserializeGuard<BirbNest>>>,
) -> Option<Event<BirbNest>> {
    // `endless` has left out the errors.
    match event.ok()? {
        Event::Init => Some(Event::Init),
        Event::InitDone => Some(Event::InitDone),
        Event::InitApply(DeserializeGuard(Ok(nest))) => Some(Event::InitApply(nest)),
        Event::Apply(DeserializeGuard(Ok(nest))) => Some(Event::Apply(nest)),
        Event::Delete(DeserializeGuard(Ok(nest))) => Some(Event::Delete(nest)),
        Event::Delete(DeserializeGuard(Err(odd))) => Some(Event::Delete(stand_in(odd))),
        Event::InitApply(DeserializeGuard(Err(odd))) => {
            tell(context, &odd).await;
            None
        }
        Event::Apply(DeserializeGuard(Err(odd))) => {
            tell(context, &odd).await;
            Some(Event::Delete(stand_in(odd)))
        }
    }
}

/// Only to say which one it is.
fn stand_in(odd: InvalidObject) -> BirbNest {
    BirbNest {
        metadata: odd.metadata,
        ..BirbNest::new("", crate::api::BirbNestSpec::default())
    }
}

async fn tell(context: &Context, odd: &InvalidObject) {
    METRICS.unreadable("BirbNest");
    let name = odd.metadata.name.clone().unwrap_or_default();
    let namespace = odd.metadata.namespace.clone().unwrap_or_default();
    tracing::warn!(
        "nest {namespace}/{name} cannot be read and is left alone: {}",
        odd.error
    );
    if context.may_write().is_err() {
        return;
    }
    let about = stand_in(odd.clone()).object_ref(&());
    let event = Told {
        type_: EventType::Warning,
        reason: "Unreadable".to_owned(),
        note: Some(
            format!(
                "its objects are left as they are, since it does not fit this operator's schema: {}; correct it, or install \
                 the CRD of this release",
                odd.error
            )
            .chars()
            .take(1024)
            .collect(),
        ),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    let published =
        tokio::time::timeout(TELL_LIMIT, context.recorder.publish(&event, &about)).await;
    METRICS.event(matches!(published, Ok(Ok(()))));
}

/// What is remembered of nests ends with them; which Secrets they read is remembered before passes read those.
fn note(context: &Context, nests: &Store<BirbNest>, event: &watcher::Result<Event<BirbNest>>) {
    match event {
        Ok(Event::InitApply(nest) | Event::Apply(nest)) => {
            context.readers.learn(nest, &context.config.images);
        }
        Ok(Event::Delete(nest)) => context.forget(nest),
        Ok(Event::InitDone) => context.keep(&nests.state()),
        _ => {}
    }
}

/// Objects of nests of this kind that were changed or deleted; `writer` gets all of them.
pub fn owned(
    context: &Context,
    kind: Kind,
    writer: Writer<DynamicObject>,
) -> impl Stream<Item = watcher::Result<DynamicObject>> + Send + use<> {
    let resource = kind.api_resource();
    let config = config().labels(&format!("{MANAGED_BY_LABEL}={CONTROLLER}"));
    let watches = match kind {
        Kind::Deployment | Kind::StatefulSet | Kind::Job => {
            let whole = |api| endless(kind.as_str(), watcher::watcher(api, config.clone())).boxed();
            apis_of(context, &resource).into_iter().map(whole).collect()
        }
        _ => {
            let metadata = |api: Api<PartialObjectMeta<DynamicObject>>| {
                let events = watcher::watcher(api, config.clone())
                    .map(|event| event.map(|event| map(event, from_metadata)));
                endless(kind.as_str(), events).boxed()
            };
            apis_of(context, &resource)
                .into_iter()
                .map(metadata)
                .collect()
        }
    };
    united(watches)
        .map(|event| event.map(|event| event.modify(slim)))
        .reflect(writer)
        .touched_objects()
}

/// Lists come in pages of this many objects: a page is held as text and as objects at once, for every kind, and what that took is
/// not all given back.
const PAGE: u32 = 50;

fn config() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

/// Leaves out what is most of an object and what nobody asks the cache for.
fn slim(object: &mut DynamicObject) {
    object.managed_fields_mut().clear();
    if let Some(spec) = object.data.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove("template");
    }
}

fn from_metadata(object: PartialObjectMeta<DynamicObject>) -> DynamicObject {
    DynamicObject {
        types: object.types,
        metadata: object.metadata,
        data: Value::Null,
    }
}

fn map<A, B>(event: Event<A>, f: impl Fn(A) -> B) -> Event<B> {
    match event {
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
        Event::InitApply(object) => Event::InitApply(f(object)),
        Event::Apply(object) => Event::Apply(f(object)),
        Event::Delete(object) => Event::Delete(f(object)),
    }
}

/// Nests that `object` may be of: as its owner reference says, and as its label says, of which somebody may have changed one.
pub fn nests_of(object: &DynamicObject) -> HashSet<ObjectRef<BirbNest>> {
    let Some(namespace) = object.namespace() else {
        return HashSet::new();
    };
    let owners = object
        .owner_references()
        .iter()
        .filter(|owner| owner.kind == BirbNest::kind(&()))
        .map(|owner| owner.name.as_str());
    let labelled = object.labels().get(INSTANCE_LABEL).map(String::as_str);
    owners
        .chain(labelled)
        .map(|name| ObjectRef::new(name).within(&namespace))
        .collect()
}

/// All Secrets but those of Helm, by their metadata alone.
pub fn secrets(
    context: &Context,
) -> impl Stream<Item = watcher::Result<PartialObjectMeta<Secret>>> + Send + use<> {
    let config = config().fields("type!=helm.sh/release.v1");
    let watch = |api: Api<PartialObjectMeta<Secret>>| {
        let events = watcher::watcher(api, config.clone());
        endless("Secret", events).touched_objects().boxed()
    };
    select_all(
        apis(context, Api::all, Api::namespaced)
            .into_iter()
            .map(watch),
    )
}

fn apis_of<K>(context: &Context, resource: &ApiResource) -> Vec<Api<K>>
where
    K: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>,
{
    apis(
        context,
        |client| Api::all_with(client, resource),
        |client, namespace| Api::namespaced_with(client, namespace, resource),
    )
}

/// Where the nests that are looked after may be: in `all` namespaces at once, or `within` each that was named.
fn apis<K>(
    context: &Context,
    all: impl Fn(Client) -> Api<K>,
    within: impl Fn(Client, &str) -> Api<K>,
) -> Vec<Api<K>> {
    let client = || context.client.clone();
    match &context.config.namespaces[..] {
        [] => vec![all(client())],
        named => named.iter().map(|name| within(client(), name)).collect(),
    }
}

/// Counts and tells of errors, and leaves them out: one that reached the controller would slow down all its watches.
pub(crate) fn endless<K>(
    kind: &'static str,
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Send + 'static,
{
    events
        .default_backoff()
        .filter_map(move |event| async move {
            match event {
                Ok(event) => Some(Ok(event)),
                Err(error) if is_unknown(&error) => {
                    tracing::debug!("the API server does not know {kind}s yet");
                    None
                }
                Err(error) => {
                    METRICS.watch_error(kind);
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "the watch of {kind}s failed; beginning it again"
                    );
                    None
                }
            }
        })
}

/// Whether the kind is not served: its CRD may be installed later.
fn is_unknown(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}
