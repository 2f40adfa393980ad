//! The REST API: how many there are, and how they are reached.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ResourceRequirements;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{birb_nest::DURATION, servers::SecretKey};

/// The REST API.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.autoscaling) || !has(self.resources) || (has(self.resources.requests) && 'cpu' in self.resources.requests) || (has(self.resources.limits) && 'cpu' in self.resources.limits)")
    .message("api.autoscaling compares with the processor time that is requested: set api.resources.requests.cpu"))]
pub struct ApiSpec {
    /// How many. Default 2. `autoscaling` wins over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<i32>,
    /// As many as their use of processors asks for, by a HorizontalPodAutoscaler.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingSpec>,
    /// What each may use. Default: requests 100m and 128Mi, limit 512Mi.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// The Service in front of it, which is called like the nest.
    #[serde(default)]
    pub service: ServiceSpec,
    /// A way in from outside of the cluster, by HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<IngressSpec>,
    /// Who may use it. Without it everybody may do everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<AuthSpec>,
    /// How much one client may ask of it. Without it there is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimitSpec>,
    /// What else its pods should be like: a pod template, of which only what differs is said. At most 16 KiB. Labels that pods
    /// are selected by, what the container `api` runs, and what it may not do cannot be overridden.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "pod_template")]
    pub pod_template: Option<Value>,
}

/// A pod template that says little. The API server knows what is right: its schema has not enough room here.
pub(super) fn pod_template(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": true,
        "maxProperties": 2,
    })
}

/// Bounds of a HorizontalPodAutoscaler, and what it aims at.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas")
    .message("api.autoscaling.minReplicas must not be more than maxReplicas"))]
pub struct AutoscalingSpec {
    /// Fewest. Default 2.
    #[serde(default = "AutoscalingSpec::default_min_replicas")]
    #[schemars(range(min = 1, max = 1000))]
    pub min_replicas: i32,
    /// Most.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,
    /// Processor time that the pods should use on average, in percent of what they request. Default 80.
    #[serde(
        default = "AutoscalingSpec::default_target",
        rename = "targetCPUUtilization"
    )]
    #[schemars(range(min = 1, max = 1000))]
    pub target_cpu_utilization: i32,
}

impl AutoscalingSpec {
    fn default_min_replicas() -> i32 {
        2
    }

    fn default_target() -> i32 {
        80
    }
}

/// An Ingress to the whole API.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct IngressSpec {
    /// Its IngressClass. Default: the cluster's default class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub class_name: Option<String>,
    /// The host name at which it is found; the first part may be `*`.
    #[schemars(
        length(max = 253),
        regex(
            pattern = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
        )
    )]
    pub host: String,
    /// A Secret with the certificate of that host (`tls.crt`, `tls.key`). Without it there is no TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub tls_secret_name: Option<String>,
    /// For what serves the Ingress, and for what makes certificates.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub annotations: BTreeMap<String, String>,
}

/// Who may use the API.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthSpec {
    /// The keys of clients, one per line: `ROLE NAME KEY`, with the role `read`, `write` or `admin`. Changes are taken over by
    /// running pods.
    pub keys_secret_ref: SecretKey,
}

/// How much one client may ask of an API replica; each replica counts for itself.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimitSpec {
    /// Requests within `duration`. A client is a key, or without keys an address.
    #[schemars(range(min = 1, max = 1000000000))]
    pub requests: i32,
    /// Over which they are spread. Default 1m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    pub duration: Option<String>,
}

/// The Service in front of the API.
#[derive(KubeSchema, Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// How it is reached.
    #[serde(default, rename = "type")]
    pub type_: ServiceType,
    /// Its port.
    #[serde(default = "ServiceSpec::default_port")]
    #[schemars(range(min = 1, max = 65535))]
    #[x_kube(validation = Rule::new("self != 9090").message("api.service.port 9090 is taken by probes and metrics"))]
    pub port: i32,
    /// For load balancers and the like.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub annotations: BTreeMap<String, String>,
}

impl ServiceSpec {
    fn default_port() -> i32 {
        8080
    }
}

impl Default for ServiceSpec {
    fn default() -> Self {
        Self {
            type_: ServiceType::default(),
            port: Self::default_port(),
            annotations: BTreeMap::new(),
        }
    }
}

/// How a Service is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum ServiceType {
    /// Inside the cluster.
    #[default]
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    /// By a port of every node.
    NodePort,
    /// By a load balancer.
    LoadBalancer,
}

impl ServiceType {
    /// As a Service's `type`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        }
    }
}
