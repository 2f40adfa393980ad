//! How the nest is found, and who its pods are.

use serde_json::{Value, json};

use super::{Child, Kind, Names, names};
use crate::{api::ServiceType, resolve::Nest};

/// The pods' identity, which may do nothing: they never talk to the API server.
pub(super) fn service_account(nest: &Nest) -> Child {
    Child::new(
        nest,
        Kind::ServiceAccount,
        Names(&nest.name).nest(),
        "nest",
        json!({ "automountServiceAccountToken": false }),
    )
}

/// In front of the API. Probes and metrics are for the inside of the cluster.
pub(super) fn api_service(nest: &Nest) -> Child {
    let spec = &nest.service;
    let mut ports = vec![port("http", spec.port)];
    if spec.type_ == ServiceType::ClusterIp {
        ports.push(port("admin", 9090));
    }
    let mut body = json!({ "spec": {
        "type": spec.type_.as_str(),
        "selector": names::selector(nest, "api"),
        "ports": ports,
    } });
    if !spec.annotations.is_empty() {
        body["metadata"] = json!({ "annotations": spec.annotations });
    }
    Child::new(nest, Kind::Service, Names(&nest.name).nest(), "api", body)
}

/// From outside of the cluster to the API, if the nest is to have that.
pub(super) fn ingress(nest: &Nest) -> Option<Child> {
    let spec = nest.ingress.as_ref()?;
    let name = Names(&nest.name).nest();
    let mut body = json!({ "spec": { "rules": [{
        "host": spec.host,
        "http": { "paths": [{
            "path": "/",
            "pathType": "Prefix",
            "backend": { "service": { "name": name, "port": { "name": "http" } } },
        }] },
    }] } });
    if let Some(class) = &spec.class_name {
        body["spec"]["ingressClassName"] = class.as_str().into();
    }
    if let Some(secret) = &spec.tls_secret_name {
        body["spec"]["tls"] = json!([{ "hosts": [spec.host], "secretName": secret }]);
    }
    if !spec.annotations.is_empty() {
        body["metadata"] = json!({ "annotations": spec.annotations });
    }
    Some(Child::new(nest, Kind::Ingress, name, "api", body))
}

/// For applications: `envFrom` it.
pub(super) fn connection(nest: &Nest) -> Child {
    let host = format!("{}.{}.svc", nest.name, nest.namespace);
    let port = nest.service.port.to_string();
    let body = json!({ "data": {
        "BIRB_NEST_URL": format!("http://{host}:{port}"),
        "BIRB_NEST_HOST": host,
        "BIRB_NEST_PORT": port,
    } });
    Child::new(
        nest,
        Kind::ConfigMap,
        Names(&nest.name).connection(),
        "nest",
        body,
    )
}

/// In front of a managed server.
pub(super) fn server_service(
    nest: &Nest,
    name: String,
    component: &str,
    ports: &[(&str, i32)],
    headless: bool,
) -> Child {
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, number)| port(name, *number))
        .collect();
    let mut body = json!({ "spec": {
        "type": "ClusterIP",
        "selector": names::selector(nest, component),
        "ports": ports,
    } });
    if headless {
        body["spec"]["clusterIP"] = "None".into();
        body["spec"]["publishNotReadyAddresses"] = true.into();
    }
    Child::new(nest, Kind::Service, name, component, body)
}

fn port(name: &str, number: i32) -> Value {
    json!({ "name": name, "port": number, "protocol": "TCP", "targetPort": name })
}
