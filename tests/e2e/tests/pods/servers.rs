//! Servers of this machine, for nests of the node that are told to use them.

use std::net::IpAddr;

use anyhow::{Context, Result};
use birb_nest_stack::{NatsOptions, Options, RedisOptions, Stack};
use serde_json::{Value, json};

use crate::world::World;

/// A Redis, a NATS and a PostgreSQL that somebody else runs, each with a login.
pub struct Servers {
    pub stack: Stack,
    /// Where pods find them.
    pub host: IpAddr,
}

impl Servers {
    /// Starts them; `None` where pods do not reach this machine.
    pub async fn start(world: &World) -> Result<Option<Self>> {
        let Some(host) = world.cluster.host_address() else {
            eprintln!(
                "not checked: pods of the given cluster do not reach servers of this machine"
            );
            return Ok(None);
        };
        let options = Options {
            redis: RedisOptions {
                password: Some("redis-password".to_owned()),
                ..RedisOptions::default()
            },
            nats: NatsOptions {
                login: Some(("nest".to_owned(), "nats-password".to_owned())),
                ..NatsOptions::default()
            },
            ..Options::default()
        };
        let stack = Stack::fresh_with(options).await?;
        Ok(Some(Self { stack, host }))
    }

    /// A Secret with their addresses and passwords, that of PostgreSQL being `postgres_password`.
    pub fn secret(&self, postgres_password: &str) -> Value {
        let Self { host, stack } = self;
        let (redis, postgres) = (stack.redis.port(), stack.postgres.port());
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "servers" }, "stringData": {
            "redis": format!("redis://:redis-password@{host}:{redis}/0"),
            "nats": "nats-password",
            "postgres": format!("postgres://birb:{postgres_password}@{host}:{postgres}/birb_nest"),
        } })
    }

    /// A nest on them.
    pub fn spec(&self) -> Value {
        json!({
            "redis": { "external": { "urlSecretRef": { "name": "servers", "key": "redis" } } },
            "nats": { "external": {
                "url": self.nats_url(self.stack.nats.port()),
                "user": "nest",
                "passwordSecretRef": { "name": "servers", "key": "nats" },
            } },
            "postgres": { "external": { "urlSecretRef": { "name": "servers", "key": "postgres" } } },
        })
    }

    /// Address of a NATS server of this machine, for pods.
    pub fn nats_url(&self, port: u16) -> String {
        format!("nats://{}:{port}", self.host)
    }

    /// The one column of the rows of `sql`.
    pub async fn psql(&self, sql: &str) -> Result<String> {
        let found = self.stack.psql("birb_nest", sql).await;
        found.context("the nest's PostgreSQL cannot be asked")
    }
}
