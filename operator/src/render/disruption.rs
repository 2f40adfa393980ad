//! How many pods may be evicted at once, as when nodes are drained.

use serde_json::json;

use super::{Child, Kind, Names, names};
use crate::resolve::Nest;

/// Budgets of the Deployments, of which there are `api` and `workers` replicas. One pod alone has none: nothing can take
/// its place before it goes, so a budget could only hold a drain up.
pub fn budgets(nest: &Nest, api: i32, workers: i32) -> Vec<Child> {
    [
        (Names(&nest.name).api(), "api", api),
        (Names(&nest.name).worker(), "worker", workers),
    ]
    .into_iter()
    .filter(|(_, _, replicas)| *replicas > 1)
    .map(|(name, component, _)| {
        let body = json!({ "spec": {
            // Not a number that must stay: when the replicas become fewer, a drain still gets on.
            "maxUnavailable": 1,
            "selector": { "matchLabels": names::selector(nest, component) },
            // Pods that are not ready serve nobody.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        } });
        Child::new(nest, Kind::PodDisruptionBudget, name, component, body)
    })
    .collect()
}
