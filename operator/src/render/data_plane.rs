//! What the three roles of the data plane share: its image, its settings, and the Secrets mounted as files.
//!
//! The contract is docs/CONFIGURATION.md; the names of the variables are the data plane's.

use serde_json::{Value, json};

use super::{
    checksum::{Inputs, hash},
    names::Names,
    pod::{self, env},
    secrets,
};
use crate::{
    api::{ExternalNats, LogFormat, SecretKey, ServerTls},
    quantity,
    resolve::{Nest, Server},
};

/// The image's own user.
const UID: i64 = 65532;
/// Where Secrets are mounted.
const SECRETS_DIR: &str = "/etc/birb-nest/secrets";

/// A key of a Secret, the file it becomes, and the variable that names the file.
struct SecretFile {
    key: SecretKey,
    variable: &'static str,
    path: &'static str,
}

/// Settings of the servers, for every role.
pub(super) struct Settings {
    env: Vec<Value>,
    files: Vec<SecretFile>,
}

impl Settings {
    /// Of `nest`.
    pub(super) fn new(nest: &Nest) -> Self {
        let names = Names(&nest.name);
        let mut settings = Self {
            env: vec![env("NATS_SHARDS", nest.shards.to_string())],
            files: Vec::new(),
        };
        match &nest.redis {
            Server::Managed(_) => {
                settings.env.push(env("REDIS_HOST", names.redis()));
                settings.file(
                    secrets::password(names.redis()),
                    "REDIS_PASSWORD_FILE",
                    "redis/password",
                );
            }
            Server::External(external) => {
                settings.file(
                    external.url_secret_ref.clone(),
                    "REDIS_URL_FILE",
                    "redis/url",
                );
                if let Some(tls) = &external.tls {
                    settings.env.push(env("REDIS_TLS", "true"));
                    settings.authority(tls, "REDIS_CA_FILE", "redis/ca.crt");
                }
            }
        }
        match &nest.nats {
            Server::Managed(server) => {
                settings.env.extend([
                    env("NATS_URL", format!("nats://{}:4222", names.nats())),
                    env("NATS_USER", secrets::USER),
                    env("NATS_STREAM_MAX_BYTES", server.stream_bytes.to_string()),
                ]);
                settings.file(
                    secrets::password(names.nats()),
                    "NATS_PASSWORD_FILE",
                    "nats/password",
                );
            }
            Server::External(external) => settings.external_nats(nest, external),
        }
        match &nest.postgres {
            Server::Managed(_) => {
                settings.env.extend([
                    env("POSTGRES_HOST", names.postgres()),
                    env("POSTGRES_USER", secrets::USER),
                    env("POSTGRES_DB", super::postgres::DATABASE),
                ]);
                settings.file(
                    secrets::password(names.postgres()),
                    "POSTGRES_PASSWORD_FILE",
                    "postgres/password",
                );
            }
            Server::External(external) => {
                settings.file(
                    external.url_secret_ref.clone(),
                    "POSTGRES_URL_FILE",
                    "postgres/url",
                );
                if let Some(tls) = &external.tls {
                    settings.env.push(env("POSTGRES_SSLMODE", "verify-full"));
                    settings.authority(tls, "POSTGRES_CA_FILE", "postgres/ca.crt");
                }
            }
        }
        settings
    }

    fn external_nats(&mut self, nest: &Nest, external: &ExternalNats) {
        // Nests that share an account must not share streams. Neither part can hold a `_`.
        let prefix = external
            .prefix
            .clone()
            .unwrap_or_else(|| format!("{}_{}", nest.namespace, nest.name));
        self.env.extend([
            env("NATS_URL", &external.url),
            env("NATS_STREAM_NAME", format!("BIRB_{prefix}")),
            env("NATS_SUBJECT_PREFIX", format!("birb_{prefix}")),
            env("NATS_DLQ_STREAM_NAME", format!("BIRB_{prefix}_DLQ")),
            env(
                "NATS_REHYDRATE_STREAM_NAME",
                format!("BIRB_{prefix}_REHYDRATE"),
            ),
        ]);
        if let Some(replicas) = external.stream_replicas {
            self.env.push(env("NATS_REPLICAS", replicas.to_string()));
        }
        if let Some(size) = &external.stream_size {
            self.env.push(env(
                "NATS_STREAM_MAX_BYTES",
                quantity::bytes(size).to_string(),
            ));
        }
        if let Some(user) = &external.user {
            self.env.push(env("NATS_USER", user));
        }
        if let Some(password) = &external.password_secret_ref {
            self.file(password.clone(), "NATS_PASSWORD_FILE", "nats/password");
        }
        if let Some(credentials) = &external.credentials_secret_ref {
            self.file(credentials.clone(), "NATS_CREDS_FILE", "nats/user.creds");
        }
        if let Some(tls) = &external.tls {
            self.env.push(env("NATS_TLS", "true"));
            self.authority(tls, "NATS_CA_FILE", "nats/ca.crt");
        }
    }

