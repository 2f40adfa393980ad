//! What the operator reports.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator saw in its last pass. Nothing in it changes while nothing happens.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BirbNestStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, and why not.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 16))]
    pub conditions: Vec<Condition>,
    /// Where applications find the API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The API's pods.
    #[serde(default)]
    pub api: ApiStatus,
    /// The workers' pods.
    #[serde(default)]
    pub worker: WorkerStatus,
    /// Release of the data plane that was last rolled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// When that was rolled out for the first time since another one ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version_since: Option<Time>,
    /// The Job that prepares the servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationStatus>,
    /// How a nest is put to sleep; there while `spec.suspend` is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspension: Option<Suspension>,
    /// Label selector of the workers' pods, for what scales by `/scale`.
    #[serde(default)]
    pub selector: String,
    /// What the parts of the spec that were left out came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<ResolvedStatus>,
}

/// Pods of the API.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiStatus {
    /// Pods that take requests.
    #[serde(default)]
    pub ready: i32,
    /// Pods there should be.
    #[serde(default)]
    pub desired: i32,
    /// Both, as `2/2`.
    #[serde(default)]
    pub summary: String,
}

/// Pods of the workers.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct WorkerStatus {
    /// Pods that store.
    #[serde(default)]
    pub ready: i32,
    /// Pods there should be.
    #[serde(default)]
    pub desired: i32,
    /// Pods there are; what `/scale` reports.
    #[serde(default)]
    pub replicas: i32,
    /// Ready and desired, as `1/1`.
    #[serde(default)]
    pub summary: String,
    /// Messages in the log that are not stored yet, to two digits and at most every 30 s; in mode Lag, while it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<i64>,
    /// The last change of their number by lag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale_reason: Option<String>,
}

/// The Job that prepares the servers for this release and these settings.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationStatus {
    /// Its name.
    pub job: String,
    /// How far it is.
    pub state: MigrationState,
}

/// How far the setup Job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum MigrationState {
    /// Waiting for servers, or for what it refers to.
    Waiting,
    /// At work, or trying again.
    Running,
    /// Done.
    Complete,
    /// Refused: a person must change something.
    Failed,
}

/// How a nest is put to sleep.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Suspension {
    /// When it began.
    pub since: Time,
    /// How far it is.
    pub stage: SuspensionStage,
}

/// How far a nest is on its way to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum SuspensionStage {
    /// The API is off, or ends; workers store what is left in the log.
    Draining,
    /// All of the log is stored; nothing runs but the servers.
    Drained,
    /// Nothing runs but the servers, and something may be left in the log.
    NotDrained,
}

/// What each server came to.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ResolvedStatus {
    /// The data plane's image.
    pub image: String,
    /// The data plane's release, which `status.version` follows once it is rolled out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Redis.
    pub redis: Placement,
    /// NATS.
    pub nats: Placement,
    /// PostgreSQL.
    pub postgres: Placement,
}

/// Who runs a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum Placement {
    /// The operator.
    Managed,
    /// Somebody else.
    External,
}
