//! NetworkPolicies of managed servers. What they mean is tested beside the code that renders them.

use anyhow::Result;
use birb_nest_e2e::names_of;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;

use crate::world::World;

#[tokio::test]
async fn policies_guard_managed_servers_until_they_are_switched_off() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create("cache", "{}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let policies = world.of::<NetworkPolicy>();
    let names = names_of(&policies.list(&ListParams::default()).await?.items);
    assert_eq!(names, ["cache-nats", "cache-postgres", "cache-redis"]);
    let text = serde_json::to_string(&policies.get("cache-nats").await?.spec)?;
    assert!(
        text.contains(&world.shared.installation.namespace),
        "{text}"
    );

    // As somebody opens a server to everybody.
    let open = json!({ "spec": { "ingress": [{}] } });
    policies
        .patch("cache-redis", &PatchParams::default(), &Patch::Merge(open))
        .await?;
    world
        .until::<NetworkPolicy>("cache-redis", |policy| {
            let spec = policy.spec.as_ref();
            let rules = spec.and_then(|spec| spec.ingress.as_deref());
            rules.is_some_and(|rules| rules.len() == 1 && rules[0].from.is_some())
        })
        .await?;

    world
        .change("cache", "{networkPolicy: {enabled: false}}")
        .await?;
    for name in names {
        world.until_gone::<NetworkPolicy>(&name).await?;
    }
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}
