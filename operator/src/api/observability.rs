//! Logs, metrics and alerts.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::birb_nest::DURATION;

/// A level, or levels of modules, as the data plane reads them.
const LOG_LEVEL: &str = r"^([a-z0-9_:]+=)?(error|warn|info|debug|trace)(,([a-z0-9_:]+=)?(error|warn|info|debug|trace))*$";

/// Logs, metrics and alerts.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!self.prometheusRule.enabled || self.serviceMonitor.enabled")
    .message("observability.prometheusRule looks at what serviceMonitor collects: enable that too"))]
pub struct ObservabilitySpec {
    /// Least important lines to show: error, warn, info, debug or trace; or filters per module like
    /// `info,birb_nest_store=debug`. Default info.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), regex(pattern = LOG_LEVEL))]
    pub log_level: Option<String>,
    /// Lines for machines or for people. Default json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
    /// A ServiceMonitor, by which a Prometheus of the Prometheus operator scrapes API and workers.
    #[serde(default)]
    pub service_monitor: ServiceMonitorSpec,
    /// A PrometheusRule with the alerts of configs/alerts.yml, for this nest.
    #[serde(default)]
    pub prometheus_rule: PrometheusRuleSpec,
}

/// How metrics are collected.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceMonitorSpec {
    /// Make it.
    #[serde(default)]
    pub enabled: bool,
    /// Its labels, by which a Prometheus selects it. The operator's own win over them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub labels: BTreeMap<String, String>,
    /// How often to scrape. Default: as set in Prometheus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = DURATION))]
    pub interval: Option<String>,
}

/// What is worth an alert.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PrometheusRuleSpec {
    /// Make it; takes `serviceMonitor`.
    #[serde(default)]
    pub enabled: bool,
    /// Its labels, by which a Prometheus selects it. The operator's own win over them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub labels: BTreeMap<String, String>,
}

/// Log lines for machines or for people. Default json.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object per line.
    #[default]
    Json,
    /// For people.
    Text,
}
