//! The `BirbNest` resource, `cache.birb.party/v1alpha1`.
//!
//! The comments on fields are what `kubectl explain` shows. A schema default stands in the stored object for ever, so
//! members of a union (`managed`/`external`) have none; [`crate::resolve`] decides what an absent one means.

mod birb_nest;
mod condition;
mod servers;
mod status;

pub use birb_nest::{
    ApiSpec, BatchSpec, BirbNest, BirbNestSpec, CacheSpec, DeletionPolicy, ImageSpec, LogFormat,
    ObservabilitySpec, PullPolicy, ScalingMode, ScalingSpec, ServiceSpec, ServiceType, WorkerSpec,
};
pub use condition::{ConditionType, Reason};
pub use servers::{
    ExternalNats, ExternalPostgres, ExternalRedis, ManagedNats, ManagedPostgres, ManagedRedis,
    NatsSpec, NatsTls, PostgresSpec, PostgresTls, RedisSpec, SecretKey,
};
pub use status::{
    ApiStatus, BirbNestStatus, MigrationState, MigrationStatus, Placement, ResolvedStatus,
    WorkerStatus,
};

#[cfg(test)]
mod tests;
