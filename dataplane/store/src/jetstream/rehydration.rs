//! Requests to warm Redis: a small work queue that all workers share.
//!
//! Best effort by nature: the stream is in memory, bounded, and forgets what nobody got to in ten minutes.

use std::time::Duration;

use async_nats::jetstream::{
    self, AckKind, ErrorCode,
    consumer::{AckPolicy, PullConsumer, pull},
    context::PublishErrorKind,
    message::PublishMessage,
    stream::{Config, ConsumerErrorKind, DiscardPolicy, RetentionPolicy, StorageType},
};
use birb_nest_core::{Key, Range};
use bytes::Bytes;
use tokio::time::timeout;

use super::{ReadError, Session, streams};
use crate::{
    config::LogConfig,
    refusal::{OpenError, chain},
};

const CONSUMER: &str = "birb-rehydrate";
/// The first line of a request for everything that is worth it; keys have no control characters.
const EVERYTHING: &[u8] = b"\n";

/// What somebody wants to have in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// These keys.
    Keys(Vec<Key>),
    /// What was written last, as much as Redis can hold: it came back empty.
    Everything,
    /// All keys that begin alike, page by page: whoever has done one asks for the next.
    Prefix(Job),
}

/// Where a request for all keys of a prefix has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Names it in logs, and keeps a page that is asked for twice from being done twice: letters and digits.
    pub id: String,
    /// Keys that were looked at before this page.
    pub n_done: u64,
    /// The page.
    pub range: Range,
}

/// A request and the duty to acknowledge it.
pub struct Delivery {
    /// What is asked for.
    pub request: Request,
    message: jetstream::Message,
}

impl Request {
    /// Keys per request, at most.
    pub const MAX_KEYS: usize = 500;

    /// How many keys it names; `None` when it asks for everything.
    #[must_use]
    pub const fn n_keys(&self) -> Option<usize> {
        match self {
            Self::Keys(keys) => Some(keys.len()),
            Self::Everything | Self::Prefix(_) => None,
        }
    }

    fn encode(&self) -> Bytes {
        match self {
            Self::Everything => Bytes::from_static(EVERYTHING),
            // An older release takes these lines for keys, and warms nothing that matters.
            Self::Prefix(Job { id, n_done, range }) => {
                let after = range.after.as_ref().map_or("", Key::as_str);
                format!("\n{id}\n{n_done}\n{after}\n{}", range.prefix).into()
            }
            Self::Keys(keys) => keys
                .iter()
                .map(Key::as_str)
                .collect::<Vec<_>>()
                .join("\n")
                .into(),
        }
    }

    /// Lines that are no keys are passed over: nothing depends on them.
    fn decode(bytes: &[u8]) -> Self {
        if bytes == EVERYTHING {
            return Self::Everything;
        }
        let text = String::from_utf8_lossy(bytes);
        if let Some(job) = text.strip_prefix('\n').and_then(Job::decode) {
            return Self::Prefix(job);
        }
        Self::Keys(
            text.lines()
                .filter_map(|line| Key::parse(line).ok())
                .collect(),
        )
    }
}

impl Job {
    fn decode(text: &str) -> Option<Self> {
        let mut lines = text.splitn(4, '\n');
        let (id, n_done) = (lines.next()?.to_owned(), lines.next()?.parse().ok()?);
        let after = match lines.next()? {
            "" => None,
            after => Some(Key::parse(after).ok()?),
        };
        let prefix = lines.next()?.to_owned();
        Some(Self {
            id,
            n_done,
            range: Range { prefix, after },
        })
    }

    /// Two requests with the same are one: a header, so a key is not taken as it is.
    fn message_id(&self) -> String {
        let after = self
            .range
            .after
            .as_ref()
            .map_or_else(String::new, Key::to_token);
        format!("{}.{after}", self.id)
    }
}

impl Delivery {
    /// Keeps the request from being given to somebody else, for another half minute.
    pub async fn goes_on(&self) {
        if let Err(error) = self.message.ack_with(AckKind::Progress).await {
            tracing::debug!(%error, "a rehydration request may come again");
        }
    }

    /// Takes the request off the queue. Without it somebody else gets it half a minute later.
    pub async fn done(self) {
        if let Err(error) = self.message.ack().await {
            tracing::debug!(%error, "a rehydration request was not acknowledged");
        }
    }
}

fn subject(config: &LogConfig) -> String {
    format!("{}.rehydrate", config.nats_subject_prefix)
}

