//! What somebody else changed or deleted is put back, and what nobody touched costs no request.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use birb_nest_e2e::{Request, eventually};
use birb_nest_operator::{api::BirbNest, render::Kind};
use jiff::Timestamp;
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{PersistentVolumeClaim, Service},
};
use kube::{
    Api, Discovery, ResourceExt,
    api::{DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    discovery::{Scope, verbs},
};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::{
    edits::{Edited, edit_all},
    kubelet::Kubelet,
    world::{Shared, World},
};

/// All that can be said of a nest with servers of its own; as many workers as are said, so that no other manager says how many.
const FIXED: &str = "
image: {pullPolicy: Always, pullSecrets: [registry]}
api:
  autoscaling: {maxReplicas: 4}
  service: {annotations: {balancer: internal}}
  ingress: {className: public, host: cache.example.com, tlsSecretName: tls, annotations: {issuer: authority}}
  auth: {keysSecretRef: {name: clients, key: keys}}
  rateLimit: {requests: 321, duration: 11s}
  podTemplate:
    metadata: {annotations: {team: birds}}
    spec:
      priorityClassName: high
      nodeSelector: {disk: fast}
      tolerations: [{key: spot, operator: Equal, value: few}]
      containers: [{name: api, env: [{name: EXTRA, value: more}], livenessProbe: {failureThreshold: 99}}]
worker:
  scaling: {mode: Fixed, replicas: 2}
  batch: {size: 123, linger: 21ms}
  podTemplate: {spec: {terminationGracePeriodSeconds: 61}}
cache: {defaultTtl: 12h, maxTtl: 24h, maxValueBytes: 2048}
observability:
  logLevel: debug
  logFormat: text
  serviceMonitor: {enabled: true, interval: 15s, labels: {prometheus: ours}}
  prometheusRule: {enabled: true, labels: {prometheus: ours}}
";

/// What of it must be among the values that are edited. A pull secret is not: who changes its name adds one of his own.
const SAID: [&str; 24] = [
    "Always",
    "internal",
    "public",
    "cache.example.com",
    "tls",
    "authority",
    "clients",
    "321",
    "11s",
    "birds",
    "high",
    "fast",
    "spot",
    "more",
    "99",
    "123",
    "21ms",
    "61",
    "12h",
    "24h",
    "2048",
    "debug",
    "15s",
    "ours",
];

/// What else can be said of servers that are somebody else's.
const EXTERNAL: &str = "
redis: {external: {urlSecretRef: {name: servers, key: redis}, tls: {caSecretRef: {name: servers, key: ca}}}}
nats:
  external:
    url: tls://nats.infra:4222
    user: nest
    passwordSecretRef: {name: servers, key: nats}
    tls: {caSecretRef: {name: servers, key: ca}}
    streamReplicas: 3
    streamSize: 256Mi
    prefix: birds
postgres: {external: {urlSecretRef: {name: servers, key: postgres}, tls: {caSecretRef: {name: servers, key: ca}}}}
worker: {scaling: {mode: Fixed, replicas: 2}}
";

/// An object of the nest, and how to reach those of its kind.
struct Found {
    api: Api<DynamicObject>,
    object: DynamicObject,
    kind: String,
}

impl World {
    /// All objects that the nest is the controller of, of whatever kinds the API server knows.
    async fn owned(&self, nest: &BirbNest) -> Result<Vec<Found>> {
        let uid = nest.uid().context("it is stored")?;
        let discovery = Discovery::new(self.client.clone()).run().await?;
        let mut found = Vec::new();
        for (resource, capabilities) in discovery
            .groups()
            .flat_map(|group| group.recommended_resources())
        {
            let is_listed = [verbs::LIST, verbs::DELETE, verbs::UPDATE]
                .iter()
                .all(|verb| capabilities.supports_operation(verb));
            if capabilities.scope != Scope::Namespaced || !is_listed {
                continue;
            }
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
            let objects = api.list(&ListParams::default()).await?;
            let own = objects.into_iter().filter(|object| {
                let mut owners = object.owner_references().iter();
                owners.any(|owner| owner.uid == uid)
            });
            found.extend(own.map(|object| Found {
                api: api.clone(),
                object,
                kind: resource.kind.clone(),
            }));
        }
        Ok(found)
    }

    /// A nest of which all is said, once it is ready.
    async fn create_fixed(&self) -> Result<()> {
        let keys = "read me 0123456789abcdef";
        self.secret("clients", &[("keys", keys)]).await?;
        self.create("cache", FIXED).await?;
        self.until_ready("cache", "True", "Available").await?;
        Ok(())
    }

    /// The objects of a nest that is at rest, of which there are those of all kinds that the operator knows.
    async fn at_rest(&self, name: &str) -> Result<Vec<Found>> {
        let nest = self.of::<BirbNest>().get(name).await?;
        let found = self.owned(&nest).await?;
        // A kind that the spec of these tests does not ask for is a hole in them.
        let known: BTreeSet<&str> = Kind::ALL.into_iter().map(Kind::as_str).collect();
        let kinds: BTreeSet<&str> = found.iter().map(|found| found.kind.as_str()).collect();
        ensure!(kinds == known, "discovered {kinds:?}, rendered {known:?}");
        Ok(found)
    }
}

/// Secrets are generated once; a Job is never applied again (docs/adr/0013-setup-job.md).
fn is_put_back(kind: &str) -> bool {
    kind != Kind::Secret.as_str() && kind != Kind::Job.as_str()
}

/// What half of all repairs may take, and any of them, on a machine that is several times slower and does other things beside.
const MEDIAN: Duration = Duration::from_secs(10);
const SLOWEST: Duration = Duration::from_secs(60);

/// How long it took to put back what.
#[derive(Default)]
struct Repairs(Vec<(Duration, String)>);

impl Repairs {
    fn note(&mut self, since: Instant, what: String) {
        self.0.push((since.elapsed(), what));
    }

    fn finish(mut self) -> Result<()> {
        self.0.sort();
        let (median, _) = self.0[self.0.len() / 2];
        let (slowest, what) = self.0.last().context("something was put back")?;
        println!(
            "{} repairs, half of them within {median:?}; {what} took {slowest:?}",
            self.0.len()
        );
        ensure!(
            median < MEDIAN && *slowest < SLOWEST,
            "not within seconds: {:?}",
            self.0
        );
        Ok(())
    }
}

#[tokio::test]
async fn every_object_that_is_deleted_is_made_again() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create_fixed().await?;
    let mut repairs = Repairs::default();
    for Found { api, object, kind } in world.at_rest("cache").await? {
        if !is_put_back(&kind) {
            continue;
        }
        let name = object.name_any();
        let before = object.uid();
        let since = Instant::now();
        api.delete(&name, &DeleteParams::background()).await?;
        eventually(&format!("{kind} {name} is there again"), || async {
            let now = api.get_opt(&name).await?.and_then(|object| object.uid());
            Ok(if now.is_some() && now != before {
                Ok(())
            } else {
                Err(format!("{now:?} after {before:?}"))
            })
        })
        .await?;
        repairs.note(since, format!("{kind} {name}"));
    }
    repairs.finish()?;
    world.until_ready("cache", "True", "Available").await?;
    world.finish().await
}

