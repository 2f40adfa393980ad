//! What the Prometheus operator needs to collect a nest's metrics and to tell of what is wrong. Its kinds are not Kubernetes'
//! own, so they may not be there.

use serde_json::{Value, json};

use super::{Child, Kind, Names, names};
use crate::{
    quantity,
    resolve::{Nest, Server},
};

/// The rules for people who run Prometheus by hand: all nests at once, with the default number of shards.
const ALERTS: &str = include_str!("../../../configs/alerts.yml");
/// As those rules compare it.
const DEFAULT_SHARDS: &str = "< 8";
/// Half of what a shard's log may hold where nobody says, and as those rules compare it.
const DEFAULT_HALF: u64 = 256 << 20;

/// In front of the admin ports of API and workers; whoever scrapes finds each pod through it. There if it is scraped.
pub(super) fn metrics_service(nest: &Nest) -> Option<Child> {
    nest.service_monitor.as_ref()?;
    let body = json!({ "spec": {
        "type": "ClusterIP",
        "clusterIP": "None",
        "publishNotReadyAddresses": true,
        // Pods of managed servers have no port of that name.
        "selector": names::instance_selector(nest),
        "ports": [{ "name": "admin", "port": 9090, "protocol": "TCP", "targetPort": "admin" }],
    } });
    Some(Child::new(
        nest,
        Kind::Service,
        Names(&nest.name).metrics(),
        METRICS,
        body,
    ))
}

const METRICS: &str = "metrics";

/// The ServiceMonitor and the PrometheusRule of `nest`, as far as it is to have them.
pub fn monitoring(nest: &Nest) -> Vec<Child> {
    service_monitor(nest)
        .into_iter()
        .chain(prometheus_rule(nest))
        .collect()
}

fn service_monitor(nest: &Nest) -> Option<Child> {
    let spec = nest.service_monitor.as_ref()?;
    let mut endpoint = json!({ "port": "admin" });
    if let Some(interval) = &spec.interval {
        endpoint["interval"] = interval.as_str().into();
    }
    let body = json!({ "spec": {
        "selector": { "matchLabels": names::selector(nest, METRICS) },
        // Which of the pods are API and which workers.
        "podTargetLabels": [names::COMPONENT_LABEL],
        "endpoints": [endpoint],
    } });
    let child = Child::new(nest, Kind::ServiceMonitor, nest.name.clone(), METRICS, body);
    Some(child.labelled(&spec.labels))
}

fn prometheus_rule(nest: &Nest) -> Option<Child> {
    let spec = nest.prometheus_rule.as_ref()?;
    let mut rules: Value = serde_yaml::from_str(ALERTS).expect("a test reads it");
    for rule in rules
        .pointer_mut("/groups/0/rules")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(expression) = rule["expr"].as_str() {
            rule["expr"] = of_nest(nest, expression).into();
        }
    }
    let body = json!({ "spec": rules });
    let child = Child::new(nest, Kind::PrometheusRule, nest.name.clone(), METRICS, body);
    Some(child.labelled(&spec.labels))
}

/// `expression` over the metrics of this nest alone, and with its number of shards.
fn of_nest(nest: &Nest, expression: &str) -> String {
    let service = Names(&nest.name).metrics();
    let matchers = format!("namespace=\"{}\",service=\"{service}\"", nest.namespace);
    let mut rest = expression;
    let mut whole = String::new();
    while let Some(start) = rest.find("birbnest_") {
        let is_inside = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let length = rest[start..]
            .bytes()
            .take_while(|byte| is_inside(*byte))
            .count();
        let (metric, after) = rest.split_at(start + length);
        whole.push_str(metric);
        rest = match after.strip_prefix('{') {
            Some(others) => {
                whole.push_str(&format!("{{{matchers},"));
                others
            }
            None => {
                whole.push_str(&format!("{{{matchers}}}"));
                after
            }
        };
    }
    whole.push_str(rest);
    whole
        .replace(DEFAULT_SHARDS, &format!("< {}", nest.shards))
        .replace(
            &format!("> {DEFAULT_HALF}"),
            &format!("> {}", half_of_log(nest)),
        )
}

fn half_of_log(nest: &Nest) -> u64 {
    match &nest.nats {
        Server::Managed(server) => server.stream_bytes / 2,
        Server::External(external) => {
            let size = external.stream_size.as_deref();
            size.map_or(DEFAULT_HALF, |size| quantity::bytes(size) / 2)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    const EXTERNAL: &str = "{external: {url: 'nats://n:4222', streamSize: 256Mi}}";
    const MONITORED: &str = "
nats: {shards: 4}
observability:
  serviceMonitor: {enabled: true, interval: 15s, labels: {release: prometheus, app.kubernetes.io/name: other}}
  prometheusRule: {enabled: true, labels: {role: alerts}}
";

    #[test]
    fn a_monitored_nest_renders_to_these_objects() {
        let nest = testing::nest(MONITORED);
        let children = metrics_service(&nest).into_iter().chain(monitoring(&nest));
        let documents: Vec<String> = children
            .map(|child| serde_yaml::to_string(&child.object).unwrap())
            .collect();
        insta::assert_snapshot!("monitored", documents.join("---\n"));
    }

    #[test]
    fn nothing_is_monitored_that_is_not_asked_for() {
        let nest = testing::nest("{}");
        assert!(metrics_service(&nest).is_none() && monitoring(&nest).is_empty());
    }

    #[test]
    fn the_operators_own_labels_win() {
        let children = monitoring(&testing::nest(MONITORED));
        let labels = &children[0].object["metadata"]["labels"];
        assert_eq!(labels["release"], "prometheus");
        assert_eq!(labels["app.kubernetes.io/name"], "birb-nest");
    }

    #[test]
    fn every_rule_looks_at_this_nest_alone() {
        let nest = testing::nest(MONITORED);
        let own = "{namespace=\"shop\",service=\"cache-metrics\"";
        let rule = prometheus_rule(&nest).unwrap();
        let rules = rule.object.pointer("/spec/groups/0/rules").unwrap();
        let rules = rules.as_array().unwrap();
        assert!(rules.len() >= 5);
        for rule in rules {
            let expression = rule["expr"].as_str().unwrap();
            let n_metrics = expression.matches("birbnest_").count();
            assert!(n_metrics > 0, "{expression}");
            assert_eq!(expression.matches(own).count(), n_metrics, "{expression}");
        }
        let shards = rules
            .iter()
            .find(|rule| rule["alert"] == "BirbNestShardWithoutOwner");
        assert_eq!(
            shards.unwrap()["expr"],
            format!(
                "sum by (namespace) (birbnest_worker_shards{own}}}) < 4 or absent(birbnest_worker_shards{own}}}) \
                 and on () count(birbnest_dependency_up{own}}}) > 0"
            )
        );
        let external = testing::nest(&(MONITORED.replace("{shards: 4}", EXTERNAL)));
        let full = of_nest(&external, "max(birbnest_log_size_bytes) > 268435456");
        assert!(full.ends_with(") > 134217728"), "{full}");
        assert!(ALERTS.contains("> 268435456"));
        let one = of_nest(
            &nest,
            "rate(birbnest_errors_total{operation=\"x\"}[5m]) > birbnest_a / 2",
        );
        assert_eq!(
            one,
            format!(
                "rate(birbnest_errors_total{own},operation=\"x\"}}[5m]) > birbnest_a{own}}} / 2"
            )
        );
    }
}
