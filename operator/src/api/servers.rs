//! Redis, NATS and PostgreSQL: each is managed by the operator or external, and managed if nothing is said.

use k8s_openapi::api::core::v1::ResourceRequirements;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// A size in bytes as Kubernetes writes it, without fractions: `512Mi`, `8Gi`.
const SIZE: &str = r"^[1-9][0-9]{0,8}(Mi|Gi|Ti|M|G|T)$";
// What the rules below say of an absent size is also said by `resolve`; cases.yaml holds the two together.

/// An image reference.
const IMAGE: &str = r"^[a-zA-Z0-9][a-zA-Z0-9._/:@-]*$";

/// One key of a Secret in the nest's namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in it.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// Redis. It holds nothing that cannot be rebuilt, so a managed one has no volume.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.managed) && has(self.external))")
    .message("redis: set managed or external, not both"))]
pub struct RedisSpec {
    /// One run by the operator; also what an absent `redis` means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedRedis>,
    /// One that is there already. birb-nest owns the whole database (number) and empties it when it cannot trust it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalRedis>,
}

/// A Redis of one replica, without persistence.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManagedRedis {
    /// Its image. Default: the operator's `--redis-image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = IMAGE))]
    pub image: Option<String>,
    /// Memory of the container; three quarters of it hold entries. Default 512Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SIZE))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('64Mi')) >= 0")
        .message("redis.managed.memory must be at least 64Mi"))]
    pub memory: Option<String>,
    /// Processor time, and whatever else it may use; `memory` above wins over a memory given here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

/// A Redis that is there already.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalRedis {
    /// Its address, `redis://user:password@host:port/db`, or `rediss://` for TLS.
    pub url_secret_ref: SecretKey,
    /// Require TLS and verify the server's certificate and name; the address must begin with `rediss://`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ServerTls>,
}

/// TLS to a server.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerTls {
    /// The authority that signed the server's certificate, PEM. Default: public authorities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret_ref: Option<SecretKey>,
}

/// NATS JetStream, the log.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.managed) && has(self.external))")
    .message("nats: set managed or external, not both"))]
#[x_kube(validation = Rule::new("has(self.external) || has(oldSelf.external) || (has(self.managed) && has(self.managed.storage) ? self.managed.storage : '8Gi') == (has(oldSelf.managed) && has(oldSelf.managed.storage) ? oldSelf.managed.storage : '8Gi')")
    .message("nats.managed.storage cannot be changed"))]
#[x_kube(validation = Rule::new("has(self.external) || has(oldSelf.external) || (has(self.managed) && has(self.managed.storageClassName) ? self.managed.storageClassName : '') == (has(oldSelf.managed) && has(oldSelf.managed.storageClassName) ? oldSelf.managed.storageClassName : '')")
    .message("nats.managed.storageClassName cannot be changed"))]
pub struct NatsSpec {
    /// Streams over which the log is spread, 1 to 64; also the most workers that have something to do. Cannot be
    /// changed later.
    #[serde(default = "NatsSpec::default_shards")]
    #[schemars(range(min = 1, max = 64))]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("nats.shards cannot be changed: keys are bound to their shard"))]
    pub shards: i32,
    /// One run by the operator; also what an absent `managed` and `external` mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedNats>,
    /// One that is there already, 2.12.5 or newer with JetStream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalNats>,
}

impl NatsSpec {
    fn default_shards() -> i32 {
        8
    }
}

impl Default for NatsSpec {
    fn default() -> Self {
        Self {
            shards: Self::default_shards(),
            managed: None,
            external: None,
        }
    }
}

/// A NATS server of one replica with a volume.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManagedNats {
    /// Its image. Default: the operator's `--nats-image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = IMAGE))]
    pub image: Option<String>,
    /// Size of its volume; most of it is reserved for the log, in equal parts for the shards. Default 8Gi. Cannot be
    /// changed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SIZE))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('1Gi')) >= 0")
        .message("nats.managed.storage must be at least 1Gi"))]
    pub storage: Option<String>,
    /// Storage class of its volume. Default: the cluster's. Cannot be changed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
    /// When writes reach the disk: `always` before they are acknowledged (default), or after a time like `10s`, which is
    /// several times faster and loses up to that much when the machine (not the process) dies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), regex(pattern = r"^(always|[1-9][0-9]{0,3}(s|m))$"))]
    pub sync_interval: Option<String>,
    /// What it may use. Default: requests 200m and 512Mi, limit 1Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

