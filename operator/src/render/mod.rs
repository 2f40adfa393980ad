//! From a resolved nest to the objects it consists of. Pure: no I/O, no clock, no randomness, so the same nest renders to
//! the same bytes and a pass in which nothing changed writes nothing.
//!
//! Objects are written as JSON, as they would stand in a manifest, with only the fields that the operator means to own;
//! a test sends each through its Kubernetes type and back, so that no field is misspelt.

mod autoscaler;
mod checksum;
mod data_plane;
mod deployments;
mod disruption;
mod log_access;
mod monitoring;
mod names;
mod nats;
mod network;
mod network_policy;
mod overrides;
mod pod;
mod postgres;
mod redis;
mod secrets;
mod setup;
mod stateful_set;

pub use autoscaler::autoscaler;
pub use checksum::Inputs;
pub use data_plane::secret_keys;
pub use deployments::{api, replicas_of, worker};
pub use disruption::budgets;
pub use log_access::{CONSUMER, LogAccess, log_access};
pub use monitoring::monitoring;
pub use names::{
    CONTROLLER, INSTANCE_LABEL, MANAGED_BY_LABEL, Names, UID_LABEL, owner_reference, selector_text,
};
pub use network_policy::network_policies;
pub use overrides::overridden;
pub use secrets::{GeneratedSecret, generated_secrets};
pub use setup::{CONTAINER as SETUP_CONTAINER, setup};

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::Job,
        core::v1::{ConfigMap, Secret, Service, ServiceAccount},
        networking::v1::{Ingress, NetworkPolicy},
        policy::v1::PodDisruptionBudget,
    },
    serde::Serialize,
};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

use crate::resolve::Nest;

/// Kinds of objects a nest consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// For applications, and configuration of managed servers.
    ConfigMap,
    /// API and workers.
    Deployment,
    /// What scales the API.
    HorizontalPodAutoscaler,
    /// From outside to the API.
    Ingress,
    /// Setup.
    Job,
    /// Who may talk to managed servers.
    NetworkPolicy,
    /// How many pods of API and workers may be evicted at once.
    PodDisruptionBudget,
    /// What is worth an alert. Not a kind of Kubernetes: it may not be served.
    PrometheusRule,
    /// Generated credentials.
    Secret,
    /// In front of the API and the managed servers.
    Service,
    /// The identity of a nest's pods, which may do nothing.
    ServiceAccount,
    /// How metrics are collected. Not a kind of Kubernetes: it may not be served.
    ServiceMonitor,
    /// Managed servers.
    StatefulSet,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::ConfigMap,
        Self::Deployment,
        Self::HorizontalPodAutoscaler,
        Self::Ingress,
        Self::Job,
        Self::NetworkPolicy,
        Self::PodDisruptionBudget,
        Self::PrometheusRule,
        Self::Secret,
        Self::Service,
        Self::ServiceAccount,
        Self::ServiceMonitor,
        Self::StatefulSet,
    ];

    /// How the API server calls it.
    pub fn api_resource(self) -> ApiResource {
        match self {
            Self::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Self::Deployment => ApiResource::erase::<Deployment>(&()),
            Self::HorizontalPodAutoscaler => ApiResource::erase::<HorizontalPodAutoscaler>(&()),
            Self::Ingress => ApiResource::erase::<Ingress>(&()),
            Self::Job => ApiResource::erase::<Job>(&()),
            Self::NetworkPolicy => ApiResource::erase::<NetworkPolicy>(&()),
            Self::PodDisruptionBudget => ApiResource::erase::<PodDisruptionBudget>(&()),
            Self::PrometheusRule => prometheus(self.as_str(), "prometheusrules"),
            Self::Secret => ApiResource::erase::<Secret>(&()),
            Self::Service => ApiResource::erase::<Service>(&()),
            Self::ServiceAccount => ApiResource::erase::<ServiceAccount>(&()),
            Self::ServiceMonitor => prometheus(self.as_str(), "servicemonitors"),
            Self::StatefulSet => ApiResource::erase::<StatefulSet>(&()),
        }
    }

    /// Its name, for people and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Deployment => "Deployment",
            Self::HorizontalPodAutoscaler => "HorizontalPodAutoscaler",
            Self::Ingress => "Ingress",
            Self::Job => "Job",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::PodDisruptionBudget => "PodDisruptionBudget",
            Self::PrometheusRule => "PrometheusRule",
            Self::Secret => "Secret",
            Self::Service => "Service",
            Self::ServiceAccount => "ServiceAccount",
            Self::ServiceMonitor => "ServiceMonitor",
            Self::StatefulSet => "StatefulSet",
        }
    }
}

/// A kind of the Prometheus operator.
fn prometheus(kind: &str, plural: &str) -> ApiResource {
    let kind = GroupVersionKind::gvk("monitoring.coreos.com", "v1", kind);
    ApiResource::from_gvk_with_plural(&kind, plural)
}

/// An object as it should be, with the fields that the operator owns and no others.
#[derive(Clone, Debug, PartialEq)]
pub struct Child {
    /// What it is.
    pub kind: Kind,
    /// Its name, in the nest's namespace.
    pub name: String,
    /// The whole of it, `apiVersion` and `kind` included.
    pub object: Value,
}

impl Child {
    /// Adds to `spec` (or whatever else `body` holds) the parts that all children of `nest` share.
    fn new(nest: &Nest, kind: Kind, name: String, component: &str, body: Value) -> Self {
        let resource = kind.api_resource();
        let mut object = serde_json::json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            "metadata": {
                "name": name,
                "namespace": nest.namespace,
                "labels": names::labels(nest, component),
                "ownerReferences": [owner_reference(nest)],
            },
        });
        merge(&mut object, body);
        Self { kind, name, object }
    }

    /// The same with further labels, where it has none of that name.
    fn labelled(mut self, labels: &BTreeMap<String, String>) -> Self {
        let mut all = json(labels);
        merge(&mut all, self.object["metadata"]["labels"].take());
        self.object["metadata"]["labels"] = all;
        self
    }
}

/// Lays the objects of `over` into those of `base`, member by member; anything else replaces what was there.
fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (name, value) in over {
                merge(base.entry(name).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("Kubernetes types are JSON")
}

/// What can be there before anything runs: the identity of the pods, the ways to them, and the managed servers. `inputs` are the
/// bytes of the Secrets that the nest uses.
pub fn foundation(nest: &Nest, inputs: &Inputs) -> Vec<Child> {
    let mut children = vec![
        network::service_account(nest),
        network::api_service(nest),
        network::connection(nest),
    ];
    children.extend(network::ingress(nest));
    children.extend(monitoring::metrics_service(nest));
    if let Some(server) = nest.redis.managed() {
        children.extend(redis::children(nest, server, inputs));
    }
    if let Some(server) = nest.nats.managed() {
        children.extend(nats::children(nest, server, inputs));
    }
    if let Some(server) = nest.postgres.managed() {
        children.extend(postgres::children(nest, server));
    }
    children
}

/// Names of the volume claims of the managed servers.
pub fn volumes(nest: &Nest) -> Vec<String> {
    let names = Names(&nest.name);
    let sets = [
        nest.nats.managed().map(|_| names.nats()),
        nest.postgres.managed().map(|_| names.postgres()),
    ];
    sets.into_iter()
        .flatten()
        .map(|set| names.volume(&set))
        .collect()
}

#[cfg(test)]
mod tests;
