//! What the API server was asked, from its audit log.

use std::fs;

use anyhow::{Context, Result};
use birb_nest_cluster::Cluster;
use jiff::Timestamp;
use serde_json::Value;

use crate::Installation;

/// A request that the API server has answered.
#[derive(Clone, Debug)]
pub struct Request {
    /// As Kubernetes calls it: `get`, `list`, `watch`, `create`, `patch`, `update`, `delete`.
    pub verb: String,
    /// Plural name of what it was about, as in `deployments`.
    pub resource: String,
    /// Namespace of what it was about, or nothing.
    pub namespace: String,
    /// Path and query.
    pub uri: String,
    /// As the requester calls itself.
    pub user_agent: String,
    /// When it came.
    pub received: Timestamp,
    /// When it had been answered.
    pub answered: Timestamp,
    /// Whether the requester had no right to it. What an admission plugin refuses, as in a namespace that is ending, is not
    /// meant.
    pub is_forbidden: bool,
}

/// Requests of the operator up to now, oldest first; none where the audit log is not known.
///
/// # Errors
/// The log cannot be read.
pub fn requests(cluster: &Cluster, installation: &Installation) -> Result<Vec<Request>> {
    requests_with(cluster, installation, "")
}

/// Those of them that are told of in lines with these words, such as a namespace: much faster where many tests share a log.
///
/// # Errors
/// The log cannot be read.
pub fn requests_with(
    cluster: &Cluster,
    installation: &Installation,
    words: &str,
) -> Result<Vec<Request>> {
    let Some(log) = cluster.audit_log() else {
        return Ok(Vec::new());
    };
    let user = installation.user();
    let text = fs::read_to_string(log).context("failed to read the audit log")?;
    // The last line may be half written.
    let events = text
        .lines()
        .filter(|line| line.contains(words))
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let own = events.filter(|event| event["user"]["username"] == user.as_str());
    own.map(|event| Request::of(&event)).collect()
}

impl Request {
    /// Whether it changes something.
    pub fn is_write(&self) -> bool {
        ["create", "update", "patch", "delete", "deletecollection"].contains(&self.verb.as_str())
    }

    fn of(event: &Value) -> Result<Self> {
        let time = |value: &Value| -> Result<Timestamp> {
            Ok(value.as_str().context("an event has its times")?.parse()?)
        };
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(Self {
            verb: text(&event["verb"]),
            resource: text(&event["objectRef"]["resource"]),
            namespace: text(&event["objectRef"]["namespace"]),
            uri: text(&event["requestURI"]),
            user_agent: text(&event["userAgent"]),
            received: time(&event["requestReceivedTimestamp"])?,
            answered: time(&event["stageTimestamp"])?,
            is_forbidden: event["annotations"]["authorization.k8s.io/decision"] == "forbid",
        })
    }
}
