use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::*;
use crate::{
    api::SecretKey,
    resolve::{ApiReplicas, RESTART_ANNOTATION, resolve},
    testing::{self, EXTERNAL},
};

/// All objects of a nest, in the order in which they are applied.
fn all(spec: &str) -> Vec<Child> {
    let (nest, inputs) = (testing::nest(spec), inputs());
    let mut children = network_policies(&nest, "birb-nest-system");
    children.extend(foundation(&nest, &inputs));
    let n_apis = match &nest.api_replicas {
        ApiReplicas::Fixed(replicas) => Some(*replicas),
        ApiReplicas::Autoscaled(_) => None,
    };
    children.extend([
        setup(&nest, &inputs),
        api(&nest, &inputs, n_apis),
        worker(&nest, &inputs, Some(1)),
    ]);
    children.extend(budgets(&nest, n_apis.unwrap_or(2), 1));
    children.extend(autoscaler(&nest));
    children
}

fn inputs() -> Inputs {
    let mut inputs = Inputs::default();
    for key in ["redis", "nats", "postgres", "ca"] {
        let name = "servers".to_owned();
        inputs.insert(
            SecretKey {
                name,
                key: key.to_owned(),
            },
            key.into(),
        );
    }
    inputs
}

fn yaml(children: &[Child]) -> String {
    let documents: Vec<String> = children
        .iter()
        .map(|child| serde_yaml::to_string(&child.object).unwrap())
        .collect();
    documents.join("---\n")
}

#[test]
fn an_empty_spec_renders_to_these_objects() {
    insta::assert_snapshot!("managed", yaml(&all("{}")));
}

#[test]
fn external_servers_render_to_these_objects() {
    insta::assert_snapshot!("external", yaml(&all(EXTERNAL)));
}