    fn authority(&mut self, tls: &ServerTls, variable: &'static str, path: &'static str) {
        if let Some(ca) = &tls.ca_secret_ref {
            self.file(ca.clone(), variable, path);
        }
    }

    fn file(&mut self, key: SecretKey, variable: &'static str, path: &'static str) {
        self.env
            .push(env(variable, format!("{SECRETS_DIR}/{path}")));
        self.files.push(SecretFile {
            key,
            variable,
            path,
        });
    }

    /// Value of a variable.
    pub(super) fn value(&self, variable: &str) -> Option<&str> {
        let found = self.env.iter().find(|env| env["name"] == variable)?;
        found["value"].as_str()
    }

    /// What the file holds that a variable names.
    pub(super) fn secret<'a>(&self, variable: &str, inputs: &'a Inputs) -> Option<&'a [u8]> {
        let file = self.files.iter().find(|file| file.variable == variable)?;
        Some(inputs.bytes(&file.key))
    }

    /// Keys of Secrets that are read at start.
    pub(super) fn secret_keys(&self) -> impl Iterator<Item = &SecretKey> {
        self.files.iter().map(|file| &file.key)
    }

    /// Changes when what the Secrets hold changes.
    pub(super) fn checksum(&self, nest: &Nest, inputs: &Inputs) -> String {
        let parts = self
            .files
            .iter()
            .flat_map(|file| [file.variable.as_bytes(), inputs.bytes(&file.key)]);
        hash(&nest.uid, parts)
    }

    /// Changes when the servers, or what is told to them, changes: settings and Secrets.
    pub(super) fn fingerprint(&self, nest: &Nest, inputs: &Inputs) -> String {
        let settings = Value::from(self.env.clone()).to_string();
        let secrets = self.checksum(nest, inputs);
        let parts = [
            nest.image.as_bytes(),
            settings.as_bytes(),
            secrets.as_bytes(),
        ];
        hash(&nest.uid, parts.into_iter().chain(inputs.volumes()))
    }

    /// A pod that runs `container`, which has these settings, and `rest`, which has their Secrets, in addition to their own.
    pub(super) fn pod(
        &self,
        nest: &Nest,
        component: &str,
        inputs: &Inputs,
        mut container: Value,
        mut rest: Value,
    ) -> Value {
        let env = with_own(self.env.clone(), &mut container["env"]);
        let mount = json!({ "name": "secrets", "mountPath": SECRETS_DIR, "readOnly": true });
        let mounts = with_own(vec![mount], &mut container["volumeMounts"]);
        super::merge(
            &mut container,
            json!({
                "image": nest.image,
                "env": env,
                "securityContext": pod::security_context(),
                "volumeMounts": mounts,
            }),
        );
        if let Some(policy) = nest.pull_policy {
            container["imagePullPolicy"] = policy.as_str().into();
        }
        let sources: Vec<Value> = self
            .files
            .iter()
            .map(|file| {
                json!({ "secret": {
                    "name": file.key.name,
                    "items": [{ "key": file.key.key, "path": file.path }],
                } })
            })
            .collect();
        let secrets =
            json!({ "name": "secrets", "projected": { "defaultMode": 0o440, "sources": sources } });
        rest["volumes"] = with_own(vec![secrets], &mut rest["volumes"]).into();
        let mut spec = json!({ "containers": [container] });
        super::merge(&mut spec, rest);
        pod::template(
            nest,
            component,
            Some(&self.checksum(nest, inputs)),
            UID,
            spec,
        )
    }
}

fn with_own(mut shared: Vec<Value>, own: &mut Value) -> Vec<Value> {
    shared.extend(own.as_array_mut().map(std::mem::take).unwrap_or_default());
    shared
}

/// Settings of the log lines.
pub(super) fn logging(nest: &Nest) -> [Value; 2] {
    let format = match nest.log_format {
        LogFormat::Json => "json",
        LogFormat::Text => "text",
    };
    [env("LOG_LEVEL", &nest.log_level), env("LOG_FORMAT", format)]
}

/// Keys of Secrets in the nest's namespace that its pods read, generated ones included.
pub fn secret_keys(nest: &Nest) -> Vec<SecretKey> {
    let names = Names(&nest.name);
    let mut keys: Vec<SecretKey> = Settings::new(nest).secret_keys().cloned().collect();
    if nest.redis.managed().is_some() {
        keys.push(secrets::auth(names.redis()));
    }
    if nest.nats.managed().is_some() {
        keys.push(secrets::auth(names.nats()));
    }
    keys.extend(nest.api_keys.clone());
    keys
}