#[tokio::test]
async fn every_field_that_is_edited_is_put_back() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create_fixed().await?;
    let (mut kinds, mut repairs) = (BTreeSet::new(), Repairs::default());
    let mut edited = Vec::new();
    let found = world.at_rest("cache").await?;
    let expected: BTreeSet<String> = found
        .iter()
        .filter(|found| is_put_back(&found.kind))
        .map(|found| found.kind.clone())
        .collect();
    for found in found {
        if is_put_back(&found.kind) {
            let fields = found.is_edited_and_put_back(&mut repairs).await?;
            edited.extend(fields.iter().map(Value::to_string));
            kinds.insert(found.kind);
        }
    }
    assert_eq!(kinds, expected);
    let is_edited = |said: &str| {
        let quoted = format!("\"{said}\"");
        edited
            .iter()
            .any(|was| was == said || was.contains(&quoted))
    };
    let missing: Vec<&str> = SAID.into_iter().filter(|said| !is_edited(said)).collect();
    ensure!(missing.is_empty(), "{missing:?} not among {edited:#?}");
    world.until_ready("cache", "True", "Available").await?;

    let servers = [
        ("redis", "rediss://redis.infra:6379/0"),
        ("nats", "secret"),
        ("postgres", "postgres://birb:secret@postgres.infra/birb"),
        ("ca", "a certificate"),
    ];
    world.secret("servers", &servers).await?;
    let nest = world.create("elsewhere", EXTERNAL).await?;
    world.until_ready("elsewhere", "True", "Available").await?;
    let mut n_others = 0;
    // What is not a pod does not know where servers are.
    for found in world.owned(&nest).await? {
        if found.kind == Kind::Deployment.as_str() {
            found.is_edited_and_put_back(&mut repairs).await?;
            n_others += 1;
        }
    }
    assert_eq!(n_others, 2);
    repairs.finish()?;
    world.until_ready("elsewhere", "True", "Available").await?;
    world.finish().await
}