#[test]
fn every_setting_reaches_its_object() {
    insta::assert_snapshot!(
        "settings",
        yaml(&all("
version: 2.0.0
image: {repository: mirror.example/birb-nest, pullPolicy: Always, pullSecrets: [mirror]}
deletionPolicy: Retain
api: {replicas: 5, service: {type: LoadBalancer, port: 80, annotations: {lb: internal}}, resources: {limits: {memory: 1Gi}}}
worker: {batch: {size: 1000, linger: 20ms}}
cache: {defaultTtl: 12h, maxTtl: 24h, maxValueBytes: 2048}
redis: {managed: {memory: 1Gi, image: mirror.example/redis:7}}
nats: {shards: 16, managed: {storage: 20Gi, storageClassName: fast, syncInterval: 10s}}
postgres: {managed: {storage: 50Gi, storageClassName: fast}}
observability: {logLevel: debug, logFormat: text}
"))
    );
}

/// Whose API is scaled by its use of processors.
const AUTOSCALED: &str =
    "{api: {replicas: 7, autoscaling: {minReplicas: 3, maxReplicas: 9, targetCPUUtilization: 60}}}";

#[test]
fn an_autoscaled_api_renders_to_these_objects() {
    let (plain, scaled) = (all("{}"), all(AUTOSCALED));
    let differs = |child: &Child| !plain.contains(child);
    let other: Vec<Child> = scaled.into_iter().filter(differs).collect();
    insta::assert_snapshot!("autoscaled", yaml(&other));
    let asleep = testing::nest("{suspend: true, api: {autoscaling: {maxReplicas: 9}}}");
    assert_eq!(autoscaler(&asleep), None);
}

/// Whose API is reached from outside, by those who have a key.
const EXPOSED: &str = "
api:
  service: {type: NodePort, port: 80}
  ingress: {className: public, host: cache.example.com, tlsSecretName: cache-tls, annotations: {issuer: it}}
  auth: {keysSecretRef: {name: clients, key: keys.txt}}
  rateLimit: {requests: 100, duration: 10s}
";

#[test]
fn an_exposed_api_renders_to_these_objects() {
    let (plain, exposed) = (all("{}"), all(EXPOSED));
    let differs = |child: &Child| !plain.contains(child);
    let other: Vec<Child> = exposed.into_iter().filter(differs).collect();
    insta::assert_snapshot!("exposed", yaml(&other));
}

#[test]
fn other_keys_of_clients_replace_no_pods() {
    let nest = testing::nest(EXPOSED);
    let keys = SecretKey {
        name: "clients".to_owned(),
        key: "keys.txt".to_owned(),
    };
    assert!(secret_keys(&nest).contains(&keys), "they are waited for");
    let mut other = inputs();
    other.insert(keys, b"admin me secret".to_vec());
    assert_eq!(api(&nest, &other, None), api(&nest, &inputs(), None));
    assert_eq!(setup(&nest, &other), setup(&nest, &inputs()));
    assert!(!yaml(&[worker(&nest, &other, None)]).contains("clients"));
}

#[test]
fn another_value_of_the_annotation_replaces_pods_and_is_no_other_setup() {
    let with = |value: Option<&str>| {
        let mut stored = testing::stored("{}");
        let annotation = value.map(|value| (RESTART_ANNOTATION.to_owned(), value.to_owned()));
        stored.metadata.annotations = Some(annotation.into_iter().collect());
        let nest = resolve(&stored, &testing::images(), "1.2.3");
        [
            api(&nest, &inputs(), None),
            worker(&nest, &inputs(), None),
            setup(&nest, &inputs()),
        ]
    };
    let [api, worker, setup] = with(None);
    let [restarted_api, restarted_worker, same_setup] = with(Some("now"));
    assert_ne!(
        api.object["spec"]["template"],
        restarted_api.object["spec"]["template"]
    );
    assert_ne!(
        worker.object["spec"]["template"],
        restarted_worker.object["spec"]["template"]
    );
    assert_eq!(setup, same_setup);
    assert_ne!(with(Some("later"))[0], restarted_api);
}

#[test]
fn every_field_survives_its_type() {
    let children = [all("{}"), all(EXTERNAL), all(AUTOSCALED), all(EXPOSED)];
    let mut kinds = BTreeSet::from([Kind::Secret]);
    for child in children.into_iter().flatten() {
        kinds.insert(child.kind);
        match child.kind {
            Kind::ConfigMap => survives::<ConfigMap>(&child),
            Kind::Deployment => survives::<Deployment>(&child),
            Kind::HorizontalPodAutoscaler => survives::<HorizontalPodAutoscaler>(&child),
            Kind::Ingress => survives::<Ingress>(&child),
            Kind::Job => survives::<Job>(&child),
            Kind::NetworkPolicy => survives::<NetworkPolicy>(&child),
            Kind::PodDisruptionBudget => survives::<PodDisruptionBudget>(&child),
            // Of no type here.
            Kind::PrometheusRule | Kind::ServiceMonitor => {}
            Kind::Secret => survives::<Secret>(&child),
            Kind::Service => survives::<Service>(&child),
            Kind::ServiceAccount => survives::<ServiceAccount>(&child),
            Kind::StatefulSet => survives::<StatefulSet>(&child),
        }
    }
    kinds.extend([Kind::PrometheusRule, Kind::ServiceMonitor]);
    assert_eq!(kinds, BTreeSet::from(Kind::ALL));
    let nest = testing::nest("{}");
    for secret in generated_secrets(&nest) {
        let object = secret.object(&nest, "letmein");
        let typed: Secret = serde_json::from_value(object.clone()).unwrap();
        assert_eq!(serde_json::to_value(typed).unwrap(), object);
    }
}

/// A misspelt field is dropped on the way.
fn survives<K: DeserializeOwned + Serialize>(child: &Child) {
    let typed: K = serde_json::from_value(child.object.clone())
        .unwrap_or_else(|error| panic!("{} {}: {error}", child.kind.as_str(), child.name));
    let back = serde_json::to_value(typed).unwrap();
    assert_eq!(back, child.object, "{} {}", child.kind.as_str(), child.name);
}

#[test]
fn every_pod_keeps_to_the_restricted_profile() {
    for child in all("{}").into_iter().chain(all(EXTERNAL)) {
        let Some(pod) = child.object.pointer("/spec/template/spec") else {
            continue;
        };
        let name = &child.name;
        assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{name}");
        assert_eq!(
            pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault",
            "{name}"
        );
        for container in pod["containers"].as_array().unwrap() {
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false, "{name}");
            assert_eq!(security["readOnlyRootFilesystem"], true, "{name}");
            assert_eq!(
                security["capabilities"]["drop"],
                serde_json::json!(["ALL"]),
                "{name}"
            );
            assert!(
                container.get("command").is_none(),
                "{name}: the image's entry point stays"
            );
            assert!(
                container["resources"]["limits"].get("memory").is_some(),
                "{name}"
            );
        }
    }
}

#[test]
fn no_object_but_a_secret_holds_a_secret() {
    let nest = testing::nest("{}");
    let password = "f4Kq9pLw2mXz";
    let mut inputs = Inputs::default();
    for key in secret_keys(&nest) {
        inputs.insert(key, password.into());
    }
    let mut children = foundation(&nest, &inputs);
    children.extend([
        setup(&nest, &inputs),
        api(&nest, &inputs, None),
        worker(&nest, &inputs, Some(1)),
    ]);
    assert!(!yaml(&children).contains(password));
    assert!(!format!("{inputs:?}").contains(password));
}

#[test]
fn pods_are_replaced_when_a_used_key_changes_and_not_otherwise() {
    let nest = testing::nest(EXTERNAL);
    let before = api(&nest, &inputs(), None);
    let mut other = inputs();
    let unused = SecretKey {
        name: "servers".to_owned(),
        key: "unused".to_owned(),
    };
    other.insert(unused, b"changed".to_vec());
    assert_eq!(api(&nest, &other, None), before);
    let used = SecretKey {
        name: "servers".to_owned(),
        key: "postgres".to_owned(),
    };
    other.insert(used, b"changed".to_vec());
    assert_ne!(api(&nest, &other, None), before);
    assert_ne!(setup(&nest, &other).name, setup(&nest, &inputs()).name);
}

#[test]
fn setup_runs_again_for_servers_and_releases_but_not_for_logs_or_replicas() {
    let job = |spec: &str| setup(&testing::nest(spec), &inputs()).name;
    let plain = job("{}");
    assert_eq!(
        job("{observability: {logLevel: debug}, api: {replicas: 9}, cache: {defaultTtl: 1h}}"),
        plain
    );
    for other in [
        "{version: 9.9.9}",
        "{nats: {shards: 4}}",
        "{nats: {managed: {storage: 20Gi}}}",
        EXTERNAL,
    ] {
        assert_ne!(job(other), plain, "{other}");
    }
}

#[test]
fn setup_runs_again_on_a_new_volume_and_pods_stay() {
    let nest = testing::nest("{}");
    let on = |uid: &str| {
        let mut inputs = inputs();
        inputs.insert_volume(uid.to_owned());
        (setup(&nest, &inputs).name, api(&nest, &inputs, None))
    };
    let ((old_job, old_api), (new_job, new_api)) = (on("old"), on("new"));
    assert_ne!(old_job, new_job);
    assert_eq!(old_api, new_api);
}

#[test]
fn names_are_unique_per_kind_and_short_enough_for_a_label() {
    let long = "n".repeat(40);
    let mut seen = BTreeSet::new();
    for child in all("{}") {
        let name = child.name.replace("cache", &long);
        // A pod of a Deployment adds 17 characters to its name; Services and labels end at 63.
        assert!(name.len() <= 63, "{name}");
        assert!(seen.insert((child.kind, child.name)), "twice");
    }
}

#[test]
fn the_number_of_workers_is_said_only_when_asked() {
    let replicas = |replicas| {
        let child = worker(&testing::nest("{}"), &Inputs::default(), replicas);
        child.object.pointer("/spec/replicas").cloned()
    };
    assert_eq!(replicas(None), None::<Value>);
    assert_eq!(replicas(Some(3)), Some(3.into()));
}

#[test]
fn one_pod_alone_can_always_be_evicted() {
    let guarded = |api, workers| {
        let children = budgets(&testing::nest("{}"), api, workers);
        let names = children.into_iter().map(|child| child.name);
        names.collect::<Vec<_>>()
    };
    assert_eq!(guarded(0, 1), Vec::<String>::new());
    assert_eq!(guarded(2, 1), ["cache-api"]);
    assert_eq!(guarded(1, 2), ["cache-worker"]);
    assert_eq!(guarded(7, 7), ["cache-api", "cache-worker"]);
}

#[test]
fn the_operator_finds_the_log_where_the_data_plane_does() {
    let access = log_access(&testing::nest("{}"), &inputs());
    assert_eq!(access.url, "nats://cache-nats.shop.svc:4222");
    assert_eq!((access.user.as_deref(), access.tls), (Some("birb"), false));
    assert_eq!(access.stream(3), "BIRB_CACHE_3");
    let other = log_access(&testing::nest(EXTERNAL), &inputs());
    assert_eq!(other.url, "nats://nats.infra:4222");
    assert_eq!(other.password.as_deref(), Some("nats"));
    assert_eq!(
        (other.tls, other.authority.as_deref()),
        (true, Some(&b"ca"[..]))
    );
    assert_eq!(other.stream(0), "BIRB_shop_cache_0");

    // What the data plane calls them when nobody says otherwise.
    let manual = include_str!("../../../docs/CONFIGURATION.md");
    for default in [
        "`NATS_STREAM_NAME` | `BIRB_CACHE` |",
        "`NATS_CONSUMER_NAME` | `birb-worker` |",
    ] {
        assert!(manual.contains(default), "{default}");
    }
}

#[test]
fn another_password_is_another_connection() {
    let (nest, mut inputs) = (testing::nest(EXTERNAL), inputs());
    let before = log_access(&nest, &inputs).pool_key();
    assert_eq!(log_access(&nest, &inputs).pool_key(), before);
    let key = SecretKey {
        name: "servers".to_owned(),
        key: "nats".to_owned(),
    };
    inputs.insert(key, b"changed".to_vec());
    assert_ne!(log_access(&nest, &inputs).pool_key(), before);
}
