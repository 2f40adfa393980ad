//! What a spec means: every default in one place, no I/O.

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity,
};
use kube::ResourceExt;
use serde_json::Value;

use crate::{
    api::{
        AutoscalingSpec, BatchSpec, BirbNest, CacheSpec, DeletionPolicy, ExternalNats,
        ExternalPostgres, ExternalRedis, IngressSpec, LogFormat, Placement, PrometheusRuleSpec,
        PullPolicy, RateLimitSpec, ResolvedStatus, ScalingMode, ScalingSpec, SecretKey,
        ServiceMonitorSpec, ServiceSpec,
    },
    config::Images,
    quantity,
    scaling::decide::Policy,
};

/// A nest with nothing left open.
#[derive(Clone, Debug)]
pub struct Nest {
    /// Its name; what belongs to it is called `<name>-<something>`.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its uid.
    pub uid: String,
    /// Release of the data plane.
    pub version: String,
    /// The data plane's image, with its tag.
    pub image: String,
    /// When kubelets pull that image.
    pub pull_policy: Option<PullPolicy>,
    /// Names of Secrets to pull images with.
    pub pull_secrets: Vec<String>,
    /// What stays when it is deleted.
    pub deletion_policy: DeletionPolicy,
    /// Whether it is asleep, or to be put to sleep.
    pub is_suspended: bool,
    /// Changes when its pods are to be replaced without another cause.
    pub restart: Option<String>,
    /// How many API replicas.
    pub api_replicas: ApiReplicas,
    /// What an API replica may use.
    pub api_resources: ResourceRequirements,
    /// The Service in front of the API.
    pub service: ServiceSpec,
    /// A way to it from outside.
    pub ingress: Option<IngressSpec>,
    /// The keys of the API's clients.
    pub api_keys: Option<SecretKey>,
    /// How much one client may ask of an API replica.
    pub rate_limit: Option<RateLimitSpec>,
    /// What else the API's pods should be like.
    pub api_pod: Option<Value>,
    /// What else the workers' pods should be like.
    pub worker_pod: Option<Value>,
    /// How many workers.
    pub scaling: Scaling,
    /// What a worker may use.
    pub worker_resources: ResourceRequirements,
    /// What is stored in one transaction.
    pub batch: BatchSpec,
    /// Limits of what is cached.
    pub cache: CacheSpec,
    /// Shards of the log.
    pub shards: i32,
    /// Redis.
    pub redis: Server<RedisServer, ExternalRedis>,
    /// NATS.
    pub nats: Server<NatsServer, ExternalNats>,
    /// PostgreSQL.
    pub postgres: Server<PostgresServer, ExternalPostgres>,
    /// Least important log lines.
    pub log_level: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// How metrics are collected, if they are.
    pub service_monitor: Option<ServiceMonitorSpec>,
    /// What is worth an alert, if that is told.
    pub prometheus_rule: Option<PrometheusRuleSpec>,
    /// Whether who may talk to its managed servers is restricted.
    pub has_network_policies: bool,
}

/// How many API replicas there are.
#[derive(Clone, Debug, PartialEq)]
pub enum ApiReplicas {
    /// So many.
    Fixed(i32),
    /// As a HorizontalPodAutoscaler says.
    Autoscaled(AutoscalingSpec),
}

/// A server of the nest's own, or somebody else's.
#[derive(Clone, Debug)]
pub enum Server<M, E> {
    /// The operator runs it.
    Managed(M),
    /// It is there already.
    External(E),
}

impl<M, E> Server<M, E> {
    /// What a managed one is like.
    pub fn managed(&self) -> Option<&M> {
        match self {
            Self::Managed(server) => Some(server),
            Self::External(_) => None,
        }
    }

    fn placement(&self) -> Placement {
        match self {
            Self::Managed(_) => Placement::Managed,
            Self::External(_) => Placement::External,
        }
    }
}