impl Found {
    /// Edits each field that is set, and waits until it is as it was; returns the values that were edited.
    async fn is_edited_and_put_back(&self, repairs: &mut Repairs) -> Result<Vec<Value>> {
        let (api, name) = (&self.api, self.object.name_any());
        let what = format!("{} {name}", self.kind);
        let Edited { version, fields } =
            edit_all(api, &name).await.with_context(|| what.clone())?;
        ensure!(!fields.is_empty(), "no field of {what} could be edited");
        println!("{what}: edited {} fields", fields.len());
        let since = Instant::now();
        eventually(&format!("{what} is as it was"), || async {
            let now = serde_json::to_value(api.get(&name).await?)?;
            let still: Vec<&String> = fields
                .iter()
                .filter(|(field, wanted)| now.pointer(field) != Some(wanted))
                .map(|(field, _)| field)
                .collect();
            Ok(if still.is_empty() {
                Ok(())
            } else {
                Err(format!("{still:?}"))
            })
        })
        .await?;
        let now = api.get(&name).await?;
        ensure!(now.resource_version() != version, "{what}");
        repairs.note(since, what);
        Ok(fields.into_iter().map(|(_, was)| was).collect())
    }
}

/// Changes a label of the Service called `name` again and again, until it is aborted.
pub fn meddle(services: Api<Service>, name: &'static str) -> JoinHandle<()> {
    tokio::spawn(async move {
        let params = PatchParams::default();
        for number in 0.. {
            let label = json!({ "app.kubernetes.io/component": format!("drift-{number}") });
            let patch = Patch::Merge(json!({ "metadata": { "labels": label } }));
            // Perhaps it is not there yet.
            let _ = services.patch(name, &params, &patch).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
}

#[tokio::test]
async fn somebody_who_never_ceases_to_change_an_object_does_not_stop_the_nest() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create_fixed().await?;
    let meddler = meddle(world.of(), "cache");
    world
        .change("cache", "{worker: {scaling: {replicas: 3}}}")
        .await?;
    world
        .until::<Deployment>("cache-worker", |worker| {
            worker.spec.as_ref().and_then(|spec| spec.replicas) == Some(3)
        })
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    meddler.abort();
    world.finish().await
}

/// Generated once, made with what is in the volumes: neither is rendered again, nor put back.
#[tokio::test]
async fn secrets_and_volumes_are_not_repaired() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create_fixed().await?;
    // As the controller of StatefulSets makes them.
    let volumes = ["data-cache-nats-0", "data-cache-postgres-0"];
    for name in volumes {
        world.volume(name).await?;
    }
    let mut secrets = world.at_rest("cache").await?;
    secrets.retain(|found| found.kind == Kind::Secret.as_str());
    let names: Vec<String> = secrets
        .iter()
        .map(|found| found.object.name_any())
        .collect();
    assert_eq!(names, ["cache-nats", "cache-postgres", "cache-redis"]);

    // What somebody else says in them stays, whatever it does to the nest.
    let params = PatchParams::default();
    let edit = json!({ "metadata": { "labels": { "edited": "yes" } } });
    for Found { api, object, .. } in &secrets {
        let data = json!({ "stringData": { "password": "edited" } });
        api.patch(&object.name_any(), &params, &Patch::Merge(data))
            .await?;
        api.patch(&object.name_any(), &params, &Patch::Merge(&edit))
            .await?;
    }
    let claims = world.of::<PersistentVolumeClaim>();
    for name in volumes {
        claims.patch(name, &params, &Patch::Merge(&edit)).await?;
    }
    world.change("cache", "{api: {replicas: 3}}").await?;
    world.until_ready("cache", "True", "Available").await?;
    for Found { api, object, .. } in &secrets {
        let now = api.get(&object.name_any()).await?;
        let password = &now.data["data"]["password"];
        ensure!(
            password == "ZWRpdGVk" && now.labels().contains_key("edited"),
            "{now:?}"
        );
    }
    for name in volumes {
        ensure!(
            claims.get(name).await?.labels().contains_key("edited"),
            "{name}"
        );
    }

    // Redis keeps nothing, and NATS reads its password at each start (docs/adr/0016-generated-passwords.md).
    for Found { api, object, .. } in &secrets {
        let (name, before) = (object.name_any(), object.uid());
        api.delete(&name, &DeleteParams::default()).await?;
        if name == "cache-postgres" {
            let message = world
                .until_ready("cache", "False", "CredentialsLost")
                .await?;
            ensure!(message.contains("data-cache-postgres-0"), "{message}");
            ensure!(api.get_opt(&name).await?.is_none());
            let mut again = object.clone();
            again.metadata = ObjectMeta {
                name: Some(name.clone()),
                labels: object.metadata.labels.clone(),
                owner_references: object.metadata.owner_references.clone(),
                ..ObjectMeta::default()
            };
            api.create(&PostParams::default(), &again).await?;
        } else {
            eventually(&format!("{name} is made anew"), || async {
                let now = api.get_opt(&name).await?.and_then(|object| object.uid());
                Ok(if now.is_some() && now != before {
                    Ok(())
                } else {
                    Err(format!("{now:?}"))
                })
            })
            .await?;
        }
        world.until_ready("cache", "True", "Available").await?;
    }
    // A volume that goes is for the controller of its StatefulSet to make.
    for name in volumes {
        let unprotected = json!({ "metadata": { "finalizers": null } });
        claims
            .patch(name, &params, &Patch::Merge(&unprotected))
            .await?;
        claims.delete(name, &DeleteParams::default()).await?;
    }
    world.change("cache", "{api: {replicas: 2}}").await?;
    world.until_ready("cache", "True", "Available").await?;
    let left = claims.list(&ListParams::default()).await?.items;
    ensure!(left.is_empty(), "{left:?}");
    world.finish().await
}

#[tokio::test]
async fn a_pass_over_what_nobody_touched_applies_nothing() -> Result<()> {
    let world = World::where_all_works().await?;
    world.create_fixed().await?;
    // The last echo of what was applied, and of what controllers then wrote, has made its pass.
    let patches = || {
        let mut own = world.requests()?;
        own.retain(|request| request.verb == "patch" && request.resource != "events");
        anyhow::Ok(own)
    };
    let mut before = patches()?.len();
    loop {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = patches()?.len();
        if now == before {
            break;
        }
        before = now;
    }
    let objects = world.objects("cache").await?;
    // Says what was meant anyway, so only the generation is another one, and the status that names it.
    world
        .change("cache", "{worker: {scaling: {minReplicas: 2}}}")
        .await?;
    world.until_ready("cache", "True", "Available").await?;
    // It is written down when it was answered, which is after anybody can see what it wrote.
    if world.shared.cluster.audit_log().is_some() {
        eventually("a pass was made", || async {
            let after = patches()?;
            let is_status = |request: &Request| request.resource == "birbnests";
            Ok(if after[before..].iter().any(is_status) {
                Ok(())
            } else {
                Err(format!("{:?}", &after[before..]))
            })
        })
        .await?;
    }
    let after = patches()?;
    let applied: Vec<_> = after[before..]
        .iter()
        .filter(|request| request.resource != "birbnests")
        .collect();
    assert!(applied.is_empty(), "{applied:#?}");
    assert_eq!(world.objects("cache").await?, objects);
    world.finish().await
}

/// What stands costs no request, so nothing but a pass that takes nothing for granted shows that applying it again is idle.
#[tokio::test]
async fn a_pass_that_applies_everything_again_changes_nothing() -> Result<()> {
    let shared = Shared::with_flags("again", &["--resync=15s"]).await?;
    let mut world = World::on(shared).await?;
    world.play(Kubelet::default());
    world.create_fixed().await?;
    let found = world.at_rest("cache").await?;
    let applied_again = async || {
        let since = Timestamp::now();
        eventually("everything was applied again", || async {
            let mut left: Vec<String> = found
                .iter()
                .filter(|found| is_put_back(&found.kind))
                .map(|found| format!("{}/{}?", found.api.resource_url(), found.object.name_any()))
                .collect();
            for request in world.requests()? {
                left.retain(|object| {
                    request.verb != "patch"
                        || request.received < since
                        || !request.uri.starts_with(object.as_str())
                });
            }
            Ok(left.is_empty().then_some(()).ok_or_else(|| left.join(" ")))
        })
        .await
    };
    applied_again().await?;
    let before = world.objects("cache").await?;
    applied_again().await?;
    assert_eq!(world.objects("cache").await?, before);
    world.finish().await
}
