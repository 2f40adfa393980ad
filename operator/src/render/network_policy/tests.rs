//! What the rendered policies mean: an evaluator of NetworkPolicies over labels of pods and namespaces.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use serde_json::Value;

use super::*;
use crate::{
    render::{self, Inputs},
    testing,
};

type Labels = BTreeMap<String, String>;

const OPERATOR_NAMESPACE: &str = "birb-nest-system";

/// A pod, as far as policies look at it.
#[derive(Clone, Debug, PartialEq)]
struct Pod {
    namespace: String,
    labels: Labels,
}

impl Pod {
    fn new(namespace: &str, labels: &Value) -> Self {
        Self {
            namespace: namespace.to_owned(),
            labels: serde_json::from_value(labels.clone()).unwrap(),
        }
    }

    fn component(&self) -> &str {
        self.labels
            .get("app.kubernetes.io/component")
            .map_or("", String::as_str)
    }
}

/// Whether `policies` let `from` open a TCP connection to `port` of `to`, as the documentation of Kubernetes says: a pod that
/// no policy selects takes everything, others what at least one policy lets in.
fn lets_in(policies: &[NetworkPolicy], from: &Pod, to: &Pod, port: i32) -> bool {
    let selecting: Vec<&NetworkPolicy> = policies
        .iter()
        .filter(|policy| {
            let spec = policy.spec.as_ref().unwrap();
            let types = spec.policy_types.iter().flatten();
            policy.metadata.namespace.as_deref() == Some(&to.namespace)
                && selects(spec.pod_selector.as_ref().unwrap(), &to.labels)
                && types.into_iter().any(|type_| type_ == "Ingress")
        })
        .collect();
    selecting.is_empty()
        || selecting.iter().any(|policy| {
            let spec = policy.spec.as_ref().unwrap();
            spec.ingress.iter().flatten().any(|rule| {
                let peers = rule.from.as_deref().unwrap_or_default();
                let ports = rule.ports.as_deref().unwrap_or_default();
                let namespace = policy.metadata.namespace.as_deref().unwrap();
                // An empty list is no restriction.
                (peers.is_empty() || peers.iter().any(|peer| is_peer(peer, namespace, from)))
                    && (ports.is_empty() || ports.iter().any(|rule| is_port(rule, port)))
            })
        })
}

fn is_peer(peer: &NetworkPolicyPeer, namespace: &str, pod: &Pod) -> bool {
    assert!(peer.ip_block.is_none(), "nothing here knows addresses");
    let in_namespace = match &peer.namespace_selector {
        Some(selector) => {
            let name = "kubernetes.io/metadata.name".to_owned();
            selects(selector, &[(name, pod.namespace.clone())].into())
        }
        None => pod.namespace == namespace,
    };
    let is_pod = |selector| selects(selector, &pod.labels);
    in_namespace && peer.pod_selector.as_ref().is_none_or(is_pod)
}

fn is_port(rule: &NetworkPolicyPort, port: i32) -> bool {
    let Some(IntOrString::Int(first)) = rule.port else {
        panic!("a port is a number here: {rule:?}");
    };
    rule.protocol.as_deref().unwrap_or("TCP") == "TCP"
        && (first..=rule.end_port.unwrap_or(first)).contains(&port)
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    let mut equal = selector.match_labels.iter().flatten();
    let mut expressions = selector.match_expressions.iter().flatten();
    equal.all(|(name, value)| labels.get(name) == Some(value))
        && expressions.all(|expression| {
            let values = expression.values.as_deref().unwrap_or_default();
            let value = labels.get(&expression.key);
            let is_in = value.is_some_and(|value| values.contains(value));
            match expression.operator.as_str() {
                "In" => is_in,
                "NotIn" => !is_in,
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                other => panic!("no operator: {other}"),
            }
        })
}

/// The nest called `name` in `namespace`.
fn nest(namespace: &str, name: &str, spec: &str) -> Nest {
    Nest {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        ..testing::nest(spec)
    }
}

fn policies(nest: &Nest) -> Vec<NetworkPolicy> {
    let children = network_policies(nest, OPERATOR_NAMESPACE);
    children
        .into_iter()
        .map(|child| serde_json::from_value(child.object).unwrap())
        .collect()
}

