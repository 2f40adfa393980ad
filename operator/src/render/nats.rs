//! The managed NATS: one replica with JetStream on a volume.

use serde_json::json;

use super::{
    Child, Inputs, Kind, Names,
    checksum::hash,
    network::server_service,
    pod::{http_probe, security_context},
    secrets,
    stateful_set::{self, Parts},
};
use crate::resolve::{NatsServer, Nest};

/// Any user will do; the public image has none.
const UID: i64 = 1000;

pub(super) fn children(nest: &Nest, server: &NatsServer, inputs: &Inputs) -> Vec<Child> {
    let names = Names(&nest.name);
    let (name, headless) = (names.nats(), names.nats_headless());
    // Requests to warm Redis are kept in memory: they may be lost.
    let config = format!(
        "server_name: {name}-0\nport: 4222\nhttp_port: 8222\nmax_payload: 4MB\n\
         jetstream {{\n  store_dir: /data\n  max_file_store: {}\n  max_memory_store: 64MB\n  sync_interval: {}\n}}\n\
         include {}\n",
        server.max_file,
        server.sync_interval,
        secrets::AUTH,
    );
    let auth = secrets::auth(name.clone());
    let checksum = hash(&nest.uid, [config.as_bytes(), inputs.bytes(&auth)]);
    let container = json!({
        "name": "nats",
        "image": server.image,
        "args": ["-c", "/etc/nats/nats.conf"],
        "ports": [
            { "name": "nats", "containerPort": 4222, "protocol": "TCP" },
            { "name": "monitor", "containerPort": 8222, "protocol": "TCP" },
        ],
        "resources": super::json(&server.resources),
        "securityContext": security_context(),
        // A server that recovers a large log is alive before JetStream is.
        "startupProbe": http_probe("/healthz?js-server-only=true", "monitor", 2, 300),
        "readinessProbe": http_probe("/healthz?js-enabled-only=true", "monitor", 2, 3),
        "livenessProbe": http_probe("/healthz?js-server-only=true", "monitor", 10, 6),
        "volumeMounts": [
            { "name": "config", "mountPath": "/etc/nats", "readOnly": true },
            { "name": "data", "mountPath": "/data" },
        ],
    });
    let set = stateful_set::child(
        nest,
        Parts {
            name: name.clone(),
            service: headless.clone(),
            component: "nats",
            uid: UID,
            inputs: checksum,
            container,
            volumes: vec![stateful_set::config_volume(&name, &auth, "nats.conf")],
            claim: Some(&server.volume),
            grace: 60,
        },
    );
    let ports = [("nats", 4222)];
    vec![
        Child::new(
            nest,
            Kind::ConfigMap,
            name.clone(),
            "nats",
            json!({ "data": { "nats.conf": config } }),
        ),
        server_service(nest, name, "nats", &ports, false),
        server_service(nest, headless, "nats", &ports, true),
        set,
    ]
}
