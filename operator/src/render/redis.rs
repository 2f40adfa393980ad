//! The managed Redis: one replica, nothing on disk. Whoever finds it empty fills it again.

use serde_json::json;

use super::{
    Child, Inputs, Kind, Names,
    checksum::hash,
    network::server_service,
    pod::{exec_probe, security_context},
    secrets,
    stateful_set::{self, Parts},
};
use crate::resolve::{Nest, RedisServer};

/// User of the public image.
const UID: i64 = 999;

pub(super) fn children(nest: &Nest, server: &RedisServer, inputs: &Inputs) -> Vec<Child> {
    let name = Names(&nest.name).redis();
    let config = format!(
        "include /etc/redis/{}\nbind * -::*\nprotected-mode no\nsave \"\"\nappendonly no\ndir /tmp\n\
         maxmemory {}\nmaxmemory-policy allkeys-lfu\n",
        secrets::AUTH,
        server.max_memory
    );
    let auth = secrets::auth(name.clone());
    let checksum = hash(&nest.uid, [config.as_bytes(), inputs.bytes(&auth)]);
    // The password goes by the environment of redis-cli, where no list of processes shows it.
    let ping = exec_probe(
        &[
            "sh",
            "-c",
            "REDISCLI_AUTH=$(sed -n 's/^requirepass //p' /etc/redis/auth.conf) redis-cli ping | grep -q PONG",
        ],
        2,
        3,
    );
    let container = json!({
        "name": "redis",
        "image": server.image,
        "args": ["redis-server", "/etc/redis/redis.conf"],
        "ports": [{ "name": "redis", "containerPort": 6379, "protocol": "TCP" }],
        "resources": super::json(&server.resources),
        "securityContext": security_context(),
        "readinessProbe": ping,
        "livenessProbe": { "tcpSocket": { "port": "redis" }, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3 },
        "volumeMounts": [
            { "name": "config", "mountPath": "/etc/redis", "readOnly": true },
            { "name": "tmp", "mountPath": "/tmp" },
        ],
    });
    let set = stateful_set::child(
        nest,
        Parts {
            name: name.clone(),
            service: name.clone(),
            component: "redis",
            uid: UID,
            inputs: checksum,
            container,
            volumes: vec![
                stateful_set::config_volume(&name, &auth, "redis.conf"),
                json!({ "name": "tmp", "emptyDir": {} }),
            ],
            claim: None,
            grace: 10,
        },
    );
    vec![
        Child::new(
            nest,
            Kind::ConfigMap,
            name.clone(),
            "redis",
            json!({ "data": { "redis.conf": config } }),
        ),
        server_service(nest, name, "redis", &[("redis", 6379)], false),
        set,
    ]
}
