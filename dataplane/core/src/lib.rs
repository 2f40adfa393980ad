//! The pure semantics of birb-nest: what a key, an entry and a version are, which of two entries wins, when an entry
//! is gone, how a batch coalesces.
//!
//! **Invariant:** nothing here does I/O, reads a clock or draws a random number: time and randomness are arguments.
//! Its Cargo.toml proves it.
//!
//! Reading order: [`key`], [`version`], [`entry`], [`document`], [`precondition`], [`range`],
//! [`shard`], [`batch`], [`backoff`], [`warning`].

pub mod backoff;
pub mod batch;
pub mod document;
pub mod entry;
pub mod key;
pub mod precondition;
pub mod range;
pub mod shard;
pub mod time;
pub mod version;
pub mod warning;

pub use backoff::Backoff;
pub use batch::{Batch, BatchLimits, Coalescer};
pub use document::Document;
pub use entry::{Content, Entry, State};
pub use key::{Key, KeyError};
pub use precondition::Precondition;
pub use range::{Place, Range};
pub use shard::{Shard, ShardCount};
pub use time::Timestamp;
pub use version::{Base, Version};
pub use warning::Warning;
