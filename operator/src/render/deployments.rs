//! API and workers.

use serde_json::{Value, json};

use super::{
    Child, Inputs, Kind, Names,
    data_plane::{Settings, logging},
    names,
    pod::{env, http_probe},
};
use crate::resolve::{Nest, RESTART_ANNOTATION};

/// Seconds a pod has to end: an API goes on for [`SHUTDOWN_DELAY`] and then finishes what is under way, which takes it and
/// a worker up to 20 s.
const GRACE: i32 = 30;
/// How long an API takes requests after it was told to end: until every node has heard that its endpoint is gone.
const SHUTDOWN_DELAY: &str = "5s";

/// Where the keys of the API's clients are mounted.
const KEYS_DIR: &str = "/etc/birb-nest/keys";

/// The API, of which there are `replicas` if the operator's main manager is to say it.
pub fn api(nest: &Nest, inputs: &Inputs, replicas: Option<i32>) -> Child {
    let mut own = vec![
        env("API_ADMIN_PORT", "9090"),
        env("API_SHUTDOWN_DELAY", SHUTDOWN_DELAY),
    ];
    if let Some(ttl) = &nest.cache.max_ttl {
        own.push(env("API_MAX_TTL", ttl));
    }
    if let Some(bytes) = nest.cache.max_value_bytes {
        own.push(env("API_MAX_VALUE_BYTES", bytes.to_string()));
    }
    if let Some(limit) = &nest.rate_limit {
        own.push(env("API_RATE_LIMIT_REQUESTS", limit.requests.to_string()));
        if let Some(duration) = &limit.duration {
            own.push(env("API_RATE_LIMIT_DURATION", duration));
        }
    }
    let (mut mounts, mut volumes) = (Vec::new(), Vec::new());
    if let Some(keys) = &nest.api_keys {
        own.push(env("API_KEYS_FILE", format!("{KEYS_DIR}/keys")));
        mounts.push(json!({ "name": "keys", "mountPath": KEYS_DIR, "readOnly": true }));
        // Not among what is read at start: the API notices by itself when the file changes.
        volumes.push(json!({ "name": "keys", "secret": {
            "secretName": keys.name,
            "defaultMode": 0o440,
            "items": [{ "key": keys.key, "path": "keys" }],
        } }));
    }
    let container = json!({
        "name": "api",
        "args": ["api"],
        // Its last words, for the condition that says why it does not start.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": with_common(nest, own),
        "ports": [
            { "name": "http", "containerPort": 8080, "protocol": "TCP" },
            { "name": "admin", "containerPort": 9090, "protocol": "TCP" },
        ],
        "resources": super::json(&nest.api_resources),
        // Ready for the first time when it can do all of its work; from then on it keeps its traffic while it lives: with
        // NATS down /readyz is 503, but hits are still served and everything else gets a clean 503 with Retry-After.
        "startupProbe": http_probe("/readyz", "admin", 1, 600),
        "readinessProbe": http_probe("/livez", "admin", 5, 2),
        "livenessProbe": http_probe("/livez", "admin", 10, 3),
        "volumeMounts": mounts,
    });
    deployment(
        nest,
        Names(&nest.name).api(),
        "api",
        inputs,
        container,
        volumes,
        replicas,
    )
}

/// The workers, of which there are `replicas` if the operator's main manager is to say it.
pub fn worker(nest: &Nest, inputs: &Inputs, replicas: Option<i32>) -> Child {
    let mut own = Vec::new();
    if let Some(size) = nest.batch.size {
        own.push(env("WORKER_BATCH_SIZE", size.to_string()));
    }
    if let Some(linger) = &nest.batch.linger {
        own.push(env("WORKER_BATCH_TIMEOUT", linger));
    }
    let container = json!({
        "name": "worker",
        "args": ["worker"],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "env": with_common(nest, own),
        "ports": [{ "name": "admin", "containerPort": 9091, "protocol": "TCP" }],
        "resources": super::json(&nest.worker_resources),
        "readinessProbe": http_probe("/readyz", "admin", 2, 2),
        "livenessProbe": http_probe("/livez", "admin", 10, 3),
    });
    deployment(
        nest,
        Names(&nest.name).worker(),
        "worker",
        inputs,
        container,
        Vec::new(),
        replicas,
    )
}

/// Nothing but the number of pods of the Deployment called `name`. Another manager says it before the main one stops saying
/// it, since a field that its last manager drops falls back to its default, which is 1.
pub fn replicas_of(nest: &Nest, name: String, replicas: i32) -> Child {
    let resource = Kind::Deployment.api_resource();
    let object = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": { "name": name, "namespace": nest.namespace },
        "spec": { "replicas": replicas },
    });
    Child {
        kind: Kind::Deployment,
        name,
        object,
    }
}

fn with_common(nest: &Nest, mut own: Vec<Value>) -> Vec<Value> {
    own.extend(logging(nest));
    if let Some(ttl) = &nest.cache.default_ttl {
        own.push(env("REDIS_DEFAULT_TTL", ttl));
    }
    own
}

fn deployment(
    nest: &Nest,
    name: String,
    component: &str,
    inputs: &Inputs,
    container: Value,
    volumes: Vec<Value>,
    replicas: Option<i32>,
) -> Child {
    // Over zones and nodes as well as it goes: a pod that cannot be spread is better than none.
    let spread = ["topology.kubernetes.io/zone", "kubernetes.io/hostname"].map(|key| {
        json!({
            "topologyKey": key,
            "maxSkew": 1,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": { "matchLabels": names::selector(nest, component) },
            // Pods that are being replaced do not count.
            "matchLabelKeys": ["pod-template-hash"],
        })
    });
    let rest = json!({
        "terminationGracePeriodSeconds": GRACE,
        "topologySpreadConstraints": spread,
        "volumes": volumes,
    });
    let mut template = Settings::new(nest).pod(nest, component, inputs, container, rest);
    if let Some(restart) = &nest.restart {
        template["metadata"]["annotations"][RESTART_ANNOTATION] = restart.as_str().into();
    }
    let mut spec = json!({
        "selector": { "matchLabels": names::selector(nest, component) },
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 },
        },
        "template": template,
    });
    if let Some(replicas) = replicas {
        spec["replicas"] = replicas.into();
    }
    Child::new(
        nest,
        Kind::Deployment,
        name,
        component,
        json!({ "spec": spec }),
    )
}