/// A pod of each workload of `nest`.
fn pods(nest: &Nest) -> Vec<Pod> {
    let inputs = Inputs::default();
    let mut children = render::foundation(nest, &inputs);
    children.extend([
        render::setup(nest, &inputs),
        render::api(nest, &inputs, None),
        render::worker(nest, &inputs, None),
    ]);
    let labels = children
        .iter()
        .filter_map(|child| child.object.pointer("/spec/template/metadata/labels"));
    labels
        .map(|labels| Pod::new(&nest.namespace, labels))
        .collect()
}

/// Pods of no nest: the operator as the chart starts it, those who only look like it, and others.
fn strangers() -> Vec<Pod> {
    let like_the_operator = json!({
        "app.kubernetes.io/name": "birb-nest-operator",
        "app.kubernetes.io/part-of": "birb-nest",
        "app.kubernetes.io/component": "operator",
    });
    vec![
        Pod::new(OPERATOR_NAMESPACE, &like_the_operator),
        Pod::new("shop", &like_the_operator),
        Pod::new(OPERATOR_NAMESPACE, &json!({})),
        Pod::new("shop", &json!({ "app": "shop" })),
        // Of no nest that is there, with labels like one.
        Pod::new(
            "bazaar",
            &json!({
                "app.kubernetes.io/name": "birb-nest",
                "app.kubernetes.io/instance": "cache",
                "app.kubernetes.io/component": "api",
            }),
        ),
    ]
}

#[test]
fn of_all_pairs_of_pods_only_these_may_talk() {
    let nests = [
        nest("shop", "cache", "{}"),
        nest("shop", "other", "{}"),
        nest("mall", "cache", "{}"),
    ];
    let policies: Vec<NetworkPolicy> = nests.iter().flat_map(policies).collect();
    assert_eq!(policies.len(), 9);
    let own: Vec<Vec<Pod>> = nests.iter().map(pods).collect();
    let everybody: Vec<Pod> = own.iter().flatten().cloned().chain(strangers()).collect();
    assert_eq!(everybody.len(), 3 * 6 + 5);
    let servers = [("redis", 6379), ("nats", 4222), ("postgres", 5432)];
    let mut n_let_in = 0;
    for siblings in &own {
        for to in siblings {
            let server = servers.iter().find(|(name, _)| *name == to.component());
            for (from, port) in everybody.iter().flat_map(|from| {
                [6379, 4222, 5432, 8222, 8080, 9090, 9091].map(|port| (from, port))
            }) {
                let expected = match server {
                    None => true,
                    Some((name, open)) => {
                        let is_own = siblings.contains(from)
                            && ["api", "worker", "setup"].contains(&from.component());
                        let is_operator =
                            from.namespace == OPERATOR_NAMESPACE && from.component() == "operator";
                        *open == port && (is_own || (*name == "nats" && is_operator))
                    }
                };
                assert_eq!(
                    lets_in(&policies, from, to, port),
                    expected,
                    "{from:?} to port {port} of {to:?}"
                );
                n_let_in += usize::from(expected && server.is_some());
            }
        }
    }
    // Three own pods to each of three servers, and the operator to NATS.
    assert_eq!(n_let_in, 3 * (3 * 3 + 1));
}

#[test]
fn without_policies_and_for_external_servers_there_are_none() {
    let off = nest("shop", "cache", "{networkPolicy: {enabled: false}}");
    assert!(policies(&off).is_empty());
    assert!(policies(&nest("shop", "cache", testing::EXTERNAL)).is_empty());
}

#[test]
fn the_chart_starts_the_operator_with_the_labels_that_nats_lets_in() {
    let chart = include_str!("../../../../dist/install.yaml");
    let pod = chart
        .split("\n---\n")
        .find(|document| document.contains("\nkind: Deployment\n"))
        .map(|document| serde_yaml::from_str::<Value>(document).unwrap())
        .unwrap();
    let labels = &pod["spec"]["template"]["metadata"]["labels"];
    let operator = Pod::new(OPERATOR_NAMESPACE, labels);
    let nest = nest("shop", "cache", "{}");
    let nats = pods(&nest)
        .into_iter()
        .find(|pod| pod.component() == "nats")
        .unwrap();
    assert!(lets_in(&policies(&nest), &operator, &nats, 4222));
}
