//! Who may talk to the managed servers. Nothing is said of API and workers, and nothing of what pods may reach: clients may be
//! anywhere, and so may external servers.
//!
//! Whether a network enforces this cannot be tested here; what the policies mean is, for every pair of pods.

use serde_json::{Value, json};

use super::{Child, Kind, Names, names};
use crate::resolve::Nest;

/// Policies of the managed servers of `nest`: its own pods may talk to them, and to NATS the operator, whose pods are in
/// `operator_namespace`. Whoever else should be let in has a policy of his own: they add up.
pub fn network_policies(nest: &Nest, operator_namespace: &str) -> Vec<Child> {
    if !nest.has_network_policies {
        return Vec::new();
    }
    let names = Names(&nest.name);
    let own = json!({ "podSelector": {
        "matchLabels": names::instance_selector(nest),
        "matchExpressions": [{
            "key": names::COMPONENT_LABEL,
            "operator": "In",
            "values": ["api", "worker", "setup"],
        }],
    } });
    let operator = json!({
        "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": operator_namespace } },
        "podSelector": { "matchLabels": names::operator_pods() },
    });
    let mut policies = Vec::new();
    if nest.redis.managed().is_some() {
        policies.push(policy(nest, names.redis(), "redis", 6379, json!([own])));
    }
    if nest.nats.managed().is_some() {
        let from = json!([own, operator]);
        policies.push(policy(nest, names.nats(), "nats", 4222, from));
    }
    if nest.postgres.managed().is_some() {
        policies.push(policy(
            nest,
            names.postgres(),
            "postgres",
            5432,
            json!([own]),
        ));
    }
    policies
}

fn policy(nest: &Nest, name: String, component: &str, port: i32, from: Value) -> Child {
    let body = json!({ "spec": {
        "podSelector": { "matchLabels": names::selector(nest, component) },
        "policyTypes": ["Ingress"],
        "ingress": [{ "from": from, "ports": [{ "protocol": "TCP", "port": port }] }],
    } });
    Child::new(nest, Kind::NetworkPolicy, name, component, body)
}

#[cfg(test)]
mod tests;
