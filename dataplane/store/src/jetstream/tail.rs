//! Reading one shard's stream in order, as its owner.
//!
//! The durable consumer exists so that everybody can see the lag; where to read from PostgreSQL says alone. So an owner makes the consumer anew at that place, and from then on its deliveries must be numbered 1, 2,
//! 3 ..., each for the first time. Anything else means that a former owner still fetches from the consumer of this
//! name, and acknowledging everything up to a message would lose what that one took.

use std::{sync::Arc, time::Duration};

use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
};
use birb_nest_core::{Base, Entry, Key, Shard, Timestamp, Version};
use futures::StreamExt;

use super::{Session, life::Life, record::Record, streams};
use crate::refusal::chain;

/// A place in a shard's stream, exclusive as long as its reader owns the shard.
pub struct Tail {
    session: Arc<Session>,
    shard: Shard,
    life: Arc<Life>,
    messages: pull::Stream,
    n_delivered: u64,
}

/// One message, in stream order.
pub struct TailMessage {
    /// base + sequence.
    pub version: Version,
    /// What to store; `None` for a pin.
    pub entry: Option<(Key, Entry)>,
    /// When the server stored it, by its clock.
    pub stored_at: Timestamp,
    /// Messages behind this one that the consumer has not delivered yet.
    pub n_pending: u64,
    ack: jetstream::message::Acker,
}

/// Why reading a shard stopped; after any of these the tail is made anew from `applied_to`.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// The connection is lost, or the server does not answer.
    #[error("log of shard {shard} cannot be read: {why}")]
    Unreachable {
        /// The shard.
        shard: Shard,
        /// What happened.
        why: String,
    },
    /// Somebody else fetches from the consumer, or it was made anew.
    #[error(
        "consumer of shard {shard} delivered number {found} where {expected} was due: another reader uses it"
    )]
    Gap {
        /// The shard.
        shard: Shard,
        /// Consumer sequence that was due.
        expected: u64,
        /// Consumer sequence that came.
        found: u64,
    },
    /// A message that this release cannot read; it stays in the log, and the shard waits.
    #[error("message {sequence} of shard {shard} is held: {why}")]
    Unreadable {
        /// The shard.
        shard: Shard,
        /// Stream sequence of the message.
        sequence: u64,
        /// What is wrong with it.
        why: String,
    },
}

impl Tail {
    /// Makes the shard's durable consumer anew, directly behind `behind`, and reads from there.
    pub(super) async fn open(
        session: Arc<Session>,
        shard: Shard,
        behind: Version,
        n_prefetch: usize,
        max_bytes: usize,
    ) -> Result<Self, TailError> {
        let unreachable = |why: String| TailError::Unreachable { shard, why };
        let life = session.lives.of(shard);
        let consumer_name = session.config.nats_consumer_name.as_str();
        let from = life.base.sequence(behind) + 1;
        // There may be no consumer of this name. What the former one had acknowledged says nothing: overwriting a message in
        // flight acknowledges all before it.
        let _ = life.stream.delete_consumer(consumer_name).await;
        let consumer: PullConsumer = life
            .stream
            .create_consumer_strict(pull::Config {
                durable_name: Some(consumer_name.to_owned()),
                description: Some("birb-nest: messages not yet in PostgreSQL".to_owned()),
                deliver_policy: DeliverPolicy::ByStartSequence {
                    start_sequence: from,
                },
                ack_policy: AckPolicy::All,
                // Redelivery is never wanted: whoever lost a message opens a tail anew.
                ack_wait: Duration::from_secs(3600),
                max_ack_pending: -1,
                max_deliver: -1,
                ..pull::Config::default()
            })
            .await
            .map_err(|error| {
                unreachable(format!(
                    "failed to make consumer {consumer_name}: {}",
                    chain(&error)
                ))
            })?;
        let messages = consumer
            .stream()
            .max_messages_per_batch(n_prefetch)
            .max_bytes_per_batch(max_bytes.max(2 * session.max_payload))
            .expires(Duration::from_secs(30))
            .heartbeat(Duration::from_secs(5))
            .messages()
            .await
            .map_err(|error| unreachable(chain(&error)))?;
        Ok(Self {
            life,
            session,
            shard,
            messages,
            n_delivered: 0,
        })
    }

    /// The next message; waits for one as long as it takes.
    ///
    /// # Errors
    /// [`TailError`], after which the tail is of no use.
    ///
    /// # Cancel safety
    /// Safe: a message is taken and returned in one step.
    pub async fn next(&mut self) -> Result<TailMessage, TailError> {
        let shard = self.shard;
        let unreachable = |why: String| TailError::Unreachable { shard, why };
        let message = tokio::select! {
            message = self.messages.next() => message,
            () = self.session.closed.cancelled() => return Err(unreachable("connection lost".to_owned())),
        };
        let message = message
            .ok_or_else(|| unreachable("subscription ended".to_owned()))?
            .map_err(|error| unreachable(chain(&error)))?;
        let info = message
            .info()
            .map_err(|error| unreachable(format!("unknown reply subject: {error}")))?;
        let expected = self.n_delivered + 1;
        if info.consumer_sequence != expected || info.delivered != 1 {
            return Err(TailError::Gap {
                shard,
                expected,
                found: info.consumer_sequence,
            });
        }
        let (sequence, n_pending) = (info.stream_sequence, info.pending);
        let stored_at = i64::try_from(info.published.unix_timestamp_nanos() / 1000);
        let (message, ack) = message.split();
        self.n_delivered = expected;
        let unreadable = |why: String| TailError::Unreadable {
            shard,
            sequence,
            why,
        };
        let (base, key) = streams::parse_subject(&message.subject)
            .ok_or_else(|| unreadable(format!("subject {} says nothing", message.subject)))?;
        // A write that came into an earlier life when that was over, late, keeps its own version.
        if base > self.life.base {
            return Err(unreadable(format!(
                "subject {} is of a later life than {}",
                message.subject, self.life.base
            )));
        }
        let of = |base: Base| {
            let version = base.version(sequence);
            version.ok_or_else(|| unreadable("its version does not fit 53 bits".to_owned()))
        };
        let version = of(self.life.base)?;
        self.session.seen.note(shard, version);
        let record =
            Record::decode(message.payload).map_err(|error| unreadable(error.to_string()))?;
        let entry = record.into_entry(of(base)?).map(|entry| (key, entry));
        Ok(TailMessage {
            version,
            entry,
            stored_at: Timestamp::from_micros(stored_at.unwrap_or(i64::MAX)),
            n_pending,
            ack,
        })
    }

    /// The base of the stream that is read.
    #[must_use]
    pub fn base(&self) -> Base {
        self.life.base
    }
}

impl TailMessage {
    /// Acknowledges this message and all before it: only once they are in PostgreSQL.
    ///
    /// A lost acknowledgement makes the lag look larger until the next one, and nothing else.
    pub async fn acknowledge_through(&self) {
        if let Err(error) = self.ack.ack().await {
            tracing::debug!(%error, "acknowledgement was not sent");
        }
    }
}
