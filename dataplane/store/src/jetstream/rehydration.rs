//! Requests to warm Redis: a small work queue that all workers share.
//!
//! It is bounded, and takes nothing more when it is full. What it took stays until somebody has done it, also while NATS,
//! PostgreSQL or all workers are away; keys are given up after many tries, jobs never.

use std::time::Duration;

use async_nats::jetstream::{
    self, AckKind, ErrorCode,
    consumer::{AckPolicy, PullConsumer, pull},
    context::PublishErrorKind,
    message::PublishMessage,
    stream::{Config, ConsumerErrorKind, DiscardPolicy, RetentionPolicy, StorageType},
};
use birb_nest_core::{Key, Place, Range, Version};
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
/// What the later pages of one begin with. An older release finds no key in them that anybody has.
const REFILL: &str = "\n\n";
/// Before the token of a place that is not that of a key.
const NO_KEY: char = '\u{1}';

/// What somebody wants to have in Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// These keys.
    Keys(Vec<Key>),
    /// What was written last, as much as Redis can hold: it came back empty. Page by page, too.
    Everything(Refill),
    /// All keys that begin alike, page by page: whoever has done one asks for the next.
    Prefix(Job),
}

/// Where a request for everything has come to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Refill {
    /// As that of a [`Job`]; there is none before the first page.
    pub id: Option<String>,
    /// Keys that were asked for before this page.
    pub n_done: u64,
    /// The last one of them: this page begins below.
    pub below: Option<(Version, Key)>,
    /// Nothing is left to ask for: whoever gets this has seen all requests for keys before it taken.
    pub ends: bool,
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
    /// The request's place in the queue: no other request has the same.
    pub place: u64,
    /// How often it was given to somebody, this time included.
    pub n_tries: u64,
    message: jetstream::Message,
}

impl Request {
    /// Keys per request, at most.
    pub const MAX_KEYS: usize = 500;

    /// Bytes of their names, at most: a server that takes the smallest writes takes them.
    const MAX_BYTES: usize = 60 << 10;

