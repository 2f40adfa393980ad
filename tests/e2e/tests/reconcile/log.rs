//! The log of a nest whose workers do not run here.

use anyhow::Result;
use async_nats::{
    Client,
    jetstream::{
        self,
        consumer::{AckPolicy, pull},
        stream,
    },
};
use birb_nest_e2e::eventually;
use birb_nest_stack::Stack;
use serde_json::{Value, json};

/// Shards of the nests here.
const SHARDS: u64 = 8;

/// The log of a nest, as setup and workers would have made it.
#[derive(Clone)]
pub struct Log {
    jetstream: jetstream::Context,
    prefix: String,
}

impl Log {
    /// Streams and consumers of the nest with this prefix.
    pub async fn new(stack: &Stack, prefix: &str) -> Result<Self> {
        Self::replicated(stack, prefix, 1).await
    }

    /// The same on so many servers each.
    pub async fn replicated(stack: &Stack, prefix: &str, n_replicas: usize) -> Result<Self> {
        let address = format!("nats://127.0.0.1:{}", stack.nats.port());
        Self::made_by(async_nats::connect(address).await?, prefix, n_replicas).await
    }

    /// The same by a client that the servers have let in.
    pub async fn made_by(client: Client, prefix: &str, n_replicas: usize) -> Result<Self> {
        let log = Self {
            jetstream: jetstream::new(client),
            prefix: prefix.to_owned(),
        };
        for shard in 0..SHARDS {
            let config = stream::Config {
                name: log.stream(shard),
                subjects: vec![format!("{prefix}.{shard}.>")],
                max_bytes: 8 << 20,
                max_messages_per_subject: 1,
                num_replicas: n_replicas,
                ..stream::Config::default()
            };
            // Servers that were just started have yet to choose who leads them.
            eventually("the stream is made", || async {
                let made = log.jetstream.create_stream(config.clone()).await;
                Ok(made.map(drop).map_err(|error| error.to_string()))
            })
            .await?;
            let stream = log.jetstream.get_stream(log.stream(shard)).await?;
            stream
                .create_consumer(pull::Config {
                    durable_name: Some("birb-worker".to_owned()),
                    ack_policy: AckPolicy::All,
                    ..pull::Config::default()
                })
                .await?;
        }
        Ok(log)
    }

    fn stream(&self, shard: u64) -> String {
        format!("BIRB_{}_{shard}", self.prefix)
    }

    /// Writes `n` keys, spread over the shards.
    pub async fn write(&self, n: u64) -> Result<()> {
        self.write_from(0, n).await
    }

    /// Writes `n` keys, the first of which is number `first`.
    pub async fn write_from(&self, first: u64, n: u64) -> Result<()> {
        let mut acks = Vec::new();
        for key in first..first + n {
            let subject = format!("{}.{}.{key}", self.prefix, key % SHARDS);
            acks.push(self.jetstream.publish(subject, "value".into()).await?);
        }
        for ack in acks {
            ack.await?;
        }
        Ok(())
    }

    /// The consumers of all shards.
    pub async fn consumers(&self) -> Result<Vec<jetstream::consumer::PullConsumer>> {
        let mut all = Vec::new();
        for shard in 0..SHARDS {
            let stream = self.jetstream.get_stream(self.stream(shard)).await?;
            let consumer = stream.get_consumer("birb-worker").await;
            all.push(consumer.map_err(anyhow::Error::from_boxed)?);
        }
        Ok(all)
    }

    /// Who leads the consumer of a shard, if somebody does.
    pub async fn leader(&self, shard: u64) -> Result<Option<String>> {
        let stream = self
            .jetstream
            .get_stream_no_info(self.stream(shard))
            .await?;
        let info = stream.consumer_info("birb-worker").await;
        let cluster = info.ok().and_then(|info| info.cluster);
        Ok(cluster.and_then(|cluster| cluster.leader))
    }

    /// Asks whoever leads the consumer of a shard to let another one lead.
    pub async fn step_down(&self, shard: u64) -> Result<()> {
        let subject = format!(
            "CONSUMER.LEADER.STEPDOWN.{}.birb-worker",
            self.stream(shard)
        );
        let _: Value = self.jetstream.request(subject, &json!({})).await?;
        Ok(())
    }

    /// The consumer of a shard is gone, as an administrator of NATS can do it.
    pub async fn lose_consumer(&self, shard: u64) -> Result<()> {
        let stream = self.jetstream.get_stream(self.stream(shard)).await?;
        stream.delete_consumer("birb-worker").await?;
        Ok(())
    }

    /// Nothing waits any more.
    pub async fn drain(&self) -> Result<()> {
        for shard in 0..SHARDS {
            self.jetstream
                .get_stream(self.stream(shard))
                .await?
                .purge()
                .await?;
        }
        Ok(())
    }
}
