//! What all pods of a nest share: the restricted profile, no token of the API server, nothing written to the image.

use serde_json::{Value, json};

use super::names;
use crate::resolve::Nest;

/// Annotation of a pod template that changes when what its pods read at start changes.
const INPUTS_ANNOTATION: &str = "cache.birb.party/inputs";

/// `uid` runs it and may write its volumes.
pub(super) fn template(
    nest: &Nest,
    component: &str,
    inputs: Option<&str>,
    uid: i64,
    spec: Value,
) -> Value {
    let mut template = json!({
        "metadata": { "labels": names::selector(nest, component) },
        "spec": {
            "serviceAccountName": nest.name,
            "automountServiceAccountToken": false,
            "enableServiceLinks": false,
            "securityContext": {
                "runAsNonRoot": true,
                "runAsUser": uid,
                "runAsGroup": uid,
                "fsGroup": uid,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": { "type": "RuntimeDefault" },
            },
        },
    });
    if let Some(inputs) = inputs {
        template["metadata"]["annotations"] = json!({ INPUTS_ANNOTATION: inputs });
    }
    if !nest.pull_secrets.is_empty() {
        let names: Vec<Value> = nest
            .pull_secrets
            .iter()
            .map(|name| json!({ "name": name }))
            .collect();
        template["spec"]["imagePullSecrets"] = names.into();
    }
    super::merge(&mut template["spec"], spec);
    template
}

/// What a container may do: nothing but its work.
pub(super) fn security_context() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

/// An HTTP probe.
pub(super) fn http_probe(path: &str, port: &str, period: i32, failures: i32) -> Value {
    json!({
        "httpGet": { "path": path, "port": port },
        "periodSeconds": period,
        "timeoutSeconds": 3,
        "failureThreshold": failures,
    })
}

/// A probe that runs a command in the container.
pub(super) fn exec_probe(command: &[&str], period: i32, failures: i32) -> Value {
    json!({
        "exec": { "command": command },
        "periodSeconds": period,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    })
}

/// An environment variable.
pub(super) fn env(name: &str, value: impl Into<String>) -> Value {
    json!({ "name": name, "value": value.into() })
}