/// A NATS that is there already.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.credentialsSecretRef) && has(self.passwordSecretRef))")
    .message("nats.external: set credentialsSecretRef or passwordSecretRef, not both"))]
#[x_kube(validation = Rule::new("has(self.user) == has(self.passwordSecretRef)")
    .message("nats.external: user and passwordSecretRef belong together"))]
pub struct ExternalNats {
    /// Its address, `nats://host:port`, without credentials; several are separated by commas.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(validation = Rule::new("!self.contains('@')")
        .message("nats.external.url must not hold credentials: use credentialsSecretRef or user and passwordSecretRef"))]
    #[x_kube(validation = Rule::new("self.matches('^ *(nats|tls)://[^,]+(, *(nats|tls)://[^,]+)*$')")
        .message("each address of nats.external.url must begin with nats:// or tls://"))]
    pub url: String,
    /// A credentials file (JWT and seed).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret_ref: Option<SecretKey>,
    /// User name, with `passwordSecretRef`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub user: Option<String>,
    /// Password of `user`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_secret_ref: Option<SecretKey>,
    /// Require TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ServerTls>,
    /// Replicas of each stream: 1, 3 or 5, as many JetStream servers as there must be. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self in [1, 3, 5]").message("nats.external.streamReplicas must be 1, 3 or 5"))]
    pub stream_replicas: Option<i32>,
    /// Most bytes of each shard's stream, reserved in the server. Default 512Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SIZE))]
    pub stream_size: Option<String>,
    /// What its streams (`BIRB_<prefix>_0` and so on) and subjects (`birb_<prefix>.`) are called; nests that share an
    /// account need different ones. Default: `<namespace>_<name>`. Another prefix is another, empty log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_-]{1,128}$"))]
    pub prefix: Option<String>,
}

/// PostgreSQL.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.managed) && has(self.external))")
    .message("postgres: set managed or external, not both"))]
#[x_kube(validation = Rule::new("has(self.external) || has(oldSelf.external) || (has(self.managed) && has(self.managed.storage) ? self.managed.storage : '10Gi') == (has(oldSelf.managed) && has(oldSelf.managed.storage) ? oldSelf.managed.storage : '10Gi')")
    .message("postgres.managed.storage cannot be changed"))]
#[x_kube(validation = Rule::new("has(self.external) || has(oldSelf.external) || (has(self.managed) && has(self.managed.storageClassName) ? self.managed.storageClassName : '') == (has(oldSelf.managed) && has(oldSelf.managed.storageClassName) ? oldSelf.managed.storageClassName : '')")
    .message("postgres.managed.storageClassName cannot be changed"))]
pub struct PostgresSpec {
    /// One run by the operator; also what an absent `postgres` means.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedPostgres>,
    /// One that is there already, 15 or newer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalPostgres>,
}

/// A PostgreSQL of one replica with a volume.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ManagedPostgres {
    /// Its image, of the major version whose data the volume holds. Default: the operator's `--postgres-image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = IMAGE))]
    pub image: Option<String>,
    /// Size of its volume. Default 10Gi. Cannot be changed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SIZE))]
    #[x_kube(validation = Rule::new("quantity(self).compareTo(quantity('1Gi')) >= 0")
        .message("postgres.managed.storage must be at least 1Gi"))]
    pub storage: Option<String>,
    /// Storage class of its volume. Default: the cluster's. Cannot be changed later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
    /// What it may use. Default: requests 200m and 512Mi, limit 1Gi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

/// A PostgreSQL that is there already.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ExternalPostgres {
    /// Its address, `postgres://user:password@host:port/database`. Workers hold advisory locks: a direct connection or a
    /// session-pooling proxy. The role needs CREATE on the database.
    pub url_secret_ref: SecretKey,
    /// Require TLS and verify the server's certificate and name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<ServerTls>,
}
