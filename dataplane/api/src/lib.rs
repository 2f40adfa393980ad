//! The REST API: requests become use cases of [`birb_nest_store::Nest`], and answers become documents.
//!
//! [`router`] is the whole URL table; one file per resource holds its handlers; [`error`] is every error a client can
//! get; [`envelope`] is what happens to each request before and after its handler. docs/API.md is the contract.

pub mod config;

mod access;
mod batch;
mod body;
mod dead_letters;
mod debug;
mod durability;
mod entries;
mod envelope;
mod error;
mod extract;
mod health;
mod list;
mod metrics;
mod openapi;
mod rate;
mod raw;
mod rehydrate;
mod room;
mod router;
mod schemas;
mod server;
mod state;
mod tls;

pub use self::{config::ApiConfig, server::run};
