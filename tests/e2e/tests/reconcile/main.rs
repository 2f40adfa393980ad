//! The API-server ring: a real API server, the real operator with the rights of its ServiceAccount, and tests that play
//! the kubelet by writing what controllers and nodes would.

mod conflicts;
mod connections;
mod credentials;
mod deletion;
mod drift;
mod edits;
mod examples;
mod exposed;
mod failures;
mod kubelet;
mod leaders;
mod links;
mod log;
mod modes;
mod monitoring;
mod namespaces;
mod orphans;
mod pod_templates;
mod policies;
mod refusals;
mod replicas;
mod replicated_log;
mod rest;
mod rollout;
mod scaling;
mod schema;
mod servers;
mod sleep;
mod traces;
mod upgrades;
mod watching;
mod world;
