//! Names, labels and owners.

use kube::Resource;
use serde_json::{Value, json};

use crate::{api::BirbNest, resolve::Nest};

/// Field manager of the operator, and the value of `app.kubernetes.io/managed-by`.
pub const CONTROLLER: &str = "birb-nest-operator";
/// Says who made an object.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
/// Says which nest an object is of.
pub const INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
/// Says which part of a nest an object is of.
pub(super) const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Says which life of a nest of that name: not part of any selector.
pub const UID_LABEL: &str = "cache.birb.party/nest-uid";

/// What the objects of a nest are called.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a>(pub &'a str);

impl Names<'_> {
    /// The Service in front of the API, and the pods' ServiceAccount.
    pub fn nest(self) -> String {
        self.0.to_owned()
    }

    /// Deployment of the API.
    pub fn api(self) -> String {
        format!("{}-api", self.0)
    }

    /// Deployment of the workers.
    pub fn worker(self) -> String {
        format!("{}-worker", self.0)
    }

    /// StatefulSet, Service, ConfigMap and Secret of the managed Redis.
    pub fn redis(self) -> String {
        format!("{}-redis", self.0)
    }

    /// StatefulSet, Service, ConfigMap and Secret of the managed NATS.
    pub fn nats(self) -> String {
        format!("{}-nats", self.0)
    }

    /// Headless Service of the managed NATS.
    pub fn nats_headless(self) -> String {
        format!("{}-nats-headless", self.0)
    }

    /// StatefulSet, Service and Secret of the managed PostgreSQL.
    pub fn postgres(self) -> String {
        format!("{}-postgres", self.0)
    }

    /// ConfigMap for applications.
    pub fn connection(self) -> String {
        format!("{}-connection", self.0)
    }

    /// Service by which metrics are scraped.
    pub fn metrics(self) -> String {
        format!("{}-metrics", self.0)
    }

    /// Setup Job of the settings that `hash` stands for.
    pub fn setup(self, hash: &str) -> String {
        format!("{}-setup-{hash}", self.0)
    }

    /// The volume that a StatefulSet's only pod claims.
    pub fn volume(self, stateful_set: &str) -> String {
        format!("data-{stateful_set}-0")
    }
}

/// Labels by which a component's pods are selected. They can never change.
pub(super) fn selector(nest: &Nest, component: &str) -> Value {
    let mut labels = instance_selector(nest);
    labels[COMPONENT_LABEL] = component.into();
    labels
}

/// Labels by which all pods of a nest are selected.
pub(super) fn instance_selector(nest: &Nest) -> Value {
    json!({ "app.kubernetes.io/name": "birb-nest", INSTANCE_LABEL: nest.name })
}

/// Labels by which the operator's own pods are selected; the chart sets them.
pub(super) fn operator_pods() -> Value {
    json!({ "app.kubernetes.io/part-of": "birb-nest", COMPONENT_LABEL: "operator" })
}

/// Labels of an object.
pub(super) fn labels(nest: &Nest, component: &str) -> Value {
    json!({
        "app.kubernetes.io/name": "birb-nest",
        INSTANCE_LABEL: nest.name,
        COMPONENT_LABEL: component,
        "app.kubernetes.io/part-of": "birb-nest",
        MANAGED_BY_LABEL: CONTROLLER,
        UID_LABEL: nest.uid,
    })
}

/// A component's pods as a label selector in text.
pub fn selector_text(nest: &Nest, component: &str) -> String {
    format!(
        "{COMPONENT_LABEL}={component},{INSTANCE_LABEL}={},app.kubernetes.io/name=birb-nest",
        nest.name
    )
}

/// Makes an object go with its nest.
pub fn owner_reference(nest: &Nest) -> Value {
    json!({
        "apiVersion": BirbNest::api_version(&()),
        "kind": BirbNest::kind(&()),
        "name": nest.name,
        "uid": nest.uid,
        "controller": true,
        "blockOwnerDeletion": true,
    })
}
