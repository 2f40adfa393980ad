//! The `BirbNest` resource, `cache.birb.party/v1alpha1`.
//!
//! The comments on fields are what `kubectl explain` shows. A schema default stands in the stored object for ever, so
//! members of a union (`managed`/`external`) have none; [`crate::resolve`] decides what an absent one means.

mod birb_nest;
mod condition;
mod observability;
mod rest;
mod servers;
mod status;

pub use birb_nest::{
    BatchSpec, BirbNest, BirbNestSpec, CacheSpec, DeletionPolicy, ImageSpec, NetworkPolicySpec,
    PullPolicy, ScalingMode, ScalingSpec, WorkerSpec,
};
pub use condition::{ConditionType, Reason};
pub use observability::{LogFormat, ObservabilitySpec, PrometheusRuleSpec, ServiceMonitorSpec};
pub use rest::{
    ApiSpec, AuthSpec, AutoscalingSpec, IngressSpec, RateLimitSpec, ServiceSpec, ServiceType,
};
pub use servers::{
    ExternalNats, ExternalPostgres, ExternalRedis, ManagedNats, ManagedPostgres, ManagedRedis,
    NatsSpec, PostgresSpec, RedisSpec, SecretKey, ServerTls,
};
pub use status::{
    ApiStatus, BirbNestStatus, MigrationState, MigrationStatus, Placement, ResolvedStatus,
    Suspension, SuspensionStage, WorkerStatus,
};

#[cfg(test)]
mod tests;
