//! The spec, less the three servers.

use k8s_openapi::api::core::v1::ResourceRequirements;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    observability::ObservabilitySpec,
    rest::{ApiSpec, pod_template},
    servers::{NatsSpec, PostgresSpec, RedisSpec},
    status::BirbNestStatus,
};

/// A Go-style duration without fractions: `250ms`, `10s`, `1h30m`.
pub(super) const DURATION: &str = r"^([1-9][0-9]{0,8}(ms|s|m|h)){1,4}$";

/// What a nest should be. `spec: {}` is a whole one: two API replicas, one to five workers, and Redis, NATS and
/// PostgreSQL of its own.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[kube(
    group = "cache.birb.party",
    version = "v1alpha1",
    kind = "BirbNest",
    plural = "birbnests",
    shortname = "bn",
    category = "all",
    namespaced,
    cel,
    derive = "PartialEq",
    status = "BirbNestStatus",
    doc = "A persistent cache: a REST endpoint whose writes are logged by NATS JetStream, served by Redis and stored in PostgreSQL.",
    scale(
        spec_replicas_path = ".spec.worker.scaling.replicas",
        status_replicas_path = ".status.worker.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name must begin with a letter and consist of a-z, 0-9 and '-': it names Services"),
    validation = Rule::new("size(self.metadata.name) <= 40")
        .message("metadata.name may have at most 40 characters: it is the beginning of longer names"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type=='Ready')].reason"),
    printcolumn(name = "API", type_ = "string", json_path = ".status.api.summary", description = "Ready/desired API replicas"),
    printcolumn(name = "Workers", type_ = "string", json_path = ".status.worker.summary", description = "Ready/desired workers"),
    printcolumn(name = "Lag", type_ = "integer", json_path = ".status.worker.lag", description = "Messages that are not stored yet, about"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version", priority = 1),
    printcolumn(name = "Migration", type_ = "string", json_path = ".status.migration.state", priority = 1),
    printcolumn(name = "Paused", type_ = "boolean", json_path = ".spec.paused", priority = 1),
    printcolumn(name = "Endpoint", type_ = "string", json_path = ".status.endpoint", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct BirbNestSpec {
    /// Release of the data plane, which is the tag of its image. Unset: the operator's own release, so the nest moves
    /// when the operator is upgraded: one nest at a time, the next when the one before is ready. Set: it stays there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"))]
    pub version: Option<String>,
    /// Where the data plane's image comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageSpec>,
    /// Observe and report, change nothing.
    #[serde(default)]
    pub paused: bool,
    /// Put the nest to sleep: no API, then, once all that is in the log is stored, no workers. Its servers stay.
    #[serde(default)]
    pub suspend: bool,
    /// What happens to the volumes and generated Secrets of managed servers when the nest is deleted. External servers
    /// are never cleaned up.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
    /// The REST API.
    #[serde(default)]
    pub api: ApiSpec,
    /// The workers, which store the log in PostgreSQL.
    #[serde(default)]
    pub worker: WorkerSpec,
    /// Limits of what is cached, and for how long.
    #[serde(default)]
    pub cache: CacheSpec,
    /// Redis, which answers most reads.
    #[serde(default)]
    pub redis: RedisSpec,
    /// NATS JetStream, the log of all writes.
    #[serde(default)]
    pub nats: NatsSpec,
    /// PostgreSQL, where every entry ends up.
    #[serde(default)]
    pub postgres: PostgresSpec,
    /// Logs, metrics and alerts.
    #[serde(default)]
    pub observability: ObservabilitySpec,
    /// Who may talk to the managed servers.
    #[serde(default)]
    pub network_policy: NetworkPolicySpec,
}

/// Where an image comes from; `spec.version` says which release.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageSpec {
    /// Registry and repository, without a tag. Default: the operator's `--data-plane-image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 255), regex(pattern = r"^[a-zA-Z0-9][a-zA-Z0-9._/:-]*$"))]
    pub repository: Option<String>,
    /// A tag, where it is not called like the release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"))]
    pub tag: Option<String>,
    /// When kubelets pull it. Default: Kubernetes' own (`IfNotPresent`, but `Always` for `latest`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_policy: Option<PullPolicy>,
    /// Names of Secrets to pull with, also for the images of managed servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8), inner(length(min = 1, max = 253)))]
    pub pull_secrets: Vec<String>,
}

/// When kubelets pull the image. Default: Kubernetes' own (`IfNotPresent`, but `Always` for the tag `latest`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum PullPolicy {
    /// At every start.
    Always,
    /// When the node does not have it.
    IfNotPresent,
    /// Never; it must be there.
    Never,
}

impl PullPolicy {
    /// As a Container's `imagePullPolicy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// What stays when the nest is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum DeletionPolicy {
    /// Volumes and generated Secrets go with the nest.
    #[default]
    Delete,
    /// Volumes and generated Secrets stay; a nest of the same name takes them up again.
    Retain,
}

/// The workers.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerSpec {
    /// How many.
    #[serde(default)]
    pub scaling: ScalingSpec,
    /// What is stored in one transaction.
    #[serde(default)]
    pub batch: BatchSpec,
    /// What each may use. Default: requests 100m and 256Mi, limit 512Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// As `api.podTemplate`, for the container `worker`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "pod_template")]
    pub pod_template: Option<Value>,
}

