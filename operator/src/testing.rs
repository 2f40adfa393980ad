//! Nests for tests.

use clap::Parser;
use kube::core::ObjectMeta;

use crate::{
    api::{BirbNest, BirbNestSpec},
    config::{Config, Images},
    resolve::{Nest, resolve},
};

/// A spec whose servers are all somebody else's.
pub const EXTERNAL: &str = "
redis: {external: {urlSecretRef: {name: servers, key: redis}, tls: {caSecretRef: {name: servers, key: ca}}}}
nats:
  external:
    url: nats://nats.infra:4222
    user: nest
    passwordSecretRef: {name: servers, key: nats}
    tls: {caSecretRef: {name: servers, key: ca}}
    streamReplicas: 3
    streamSize: 256Mi
postgres: {external: {urlSecretRef: {name: servers, key: postgres}, tls: {caSecretRef: {name: servers, key: ca}}}}
";

/// A stored nest called `cache` in namespace `shop` with this spec in YAML.
pub fn stored(spec: &str) -> BirbNest {
    let spec: BirbNestSpec = serde_yaml::from_str(spec).unwrap();
    BirbNest {
        metadata: ObjectMeta {
            name: Some("cache".to_owned()),
            namespace: Some("shop".to_owned()),
            uid: Some("4f0c5f3e-0001".to_owned()),
            generation: Some(3),
            ..ObjectMeta::default()
        },
        spec,
        status: None,
    }
}

/// The same, resolved by an operator of release 1.2.3.
pub fn nest(spec: &str) -> Nest {
    resolve(&stored(spec), &images(), "1.2.3")
}

/// The images of an operator that was told nothing.
pub fn images() -> Images {
    Config::parse_from(["birb-nest-operator"]).images
}
