//! An operator that looks after some namespaces, with rights in those alone.

use anyhow::{Context, Result};
use birb_nest_cluster::{Cluster, Extent};
use birb_nest_e2e::{Operator, client, condition, eventually, install_for, nothing_forbidden};
use birb_nest_operator::api::BirbNest;
use birb_nest_stack::Root;
use k8s_openapi::api::{
    core::v1::{Namespace, ServiceAccount},
    rbac::v1::{ClusterRoleBinding, RoleBinding},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::json;

use crate::kubelet::Kubelet;

async fn until_ready(client: &Client, namespace: &str, replicas: i32) -> Result<()> {
    let nests: Api<BirbNest> = Api::namespaced(client.clone(), namespace);
    let what = format!("the nest in {namespace} is ready with {replicas} replicas");
    eventually(&what, || async {
        Kubelet::default().act(client, namespace).await?;
        let nest = nests.get("cache").await?;
        let is_ready = condition(&nest, "Ready").is_some_and(|ready| ready.status == "True");
        let desired = nest.status.as_ref().map(|status| status.api.desired);
        Ok(if is_ready && desired == Some(replicas) {
            Ok(())
        } else {
            Err(format!("{:?}", nest.status))
        })
    })
    .await
}

/// In a control plane of its own: the shared operator looks after all namespaces.
#[tokio::test]
async fn an_operator_of_two_namespaces_needs_no_rights_elsewhere() -> Result<()> {
    let root = Root::temporary("namespaces", |_| Ok(()))?;
    let cluster = Cluster::kept(&root.path().join("cluster"), Extent::ControlPlane).await?;
    let client = client(&cluster).await?;
    for name in ["shop", "mall", "bazaar"] {
        let namespace = json!({ "metadata": { "name": name } });
        let namespace: Namespace = serde_json::from_value(namespace)?;
        Api::all(client.clone())
            .create(&PostParams::default(), &namespace)
            .await?;
    }
    let installation = install_for(&cluster, &["shop", "mall"]).await?;
    let bindings: Api<ClusterRoleBinding> = Api::all(client.clone());
    let bindings = bindings.list(&ListParams::default()).await?;
    let is_ours = |binding: &ClusterRoleBinding| {
        let mut subjects = binding.subjects.iter().flatten();
        subjects.any(|subject| subject.name == installation.name)
    };
    assert!(!bindings.iter().any(is_ours), "it has rights everywhere");
    let bindings: Api<RoleBinding> = Api::namespaced(client.clone(), "bazaar");
    assert!(
        bindings
            .list(&ListParams::default())
            .await?
            .items
            .is_empty()
    );

    let flags = ["--namespaces=shop,mall"];
    let operator =
        Operator::start_with(&cluster, &installation, root.path(), "operator", &flags).await?;
    let nest = BirbNest::new("cache", serde_json::from_value(json!({}))?);
    for namespace in ["bazaar", "shop", "mall"] {
        Api::namespaced(client.clone(), namespace)
            .create(&PostParams::default(), &nest)
            .await?;
    }
    for namespace in ["shop", "mall"] {
        until_ready(&client, namespace, 2)
            .await
            .with_context(|| operator.process.log().unwrap_or_default())?;
    }
    // Changes of nests and of their objects are seen in both.
    for namespace in ["mall", "shop"] {
        let nests: Api<BirbNest> = Api::namespaced(client.clone(), namespace);
        let more = json!({ "spec": { "api": { "replicas": 3 } } });
        nests
            .patch("cache", &PatchParams::default(), &Patch::Merge(more))
            .await?;
        until_ready(&client, namespace, 3).await?;
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
        let before = accounts.get("cache").await?.uid();
        accounts.delete("cache", &DeleteParams::default()).await?;
        eventually("the ServiceAccount is put back", || async {
            let now = accounts
                .get_opt("cache")
                .await?
                .and_then(|found| found.uid());
            Ok(if now.is_some() && now != before {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            })
        })
        .await?;
    }
    let nests: Api<BirbNest> = Api::namespaced(client.clone(), "bazaar");
    assert_eq!(nests.get("cache").await?.status, None, "it was left alone");
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "bazaar");
    assert!(accounts.get_opt("cache").await?.is_none());
    nothing_forbidden(&cluster, &installation)
}
