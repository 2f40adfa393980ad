//! What scales the API by its use of processors.

use serde_json::json;

use super::{Child, Kind, Names};
use crate::resolve::{ApiReplicas, Nest};

/// The HorizontalPodAutoscaler of the API, if it is to have one. None for a nest that sleeps.
pub fn autoscaler(nest: &Nest) -> Option<Child> {
    let ApiReplicas::Autoscaled(bounds) = &nest.api_replicas else {
        return None;
    };
    if nest.is_suspended {
        return None;
    }
    let name = Names(&nest.name).api();
    let deployment = Kind::Deployment.api_resource();
    let body = json!({ "spec": {
        "scaleTargetRef": {
            "apiVersion": deployment.api_version,
            "kind": deployment.kind,
            "name": name,
        },
        "minReplicas": bounds.min_replicas,
        "maxReplicas": bounds.max_replicas,
        "metrics": [{ "type": "Resource", "resource": {
            "name": "cpu",
            "target": { "type": "Utilization", "averageUtilization": bounds.target_cpu_utilization },
        } }],
    } });
    Some(Child::new(
        nest,
        Kind::HorizontalPodAutoscaler,
        name,
        "api",
        body,
    ))
}
