//! A connection to the server before its streams are known: what `setup` works with.

use std::{sync::Arc, time::Instant};

use async_nats::jetstream::{self, context::ContextBuilder, response::Response};
use birb_nest_core::{Base, Shard, ShardCount, Timestamp, Version};
use serde::Deserialize;

use super::{
    connect,
    life::{Gate, Life},
    rehydration, streams,
};
use crate::{
    clock::{Clock, Source},
    config::LogConfig,
    refusal::{OpenError, chain},
};

/// A shard's stream at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// The base of its life.
    pub base: Base,
    /// Whether it takes writes.
    pub gate: Gate,
    /// How many messages it holds.
    pub n_messages: u64,
    /// The sequence of the newest message that it ever held; 0 if none.
    pub last_sequence: u64,
}

impl Look {
    /// The version of that message.
    pub fn end(&self) -> Version {
        self.base
            .version(self.last_sequence)
            .unwrap_or(Version::MAX)
    }
}
/// A connection to the server before its streams are known: what `setup` works with.
#[derive(Clone)]
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

    /// The same connection, to a log of another number of shards.
    pub(crate) fn with_shards(&self, shards: ShardCount) -> Self {
        let mut config = LogConfig::clone(&self.config);
        config.nats_shards = shards;
        Self {
            config: Arc::new(config),
            ..self.clone()
        }
    }

    /// `shard`'s stream as it is now, if there is one.
    pub(crate) async fn look(&self, shard: Shard) -> Result<Option<Look>, OpenError> {
        let Some(life) = self.find(shard).await? else {
            return Ok(None);
        };
        let state = &life.stream.cached_info().state;
        Ok(Some(Look {
            base: life.base,
            gate: life.gate,
            n_messages: state.messages,
            last_sequence: state.last_sequence,
        }))
    }

    /// Lets writers into the life of `shard` under `base`, or keeps them out.
    pub(crate) async fn set_gate(
        &self,
        shard: Shard,
        base: Base,
        gate: Gate,
    ) -> Result<(), OpenError> {
        streams::set_gate(&self.context, &self.config, shard, base, gate)
            .await
            .map_err(|why| OpenError::unreachable(&self.server, why))
    }

    /// Makes `shard`'s stream for the life that begins at `base`.
    pub(crate) async fn create(
        &self,
        shard: Shard,
        base: Base,
        gate: Gate,
    ) -> Result<(), OpenError> {
        let (context, config) = (&self.context, &self.config);
        streams::create(context, config, shard, base, gate, &self.server).await
    }

    /// Drops the messages of `shard` up to and with this sequence.
    pub(crate) async fn purge(&self, shard: Shard, through: u64) -> Result<(), OpenError> {
        let Some(life) = self.find(shard).await? else {
            return Ok(());
        };
        let purging = life.purge(through).await;
        purging.map_err(|error| OpenError::unreachable(&self.server, error.to_string()))
    }

    /// Deletes `shard`'s stream with all that is in it.
    pub(crate) async fn delete(&self, shard: Shard) -> Result<(), OpenError> {
        let name = streams::name(&self.config, shard);
        match self.context.delete_stream(&name).await {
            Ok(_) => Ok(()),
            Err(error) => Err(OpenError::unreachable(
                &self.server,
                format!("failed to delete stream {name}: {}", chain(&error)),
            )),
        }
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
