//! How the API is reached, and by whom.

use anyhow::Result;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Secret, Service},
    networking::v1::Ingress,
};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use crate::world::World;

fn host(ingress: &Ingress) -> Option<&str> {
    let rules = ingress.spec.as_ref()?.rules.as_ref()?;
    rules.first()?.host.as_deref()
}

#[tokio::test]
async fn an_ingress_is_put_back_follows_its_host_and_is_removed() -> Result<()> {
    let world = World::where_all_works().await?;
    world
        .create(
            "cache",
            "{api: {ingress: {className: public, host: a.example.com}}}",
        )
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let ingresses = world.of::<Ingress>();
    let other = json!({ "spec": { "ingressClassName": "private" } });
    ingresses
        .patch("cache", &PatchParams::default(), &Patch::Merge(other))
        .await?;
    world
        .until::<Ingress>("cache", |ingress| {
            let spec = ingress.spec.as_ref();
            spec.and_then(|spec| spec.ingress_class_name.as_deref()) == Some("public")
        })
        .await?;
    let before = ingresses.get("cache").await?.uid();
    ingresses.delete("cache", &DeleteParams::default()).await?;
    world
        .until::<Ingress>("cache", |ingress| ingress.uid() != before)
        .await?;
    world
        .change("cache", "{api: {ingress: {host: b.example.com}}}")
        .await?;
    world
        .until::<Ingress>("cache", |ingress| host(ingress) == Some("b.example.com"))
        .await?;
    world.change("cache", "{api: {ingress: null}}").await?;
    world.until_gone::<Ingress>("cache").await?;
    world.finish().await
}

#[tokio::test]
async fn the_service_changes_its_type_and_port_and_loses_its_annotations() -> Result<()> {
    let world = World::where_all_works().await?;
    let public = "{api: {service: {type: LoadBalancer, port: 80, annotations: {lb: internal}}}}";
    world.create("cache", public).await?;
    world.until_ready("cache", "True", "Available").await?;
    let looks = |type_: &'static str, ports: &'static [i32], annotated: bool| {
        move |service: &Service| {
            let Some(spec) = &service.spec else {
                return false;
            };
            let found = spec.ports.iter().flatten().map(|port| port.port);
            spec.type_.as_deref() == Some(type_)
                && found.eq(ports.iter().copied())
                && service.annotations().contains_key("lb") == annotated
        }
    };
    world
        .until("cache", looks("LoadBalancer", &[80], true))
        .await?;
    let plain = "{api: {service: {type: ClusterIP, port: 8080, annotations: null}}}";
    world.change("cache", plain).await?;
    world
        .until("cache", looks("ClusterIP", &[8080, 9090], false))
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

#[tokio::test]
async fn keys_of_clients_are_waited_for_and_change_without_new_pods() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let mounts_keys = |api: &Deployment| {
        serde_json::to_string(api).is_ok_and(|text| text.contains("API_KEYS_FILE"))
    };
    let auth =
        "{api: {auth: {keysSecretRef: {name: clients, key: keys}}, rateLimit: {requests: 9}}}";
    world.change("cache", auth).await?;
    let message = world.until_ready("cache", "False", "SecretMissing").await?;
    assert!(message.contains("clients"), "{message}");
    // Pods without the keys would let everybody in, and pods that wait for them nobody.
    let api = world.of::<Deployment>().get("cache-api").await?;
    assert!(!mounts_keys(&api), "{api:?}");
    world
        .until_condition("cache", "APIAvailable", "True", "Available")
        .await?;

    world
        .secret("clients", &[("keys", "read me 0123456789abcdef")])
        .await?;
    world.until::<Deployment>("cache-api", mounts_keys).await?;
    world.until_ready("cache", "True", "Available").await?;
    let before = world.of::<Deployment>().get("cache-api").await?;
    let other = json!({ "stringData": { "keys": "admin me 0123456789abcdef" } });
    world
        .of::<Secret>()
        .patch("clients", &PatchParams::default(), &Patch::Merge(other))
        .await?;
    // A pass that has seen it.
    world
        .change("cache", "{worker: {batch: {size: 9}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    let after = world.of::<Deployment>().get("cache-api").await?;
    assert_eq!(after.spec, before.spec);

    world
        .change("cache", "{api: {auth: null, rateLimit: null}}")
        .await?;
    world
        .until::<Deployment>("cache-api", |api| !mounts_keys(api))
        .await?;
    world.finish().await
}