    /// `keys` in pieces that each fit a request.
    pub fn pieces(mut keys: &[Key]) -> impl Iterator<Item = &[Key]> {
        std::iter::from_fn(move || {
            let mut n_bytes = 0;
            let fits = |key: &&Key| {
                n_bytes += key.as_str().len() + 1;
                n_bytes <= Self::MAX_BYTES
            };
            let n = keys.iter().take(Self::MAX_KEYS).take_while(fits).count();
            let (piece, rest) = keys.split_at(n);
            keys = rest;
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// How many keys it names; `None` when it does not name them.
    #[must_use]
    pub const fn n_keys(&self) -> Option<usize> {
        match self {
            Self::Keys(keys) => Some(keys.len()),
            Self::Everything(_) | Self::Prefix(_) => None,
        }
    }

    fn encode(&self) -> Bytes {
        match self {
            Self::Everything(refill) => refill.encode().into(),
            // An older release takes these lines for keys, and warms nothing that matters.
            Self::Prefix(Job { id, n_done, range }) => {
                let after = range.after.as_ref().map_or_else(String::new, line);
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

    /// Keeps a page that is asked for twice from being done twice: a header, so keys are not taken as they are.
    fn message_id(&self) -> Option<String> {
        let page = |id: &str, after: Option<String>| {
            let after = after.unwrap_or_default();
            format!("{id}.{after}")
        };
        match self {
            Self::Keys(_) => None,
            Self::Everything(Refill { id, below, .. }) => {
                let after = below.as_ref().map(|(_, key)| key.to_token());
                id.as_deref().map(|id| page(id, after))
            }
            Self::Prefix(Job { id, range, .. }) => {
                Some(page(id, range.after.as_ref().map(Place::to_token)))
            }
        }
    }

    /// Lines that are no keys are passed over: nothing depends on them.
    fn decode(bytes: &[u8]) -> Self {
        if bytes == EVERYTHING {
            return Self::Everything(Refill::default());
        }
        let text = String::from_utf8_lossy(bytes);
        if let Some(refill) = text.strip_prefix(REFILL).and_then(Refill::decode) {
            return Self::Everything(refill);
        }
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

/// A place in a line of its own.
fn line(place: &Place) -> String {
    match Key::parse(place.as_str()) {
        Ok(_) => place.as_str().to_owned(),
        // An older release forgets the job: it would have passed over what is no key.
        Err(_) => format!("{NO_KEY}{}", place.to_token()),
    }
}

fn place(line: &str) -> Option<Place> {
    match line.strip_prefix(NO_KEY) {
        Some(token) => Place::from_token(token),
        None => Some(Place::from(&Key::parse(line).ok()?)),
    }
}

impl Job {
    fn decode(text: &str) -> Option<Self> {
        let mut lines = text.splitn(4, '\n');
        let (id, n_done) = (lines.next()?.to_owned(), lines.next()?.parse().ok()?);
        let after = match lines.next()? {
            "" => None,
            after => Some(place(after)?),
        };
        let prefix = lines.next()?.to_owned();
        Some(Self {
            id,
            n_done,
            range: Range { prefix, after },
        })
    }
}

impl Refill {
    fn encode(&self) -> String {
        let Some(id) = &self.id else {
            return String::from_utf8_lossy(EVERYTHING).into_owned();
        };
        let (n_done, ends) = (self.n_done, u8::from(self.ends));
        let below = self.below.as_ref();
        let (version, key) = below.map_or((0, ""), |(version, key)| (version.get(), key.as_str()));
        format!("{REFILL}{id}\n{n_done}\n{ends}\n{version}\n{key}")
    }

    fn decode(text: &str) -> Option<Self> {
        let mut lines = text.splitn(5, '\n');
        let (id, n_done) = (lines.next()?.to_owned(), lines.next()?.parse().ok()?);
        let (ends, version) = (lines.next()? == "1", lines.next()?.parse().ok()?);
        let below = match lines.next()? {
            "" => None,
            key => Some((Version::new(version)?, Key::parse(key).ok()?)),
        };
        Some(Self {
            id: Some(id),
            n_done,
            below,
            ends,
        })
    }
}

impl Delivery {
    /// How long a request rests that somebody could not serve.
    pub(crate) const REST: Duration = Duration::from_secs(12);
    /// How long it waits for whoever has it, unless it hears that this goes on.
    pub(crate) const ACK_WAIT: Duration = Duration::from_secs(30);

    /// Keeps the request from being given to somebody else, for another half minute.
    pub async fn goes_on(&self) {
        if let Err(error) = self.message.ack_with(AckKind::Progress).await {
            tracing::debug!(%error, "a rehydration request may come again");
        }
    }

    /// Gives the request back: somebody gets it again after some seconds.
    pub async fn again(self) {
        if let Err(error) = self.message.ack_with(AckKind::Nak(Some(Self::REST))).await {
            tracing::debug!(%error, "a rehydration request was not given back; it comes again later");
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
    let name = &config.nats_rehydrate_stream_name;
    let settings = Config {
        name: name.clone(),
        description: Some("birb-nest: keys to put into Redis".to_owned()),
        subjects: vec![subject(config)],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_bytes: 16 << 20,
        max_messages: -1,
        storage: StorageType::File,
        num_replicas: 1,
        ..Config::default()
    };
    // Earlier ones were in memory, which no stream can leave.
    if let Ok(stream) = context.get_stream(name).await
        && stream.cached_info().config.storage == StorageType::Memory
    {
        tracing::info!("stream {name} goes from memory to disk; what waits in it is forgotten");
        if let Err(error) = context.delete_stream(name).await {
            let why = format!("failed to delete stream {name}: {}", chain(&error));
            return Err(OpenError::unreachable(server, why));
        }
    }
    streams::make(context, settings, server).await
}

impl Session {
    /// Asks the workers to put keys into Redis.
    ///
    /// # Errors
    /// [`ReadError`]: the queue is full or not to be reached.
    pub async fn ask_rehydration(&self, request: &Request) -> Result<(), ReadError> {
        let mut message = PublishMessage::build().payload(request.encode());
        if let Some(id) = request.message_id() {
            message = message.message_id(id);
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

    /// A server that lost its disk has none.
    async fn remake_queue(&self) {
        match prepare(&self.context, &self.config, "NATS").await {
            Ok(()) => tracing::warn!(
                "made the queue of rehydration requests anew: what waited in it must be asked for again"
            ),
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
        let settings = pull::Config {
            durable_name: Some(CONSUMER.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: Delivery::ACK_WAIT,
            max_deliver: -1,
            ..pull::Config::default()
        };
        let consumer = stream
            .get_or_create_consumer(CONSUMER, settings.clone())
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
        if consumer.cached_info().config.max_deliver != settings.max_deliver {
            // An older release's, which gave jobs up.
            let updating = stream.create_consumer(settings).await;
            updating.map_err(|error| failed(&error))?;
        }
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
                Some(Ok(message)) => {
                    let info = message
                        .info()
                        .map_err(|error| ReadError(error.to_string()))?;
                    let (place, n_tries) = (info.stream_sequence, info.delivered);
                    Ok(Some(Delivery {
                        request: Request::decode(&message.payload),
                        place,
                        n_tries: n_tries.unsigned_abs(),
                        message,
                    }))
                }
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
        let job = |prefix: &str, after: Option<&str>| {
            Request::Prefix(Job {
                id: "a1".to_owned(),
                n_done: 7,
                range: Range {
                    prefix: prefix.to_owned(),
                    after: after.map(Place::behind),
                },
            })
        };
        let refill = |n_done, below: Option<&Key>, ends| {
            Request::Everything(Refill {
                id: Some("e7".to_owned()),
                n_done,
                below: below.map(|key| (Version::new(1 << 40).expect("a version"), key.clone())),
                ends,
            })
        };
        let requests = [
            job("", None),
            job("a\u{2028}", Some("a")),
            job("a", Some("a\nb")),
            job("a", Some(&"a".repeat(600))),
            refill(0, None, true),
            refill(50_000, Some(&keys[1]), false),
            Request::Everything(Refill::default()),
            Request::Keys(keys),
        ];
        for request in requests {
            assert_eq!(Request::decode(&request.encode()), request);
        }
        assert_eq!(
            Request::decode(b"\x00bad\n\xff"),
            Request::Keys(vec![Key::parse("\u{fffd}").expect("a key")])
        );
    }

    #[test]
    fn a_page_that_is_asked_for_twice_is_known_by_its_name() {
        let refill = |n_done, below: &str| {
            Request::Everything(Refill {
                id: Some("e7".to_owned()),
                n_done,
                below: Some((
                    Version::new(7).expect("a version"),
                    Key::parse(below).expect("a key"),
                )),
                ends: false,
            })
        };
        assert_eq!(refill(5, "a").message_id(), refill(5, "a").message_id());
        assert_ne!(refill(5, "a").message_id(), refill(5, "b").message_id());
        assert_eq!(
            Request::Everything(Refill::default()).message_id(),
            None,
            "each is another one"
        );
    }

    #[test]
    fn each_piece_fits_a_request_and_none_is_lost() {
        let keys = |n: usize, length: usize| -> Vec<Key> {
            (0..n)
                .map(|n| Key::parse(&format!("{n:0length$}")).expect("a key"))
                .collect()
        };
        for (n, length, expected) in [
            (0, 1, &[][..]),
            (1, 512, &[1]),
            (1001, 10, &[500, 500, 1]),
            (300, 512, &[119, 119, 62]),
        ] {
            let keys = keys(n, length);
            let pieces: Vec<&[Key]> = Request::pieces(&keys).collect();
            let sizes: Vec<usize> = pieces.iter().map(|piece| piece.len()).collect();
            assert_eq!(sizes, expected, "{n} of {length}");
            assert_eq!(pieces.concat(), keys);
            for piece in pieces {
                let bytes = Request::Keys(piece.to_vec()).encode();
                assert!(bytes.len() <= Request::MAX_BYTES);
            }
        }
    }
}
