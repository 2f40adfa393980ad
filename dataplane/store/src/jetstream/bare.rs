//! A connection to the server before its streams are known: what `setup` works with.

use std::{sync::Arc, time::Instant};

use async_nats::jetstream::{self, context::ContextBuilder, response::Response};
use birb_nest_core::{Base, Shard, Timestamp};
use serde::Deserialize;

use super::{connect, life::Life, rehydration, streams};
use crate::{
    clock::{Clock, Source},
    config::LogConfig,
    refusal::{OpenError, chain},
};

/// A connection to the server before its streams are known: what `setup` works with.
pub(crate) struct BareSession {
    config: Arc<LogConfig>,
    pub(super) server: String,
    pub(super) context: jetstream::Context,
    pub(super) dialed: connect::Dialed,
}

impl BareSession {
    pub(crate) async fn open(config: &Arc<LogConfig>) -> Result<Self, OpenError> {
        let dialed = connect::dial(config).await?;
        let context = ContextBuilder::new()
            .timeout(config.nats_publish_timeout)
            .max_ack_inflight(config.nats_max_inflight as usize)
            .backpressure_on_inflight(true)
            .build(dialed.client.clone());
        Ok(Self {
            config: config.clone(),
            server: connect::server_name(config),
            context,
            dialed,
        })
    }

    pub(super) async fn find(&self, shard: Shard) -> Result<Option<Life>, OpenError> {
        streams::find(&self.context, &self.config, shard, &self.server).await
    }

    /// The base of `shard`'s stream and whether it is fenced, if there is one.
    pub(crate) async fn life(&self, shard: Shard) -> Result<Option<(Base, bool)>, OpenError> {
        Ok(self
            .find(shard)
            .await?
            .map(|life| (life.base, life.is_fenced)))
    }

    /// Keeps every writer from the life of `shard` under `base`.
    pub(crate) async fn fence(&self, shard: Shard, base: Base) -> Result<(), OpenError> {
        streams::fence(&self.context, &self.config, shard, base)
            .await
            .map_err(|why| OpenError::unreachable(&self.server, why))
    }

    /// Makes `shard`'s stream for the life that begins at `base`.
    pub(crate) async fn create(&self, shard: Shard, base: Base) -> Result<(), OpenError> {
        streams::create(&self.context, &self.config, shard, base, &self.server).await
    }

    /// Has `clock` follow the server's, unless it knows a better one.
    pub(super) async fn tell_time(&self, clock: &Clock) -> Result<(), OpenError> {
        /// Of a stream's description, what async-nats leaves out.
        #[derive(Deserialize)]
        struct Stamped {
            #[serde(rename = "ts")]
            now: String,
        }
        let unreachable = |why| OpenError::unreachable(&self.server, why);
        let subject = format!(
            "STREAM.INFO.{}",
            streams::name(&self.config, Shard::from_index(0))
        );
        let asked = Instant::now();
        let stamped = match self.context.request(subject, &()).await {
            Ok(Response::Ok(Stamped { now })) => now,
            Ok(Response::Err { error }) => return Err(unreachable(error.to_string())),
            Err(error) => return Err(unreachable(chain(&error))),
        };
        let now = Timestamp::parse(&stamped)
            .ok_or_else(|| unreachable(format!("it says that it is {stamped}")))?;
        clock.learn(Source::Nats, now, asked);
        Ok(())
    }

    /// Makes the dead-letter stream.
    pub(crate) async fn prepare_dead_letters(&self) -> Result<(), OpenError> {
        streams::prepare_dead_letters(&self.context, &self.config, &self.server).await
    }

    /// Makes the queue of rehydration requests.
    pub(crate) async fn prepare_rehydration(&self) -> Result<(), OpenError> {
        rehydration::prepare(&self.context, &self.config, &self.server).await
    }

    /// Gives `shard`'s stream, which lives under `base`, the size and replicas that are configured now.
    pub(crate) async fn update(&self, shard: Shard, base: Base) -> Result<(), OpenError> {
        match self.find(shard).await? {
            Some(found) if found.base == base => {
                streams::update(&self.context, &self.config, shard, &found, &self.server).await
            }
            _ => Ok(()),
        }
    }

    /// The server's name for messages.
    pub(crate) fn server(&self) -> &str {
        &self.server
    }
}
