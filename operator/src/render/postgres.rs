//! The managed PostgreSQL: one replica on a volume.

use serde_json::json;

use super::{
    Child, Names,
    network::server_service,
    pod::{env, exec_probe, security_context},
    secrets,
    stateful_set::{self, Parts},
};
use crate::resolve::{Nest, PostgresServer};

/// Database of the nest.
pub(super) const DATABASE: &str = "birb_nest";
/// User of the public image.
const UID: i64 = 999;

pub(super) fn children(nest: &Nest, server: &PostgresServer) -> Vec<Child> {
    let name = Names(&nest.name).postgres();
    let password = secrets::password(name.clone());
    // By TCP: while the image makes a new database, a temporary server listens on the socket alone.
    let ready = [
        "pg_isready",
        "-h",
        "127.0.0.1",
        "-U",
        secrets::USER,
        "-d",
        DATABASE,
    ];
    let container = json!({
        "name": "postgres",
        "image": server.image,
        // Workers hold one session per shard, API processes a few each.
        "args": ["postgres", "-c", "max_connections=300"],
        "env": [
            env("POSTGRES_USER", secrets::USER),
            env("POSTGRES_DB", DATABASE),
            env("POSTGRES_PASSWORD_FILE", "/etc/postgres/password"),
            env("POSTGRES_INITDB_ARGS", "--data-checksums"),
            // A fresh volume may hold a lost+found beside it.
            env("PGDATA", "/var/lib/postgresql/data/pgdata"),
        ],
        "ports": [{ "name": "postgres", "containerPort": 5432, "protocol": "TCP" }],
        "resources": super::json(&server.resources),
        "securityContext": security_context(),
        // Making a database, or recovering after a crash, takes its time.
        "startupProbe": exec_probe(&ready, 1, 900),
        "readinessProbe": exec_probe(&ready, 5, 3),
        "livenessProbe": exec_probe(&ready, 10, 6),
        "volumeMounts": [
            { "name": "password", "mountPath": "/etc/postgres", "readOnly": true },
            { "name": "data", "mountPath": "/var/lib/postgresql/data" },
            { "name": "run", "mountPath": "/var/run/postgresql" },
            { "name": "tmp", "mountPath": "/tmp" },
        ],
    });
    let set = stateful_set::child(
        nest,
        Parts {
            name: name.clone(),
            service: name.clone(),
            component: "postgres",
            uid: UID,
            // The password is read once, when the database is made.
            inputs: String::new(),
            container,
            volumes: vec![
                json!({ "name": "password", "secret": {
                    "secretName": password.name,
                    "defaultMode": 0o440,
                    "items": [{ "key": password.key, "path": "password" }],
                } }),
                json!({ "name": "run", "emptyDir": {} }),
                json!({ "name": "tmp", "emptyDir": {} }),
            ],
            claim: Some(&server.volume),
            grace: 60,
        },
    );
    vec![
        server_service(nest, name, "postgres", &[("postgres", 5432)], false),
        set,
    ]
}
