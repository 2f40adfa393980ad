//! The data plane on real servers: each module attacks one of its promises.
//!
//! Tests share one stack of servers and have names of their own on each; those that stop a server have a stack of
//! their own. docs/TESTING.md says how to run one.
#![expect(clippy::unwrap_used, reason = "in a test a failure is to be loud")]

mod access;
mod bad_input;
mod batches;
mod bytes_exact;
mod clocks;
mod conditions;
mod contention;
mod contract;
mod crashes;
mod dead_letters;
mod degraded;
mod durability;
mod expiry;
mod faults;
mod fences;
mod forgetful_log;
mod fresh_reads;
mod held;
mod http2;
mod instruments;
mod late_writers;
mod letters;
mod limits;
mod looks;
mod lost_tail;
mod next_life;
mod order;
mod prefixes;
mod projections;
mod raw;
mod recovery;
mod redis_troubles;
mod redis_waits;
mod refusals;
mod rehydration;
mod rehydration_bounds;
mod replicas;
mod reshard;
mod reshard_troubles;
mod restore;
mod sessions;
mod setup;
mod shown;
mod standby;
mod streams;
mod swallowed;
mod tls;
mod unwitnessed;
mod whole_table;
mod workers;
mod world;