/// How many workers there are.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// So many.
    Fixed(i32),
    /// As the log's backlog asks for.
    Lag {
        /// Within what, and how.
        policy: Policy,
        /// How often the backlog is read.
        poll: Duration,
    },
    /// Something else decides.
    External,
}

/// A managed Redis.
#[derive(Clone, Debug)]
pub struct RedisServer {
    /// Its image.
    pub image: String,
    /// What it may use.
    pub resources: ResourceRequirements,
    /// Bytes that entries may take.
    pub max_memory: u64,
}

/// A managed NATS server.
#[derive(Clone, Debug)]
pub struct NatsServer {
    /// Its image.
    pub image: String,
    /// Its volume.
    pub volume: Volume,
    /// `always` or a time.
    pub sync_interval: String,
    /// What it may use.
    pub resources: ResourceRequirements,
    /// Bytes that JetStream may take of the volume.
    pub max_file: u64,
    /// Bytes of each shard's stream.
    pub stream_bytes: u64,
}

/// A managed PostgreSQL.
#[derive(Clone, Debug)]
pub struct PostgresServer {
    /// Its image.
    pub image: String,
    /// Its volume.
    pub volume: Volume,
    /// What it may use.
    pub resources: ResourceRequirements,
}

/// A volume of a managed server.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its size, as Kubernetes writes it.
    pub size: String,
    /// Its storage class; none for the cluster's default.
    pub class: Option<String>,
}

/// Annotation of a nest, and then of its pods: another value has them replaced.
pub const RESTART_ANNOTATION: &str = "cache.birb.party/restart";

/// Streams beside the shards': dead letters (64 MiB) and rehydration, with room to spare.
const OTHER_STREAMS: u64 = 256 << 20;

/// Settles everything that the spec of `nest` leaves open. Pure.
///
/// # Panics
/// If `nest` has no namespace or uid: it did not come from an API server.
pub fn resolve(nest: &BirbNest, images: &Images, release: &str) -> Nest {
    let spec = &nest.spec;
    let image = spec.image.clone().unwrap_or_default();
    let version = spec.version.clone().unwrap_or_else(|| release.to_owned());
    let tag = image.tag.as_ref().unwrap_or(&version);
    let repository = image.repository.as_ref().unwrap_or(&images.data_plane);
    Nest {
        name: nest.name_any(),
        namespace: nest.namespace().expect("a nest lives in a namespace"),
        uid: nest.uid().expect("a stored object has a uid"),
        image: format!("{repository}:{tag}"),
        version,
        pull_policy: image.pull_policy,
        pull_secrets: image.pull_secrets,
        deletion_policy: spec.deletion_policy,
        is_suspended: spec.suspend,
        restart: nest.annotations().get(RESTART_ANNOTATION).cloned(),
        api_replicas: match &spec.api.autoscaling {
            Some(bounds) => ApiReplicas::Autoscaled(bounds.clone()),
            None => ApiReplicas::Fixed(spec.api.replicas.unwrap_or(2)),
        },
        api_resources: resources(spec.api.resources.as_ref(), "100m", "128Mi", "512Mi"),
        service: spec.api.service.clone(),
        ingress: spec.api.ingress.clone(),
        api_keys: spec
            .api
            .auth
            .as_ref()
            .map(|auth| auth.keys_secret_ref.clone()),
        rate_limit: spec.api.rate_limit.clone(),
        api_pod: spec.api.pod_template.clone(),
        worker_pod: spec.worker.pod_template.clone(),
        scaling: scaling(&spec.worker.scaling, spec.nats.shards),
        worker_resources: resources(spec.worker.resources.as_ref(), "100m", "256Mi", "512Mi"),
        batch: spec.worker.batch.clone(),
        cache: spec.cache.clone(),
        shards: spec.nats.shards,
        redis: match &spec.redis.external {
            Some(external) => Server::External(external.clone()),
            None => Server::Managed(redis(nest, images)),
        },
        nats: match &spec.nats.external {
            Some(external) => Server::External(external.clone()),
            None => Server::Managed(nats(nest, images)),
        },
        postgres: match &spec.postgres.external {
            Some(external) => Server::External(external.clone()),
            None => Server::Managed(postgres(nest, images)),
        },
        log_level: spec
            .observability
            .log_level
            .clone()
            .unwrap_or_else(|| "info".to_owned()),
        log_format: spec.observability.log_format.unwrap_or_default(),
        service_monitor: Some(spec.observability.service_monitor.clone()).filter(|it| it.enabled),
        prometheus_rule: Some(spec.observability.prometheus_rule.clone()).filter(|it| it.enabled),
        has_network_policies: spec.network_policy.enabled,
    }
}