/// How many workers there are, and who decides it.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas")
    .message("worker.scaling.minReplicas must not be more than maxReplicas"))]
pub struct ScalingSpec {
    /// Who decides. Default Lag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<ScalingMode>,
    /// How many in mode Fixed; `kubectl scale birbnest` sets it. Other modes ignore it. A worker owns at least one shard,
    /// so more workers than `nats.shards` have nothing to do. Workers also warm Redis, reap rows and retry dead letters: 0
    /// stops all of that.
    #[serde(default = "ScalingSpec::default_replicas")]
    #[schemars(range(min = 0, max = 64))]
    pub replicas: i32,
    /// Fewest in mode Lag.
    #[serde(default = "ScalingSpec::default_min_replicas")]
    #[schemars(range(min = 0, max = 64))]
    #[x_kube(validation = Rule::new("self != 0")
        .message("worker.scaling.minReplicas cannot be 0 yet: workers also warm Redis, reap rows and retry dead letters, and nothing would wake them for that"))]
    pub min_replicas: i32,
    /// Most in mode Lag. `nats.shards` is a limit too.
    #[serde(default = "ScalingSpec::default_max_replicas")]
    #[schemars(range(min = 1, max = 64))]
    pub max_replicas: i32,
    /// Mode Lag: messages not stored yet for which one worker is enough. Lower: more workers, sooner. Default 5000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000000))]
    pub target_lag: Option<i32>,
    /// Mode Lag: seconds in which what waits should be stored, at the rate that the workers were seen to have. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86400))]
    pub drain_seconds: Option<i32>,
    /// Mode Lag: up to so many messages not stored yet, `minReplicas` are enough. Default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000000000))]
    pub activation_lag: Option<i32>,
    /// Mode Lag: how often the lag is read, 1s to 999s. Default 10s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[1-9][0-9]{0,2}s$"))]
    pub poll_interval: Option<String>,
    /// Mode Lag: workers go down only to the highest number that was wanted in this time, `0s` to `9999m`. Longer than the
    /// pause between two rushes: no worker ends in between. Default 300s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SECONDS_OR_MINUTES))]
    pub scale_down_window: Option<String>,
    /// Mode Lag: shortest time between a change and the next lowering, `0s` to `9999m`; each change moves shards from
    /// worker to worker. Default 60s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SECONDS_OR_MINUTES))]
    pub cooldown: Option<String>,
}

/// A time that may be none: `0s`, `300s`, `5m`.
const SECONDS_OR_MINUTES: &str = r"^(0|[1-9][0-9]{0,3})(s|m)$";

impl ScalingSpec {
    /// What `replicas` is when nobody says it.
    pub const REPLICAS: i32 = 1;

    fn default_replicas() -> i32 {
        Self::REPLICAS
    }

    fn default_min_replicas() -> i32 {
        1
    }

    fn default_max_replicas() -> i32 {
        5
    }
}

impl Default for ScalingSpec {
    fn default() -> Self {
        Self {
            mode: None,
            replicas: Self::default_replicas(),
            min_replicas: Self::default_min_replicas(),
            max_replicas: Self::default_max_replicas(),
            target_lag: None,
            drain_seconds: None,
            activation_lag: None,
            poll_interval: None,
            scale_down_window: None,
            cooldown: None,
        }
    }
}

/// Who decides how many workers there are. Default Lag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ScalingMode {
    /// The operator, by what waits in the log.
    #[default]
    Lag,
    /// `replicas` does.
    Fixed,
    /// Something else scales the Deployment `<nest>-worker`: the operator never sets its replicas.
    External,
}

/// What a worker stores in one transaction.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchSpec {
    /// Most entries, 1 to 1000. Default 500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub size: Option<i32>,
    /// How long the first entry waits for others, at most 10s. Default 10ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    #[x_kube(validation = Rule::new("duration(self) <= duration('10s')")
        .message("worker.batch.linger must not be longer than 10s: nothing is stored while the first entry waits"))]
    pub linger: Option<String>,
}

/// Limits of what is cached.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheSpec {
    /// How long Redis keeps an entry after it was last written or filled; it bounds Redis's memory, not the entry's
    /// life. Default 24h.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    pub default_ttl: Option<String>,
    /// Longest time to live a client may ask for; longer ones are refused. Default: 100 years.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    pub max_ttl: Option<String>,
    /// Largest value of one entry in bytes, 1024 to 4128768 (the managed NATS takes 4 MiB in all). Default 1048576.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 4128768))]
    pub max_value_bytes: Option<i32>,
}

/// Who may talk to the managed servers.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkPolicySpec {
    /// Make NetworkPolicies that let only the pods of this nest, and the operator to NATS, reach them. Takes a network that
    /// enforces such policies. Default true.
    #[serde(default = "NetworkPolicySpec::default_enabled")]
    pub enabled: bool,
}

impl NetworkPolicySpec {
    fn default_enabled() -> bool {
        true
    }
}

impl Default for NetworkPolicySpec {
    fn default() -> Self {
        Self {
            enabled: Self::default_enabled(),
        }
    }
}
