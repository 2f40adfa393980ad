//! What managed servers share: one pod, started by a StatefulSet, so that no two of them ever have the same volume.

use serde_json::{Value, json};

use super::{Child, Kind, names, pod};
use crate::{
    api::SecretKey,
    resolve::{Nest, Volume},
};

/// What makes one server differ from another.
pub(super) struct Parts<'a> {
    pub(super) name: String,
    /// The Service that governs its name in DNS.
    pub(super) service: String,
    pub(super) component: &'a str,
    pub(super) uid: i64,
    /// Changes when what it reads at start changes; empty for nothing.
    pub(super) inputs: String,
    pub(super) container: Value,
    pub(super) volumes: Vec<Value>,
    /// The volume called `data`, which outlives its pod.
    pub(super) claim: Option<&'a Volume>,
    /// Seconds it has to end.
    pub(super) grace: i32,
}

pub(super) fn child(nest: &Nest, parts: Parts<'_>) -> Child {
    let mut container = parts.container;
    // What a server that ends says last is what the nest's conditions say of it.
    container["terminationMessagePolicy"] = "FallbackToLogsOnError".into();
    let rest = json!({
        "containers": [container],
        "volumes": parts.volumes,
        "terminationGracePeriodSeconds": parts.grace,
    });
    let inputs = Some(parts.inputs.as_str()).filter(|inputs| !inputs.is_empty());
    let mut spec = json!({
        "replicas": 1,
        "serviceName": parts.service,
        // One at a time would wait for a pod that can never become ready before it takes a mended template.
        "podManagementPolicy": "Parallel",
        "selector": { "matchLabels": names::selector(nest, parts.component) },
        "template": pod::template(nest, parts.component, inputs, parts.uid, rest),
    });
    if let Some(volume) = parts.claim {
        let mut claim = json!({
            "accessModes": ["ReadWriteOnce"],
            "resources": { "requests": { "storage": volume.size } },
        });
        if let Some(class) = &volume.class {
            claim["storageClassName"] = class.as_str().into();
        }
        spec["volumeClaimTemplates"] = json!([{
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": { "name": "data", "labels": names::selector(nest, parts.component) },
            "spec": claim,
        }]);
        spec["persistentVolumeClaimRetentionPolicy"] = json!({
            "whenDeleted": nest.deletion_policy.when_deleted(),
            "whenScaled": "Retain",
        });
    }
    Child::new(
        nest,
        Kind::StatefulSet,
        parts.name,
        parts.component,
        json!({ "spec": spec }),
    )
}

/// A server's configuration: `file` of the ConfigMap called `name`, and beside it the part that holds the password.
pub(super) fn config_volume(name: &str, auth: &SecretKey, file: &str) -> Value {
    json!({ "name": "config", "projected": { "defaultMode": 0o440, "sources": [
        { "configMap": { "name": name, "items": [{ "key": file, "path": file }] } },
        { "secret": { "name": auth.name, "items": [{ "key": auth.key, "path": auth.key }] } },
    ] } })
}