impl Nest {
    /// What `status.resolved` shows.
    pub fn summary(&self) -> ResolvedStatus {
        ResolvedStatus {
            image: self.image.clone(),
            version: Some(self.version.clone()),
            redis: self.redis.placement(),
            nats: self.nats.placement(),
            postgres: self.postgres.placement(),
        }
    }
}

fn scaling(spec: &ScalingSpec, shards: i32) -> Scaling {
    let time = |given: &Option<String>, default| {
        given
            .as_deref()
            .map_or(Duration::from_secs(default), |text| {
                // The schema admits nothing else; one odd nest must not end the operator for all.
                humantime::parse_duration(text).unwrap_or(Duration::from_secs(default))
            })
    };
    match spec.mode.unwrap_or_default() {
        ScalingMode::Fixed => Scaling::Fixed(spec.replicas),
        ScalingMode::External => Scaling::External,
        ScalingMode::Lag => Scaling::Lag {
            policy: Policy {
                min: spec.min_replicas,
                max: spec.max_replicas,
                shards,
                target_lag: spec.target_lag.unwrap_or(5_000),
                drain: Duration::from_secs(spec.drain_seconds.map_or(30, i32::unsigned_abs).into()),
                activation_lag: spec.activation_lag.unwrap_or(0),
                window: time(&spec.scale_down_window, 300),
                cooldown: time(&spec.cooldown, 60),
            },
            poll: time(&spec.poll_interval, 10),
        },
    }
}

fn redis(nest: &BirbNest, images: &Images) -> RedisServer {
    let spec = nest.spec.redis.managed.clone().unwrap_or_default();
    let memory = spec.memory.unwrap_or_else(|| "512Mi".to_owned());
    let mut resources = resources(spec.resources.as_ref(), "100m", &memory, &memory);
    for list in [&mut resources.requests, &mut resources.limits] {
        list.get_or_insert_default()
            .insert("memory".to_owned(), Quantity(memory.clone()));
    }
    RedisServer {
        image: spec.image.unwrap_or_else(|| images.redis.clone()),
        resources,
        // The rest is for connections, buffers and fragmentation.
        max_memory: quantity::bytes(&memory) / 4 * 3,
    }
}

fn nats(nest: &BirbNest, images: &Images) -> NatsServer {
    let spec = nest.spec.nats.managed.clone().unwrap_or_default();
    let size = spec.storage.unwrap_or_else(|| "8Gi".to_owned());
    // File systems and JetStream's own bookkeeping take some of a volume.
    let max_file = quantity::bytes(&size) / 10 * 9;
    let shards = u64::try_from(nest.spec.nats.shards).unwrap_or(1).max(1);
    let mebibytes = (max_file.saturating_sub(OTHER_STREAMS) / shards) >> 20;
    NatsServer {
        image: spec.image.unwrap_or_else(|| images.nats.clone()),
        volume: Volume {
            size,
            class: spec.storage_class_name,
        },
        sync_interval: spec.sync_interval.unwrap_or_else(|| "always".to_owned()),
        resources: resources(spec.resources.as_ref(), "200m", "512Mi", "1Gi"),
        max_file,
        stream_bytes: mebibytes << 20,
    }
}