/// Makes the work queue.
pub(super) async fn prepare(
    context: &jetstream::Context,
    config: &LogConfig,
    server: &str,
) -> Result<(), OpenError> {
    let settings = Config {
        name: config.nats_rehydrate_stream_name.clone(),
        description: Some("birb-nest: keys to put into Redis".to_owned()),
        subjects: vec![subject(config)],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_bytes: 16 << 20,
        max_messages: -1,
        max_age: Duration::from_secs(600),
        storage: StorageType::Memory,
        num_replicas: 1,
        ..Config::default()
    };
    streams::make(context, settings, server).await
}

impl Session {
    /// Asks the workers to put keys into Redis.
    ///
    /// # Errors
    /// [`ReadError`]: the queue is full or not to be reached.
    pub async fn ask_rehydration(&self, request: &Request) -> Result<(), ReadError> {
        let mut message = PublishMessage::build().payload(request.encode());
        if let Request::Prefix(job) = request {
            message = message.message_id(job.message_id());
        }
        let asking = async {
            let subject = subject(&self.config);
            let acknowledgement = self.context.send_publish(subject, message).await?;
            acknowledgement.await
        };
        match timeout(self.config.nats_publish_timeout, asking).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => {
                if error.kind() == PublishErrorKind::StreamNotFound {
                    self.remake_queue().await;
                }
                Err(ReadError(chain(&error)))
            }
            Err(_) => Err(ReadError("no answer in time".to_owned())),
        }
    }

    /// The queue is in memory: a server that was restarted has none.
    async fn remake_queue(&self) {
        match prepare(&self.context, &self.config, "NATS").await {
            Ok(()) => tracing::info!("made the queue of rehydration requests anew"),
            Err(error) => tracing::debug!(%error, "there is no queue of rehydration requests"),
        }
    }

    /// The next request, from the queue that all workers share; `None` when there was none for some seconds.
    ///
    /// # Errors
    /// [`ReadError`].
    ///
    /// # Cancel safety
    /// A request may be lost to this process; another gets it half a minute later.
    pub async fn next_rehydration(&self) -> Result<Option<Delivery>, ReadError> {
        use futures::StreamExt;

        let failed = |error: &dyn std::error::Error| ReadError(chain(error));
        let name = &self.config.nats_rehydrate_stream_name;
        let stream = self
            .context
            .get_stream_no_info(name)
            .await
            .map_err(|error| failed(&error))?;
        let consumer = stream
            .get_or_create_consumer(
                CONSUMER,
                pull::Config {
                    durable_name: Some(CONSUMER.to_owned()),
                    ack_policy: AckPolicy::Explicit,
                    ack_wait: Duration::from_secs(30),
                    max_deliver: 3,
                    ..pull::Config::default()
                },
            )
            .await;
        let consumer: PullConsumer = match consumer {
            Ok(consumer) => consumer,
            Err(error) => {
                if let ConsumerErrorKind::JetStream(refusal) = error.kind()
                    && refusal.error_code() == ErrorCode::STREAM_NOT_FOUND
                {
                    self.remake_queue().await;
                }
                return Err(failed(&error));
            }
        };
        let fetching = async {
            let mut messages = consumer
                .batch()
                .max_messages(1)
                .expires(Duration::from_secs(5))
                .messages()
                .await
                .map_err(|error| failed(&error))?;
            match messages.next().await {
                None => Ok(None),
                Some(Ok(message)) => Ok(Some(Delivery {
                    request: Request::decode(&message.payload),
                    message,
                })),
                Some(Err(error)) => Err(ReadError(error.to_string())),
            }
        };
        tokio::select! {
            fetched = timeout(Duration::from_secs(10), fetching) => fetched.unwrap_or(Ok(None)),
            () = self.closed() => Err(ReadError("connection lost".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_back() {
        let keys = ["a", "b c", "ä/🐦"]
            .map(|text| Key::parse(text).expect("a key"))
            .to_vec();
        let job = |prefix: &str, after: Option<&Key>| {
            Request::Prefix(Job {
                id: "a1".to_owned(),
                n_done: 7,
                range: Range {
                    prefix: prefix.to_owned(),
                    after: after.cloned(),
                },
            })
        };
        let jobs = [job("", None), job("a\u{2028}", Some(&keys[0]))];
        for request in [&jobs[..], &[Request::Keys(keys), Request::Everything]].concat() {
            assert_eq!(Request::decode(&request.encode()), request);
        }
        assert_eq!(
            Request::decode(b"\x00bad\n\xff"),
            Request::Keys(vec![Key::parse("\u{fffd}").expect("a key")])
        );
    }
}
