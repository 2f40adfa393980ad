//! The operator of birb-nest: reconciles `BirbNest` resources into running nests.
//!
//! ```text
//! BirbNest --resolve--> Nest --render--> objects --apply--> API server
//!                                                              |
//!    status <--------------- conditions <------- observe ------+
//! ```
//! [`mod@resolve`], [`render`], [`observe`] and [`status`] are pure; [`mod@pass`] is the order in which they are used, and
//! [`controller`] says when.

pub mod admin;
pub mod api;
pub mod apply;
mod backoff;
pub mod config;
pub mod context;
pub mod controller;
mod credentials;
pub mod error;
pub mod findings;
pub mod leader;
mod memo;
pub mod metrics;
mod monitoring;
pub mod observe;
pub mod owned;
pub mod pass;
mod pod_templates;
mod prune;
mod quantity;
mod readers;
pub mod render;
mod replicas;
mod report;
pub mod resolve;
mod retention;
pub mod scaling;
pub mod status;
mod suspend;
pub mod telemetry;
#[cfg(test)]
mod testing;
mod united;
pub mod upgrades;
mod verdict;
mod watches;