fn postgres(nest: &BirbNest, images: &Images) -> PostgresServer {
    let spec = nest.spec.postgres.managed.clone().unwrap_or_default();
    PostgresServer {
        image: spec.image.unwrap_or_else(|| images.postgres.clone()),
        volume: Volume {
            size: spec.storage.unwrap_or_else(|| "10Gi".to_owned()),
            class: spec.storage_class_name,
        },
        resources: resources(spec.resources.as_ref(), "200m", "512Mi", "1Gi"),
    }
}

/// What the spec says, or else some processor time and memory with a limit on memory alone: a limit on processor time
/// throttles where nobody else wants it.
fn resources(
    given: Option<&ResourceRequirements>,
    cpu: &str,
    memory: &str,
    memory_limit: &str,
) -> ResourceRequirements {
    given.cloned().unwrap_or_else(|| ResourceRequirements {
        requests: Some(
            [
                ("cpu".to_owned(), Quantity(cpu.to_owned())),
                ("memory".to_owned(), Quantity(memory.to_owned())),
            ]
            .into(),
        ),
        limits: Some([("memory".to_owned(), Quantity(memory_limit.to_owned()))].into()),
        claims: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn an_empty_spec_is_all_managed() {
        let nest = testing::nest("{}");
        let summary = nest.summary();
        assert_eq!(summary.image, "ghcr.io/birbparty/birb-nest:1.2.3");
        assert_eq!(
            [summary.redis, summary.nats, summary.postgres],
            [Placement::Managed; 3]
        );
        assert_eq!(nest.api_replicas, ApiReplicas::Fixed(2));
        let Scaling::Lag { policy, poll } = &nest.scaling else {
            panic!("{:?}", nest.scaling);
        };
        assert_eq!((policy.min, policy.max, policy.shards), (1, 5, 8));
        assert_eq!(policy.window, Duration::from_secs(300));
        assert_eq!(*poll, Duration::from_secs(10));
        let nats = nest.nats.managed().unwrap();
        assert_eq!(nats.sync_interval, "always");
        assert!(nats.stream_bytes * 8 + OTHER_STREAMS <= nats.max_file);
    }

    #[test]
    fn external_servers_replace_managed_ones() {
        let nest = testing::nest(testing::EXTERNAL);
        assert!(nest.redis.managed().is_none());
        assert!(nest.nats.managed().is_none());
        assert!(nest.postgres.managed().is_none());
    }

    #[test]
    fn another_scaler_gets_the_replicas() {
        let nest = testing::nest("{worker: {scaling: {mode: External, replicas: 7}}}");
        assert_eq!(nest.scaling, Scaling::External);
    }

    #[test]
    fn autoscaling_wins_over_replicas() {
        let nest = testing::nest("{api: {replicas: 7, autoscaling: {maxReplicas: 9}}}");
        let ApiReplicas::Autoscaled(bounds) = nest.api_replicas else {
            panic!("{:?}", nest.api_replicas);
        };
        assert_eq!(
            (
                bounds.min_replicas,
                bounds.max_replicas,
                bounds.target_cpu_utilization
            ),
            (2, 9, 80)
        );
    }

    #[test]
    fn the_smallest_log_still_fits_its_volume() {
        let nest = testing::nest("{nats: {shards: 64, managed: {storage: 1Gi}}}");
        let nats = nest.nats.managed().unwrap();
        assert!(nats.stream_bytes >= 8 << 20, "{nats:?}");
        assert!(nats.stream_bytes * 64 + OTHER_STREAMS <= nats.max_file);
    }

    #[test]
    fn redis_memory_wins_over_resources() {
        let nest = testing::nest(
            "{redis: {managed: {memory: 1Gi, resources: {limits: {cpu: '1', memory: 5Gi}}}}}",
        );
        let redis = nest.redis.managed().unwrap();
        let limits = redis.resources.limits.as_ref().unwrap();
        assert_eq!(limits["memory"].0, "1Gi");
        assert_eq!(limits["cpu"].0, "1");
        assert_eq!(redis.max_memory, 768 << 20);
    }
}
