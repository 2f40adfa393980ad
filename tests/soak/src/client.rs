//! A client: it asks, and writes down what it was answered.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use reqwest::Method;

use crate::history::{Failure, History, Kind, Operation, Outcome};

mod answer;
mod batch;

use answer::{Answered, understand};

/// Longer than any deadline inside, so that what has no answer by then really has none.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a client rests after it was not answered: such operations make a history hard to judge.
pub(crate) const SHOCK: Duration = Duration::from_millis(300);

/// How often something is asked that must have an answer.
pub(crate) const ATTEMPTS: usize = 10;
/// How many keys are asked for at once at most while others are at work.
const MOST_AT_ONCE: usize = 3;

/// One of several.
pub struct Client {
    id: usize,
    urls: [String; 2],
    http: reqwest::Client,
    random: StdRng,
    history: History,
    values: Arc<AtomicI64>,
    /// The newest version of each key that it was told of.
    known: HashMap<String, u64>,
    /// The last answer had a label.
    is_unsure: bool,
}

impl Client {
    /// Number `id`, with a stream of randomness of its own.
    ///
    /// # Errors
    /// There is no HTTP.
    pub fn new(
        id: usize,
        seed: u64,
        urls: [String; 2],
        history: History,
        values: Arc<AtomicI64>,
    ) -> Result<Self> {
        Ok(Self {
            id,
            urls,
            http: reqwest::Client::builder().timeout(PATIENCE).build()?,
            random: StdRng::seed_from_u64(seed.wrapping_add(id as u64)),
            history,
            values,
            known: HashMap::new(),
            is_unsure: false,
        })
    }

    /// Works on `keys` until `stop`, and now and then on `fleeting` ones, which are written so seldom that their values expire.
    ///
    /// # Errors
    /// An answer that must never come: a 500, or something that is not in docs/API.md.
    pub async fn work(
        &mut self,
        keys: &[String],
        fleeting: &[String],
        stop: &AtomicBool,
    ) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            let is_fleeting = self.random.random_ratio(1, 6);
            let keys = if is_fleeting { fleeting } else { keys };
            let key = &keys[self.random.random_range(0..keys.len())];
            let n = self.random.random_range(0..100);
            let kind = if is_fleeting {
                match n {
                    0..4 => Kind::Set,
                    4..6 => Kind::Create,
                    6..50 => Kind::Read,
                    _ => Kind::Plain,
                }
            } else {
                match n {
                    0..22 => Kind::Set,
                    22..28 => Kind::Create,
                    28..44 => Kind::Swap,
                    44..49 => Kind::Delete,
                    49..54 => Kind::Remove,
                    54..58 => Kind::Touch,
                    58..72 => Kind::Read,
                    _ => Kind::Plain,
                }
            };
            let ttl = if is_fleeting && kind.is_write() {
                self.random.random_range(1..3)
            } else {
                0
            };
            let api = self.random.random_range(0..2);
            let may_be_batched = matches!(kind, Kind::Set | Kind::Delete | Kind::Plain);
            let was_answered = if may_be_batched && !is_fleeting && self.random.random_ratio(1, 8) {
                let n = self.random.random_range(1..=MOST_AT_ONCE).min(keys.len());
                let some: Vec<String> =
                    keys.choose_multiple(&mut self.random, n).cloned().collect();
                self.ask_together(kind, &some, api).await?
            } else {
                self.send(kind, key, api, ttl).await?
            };
            if was_answered {
                let pause = self.random.random_range(2..12);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            } else {
                tokio::time::sleep(SHOCK).await;
            }
        }
        Ok(())
    }

    /// Asks once; tells whether there was an answer.
    ///
    /// # Errors
    /// As [`Client::work`].
    pub async fn ask(&mut self, kind: Kind, key: &str, api: usize) -> Result<bool> {
        self.send(kind, key, api, 0).await
    }

    /// Reads until there is an answer that is sure of itself: on a busy machine one is missed now and then.
    ///
    /// # Errors
    /// There is none after some attempts; and as [`Client::work`].
    pub async fn make_sure(&mut self, kind: Kind, key: &str, api: usize) -> Result<()> {
        for _ in 0..ATTEMPTS {
            if self.ask(kind, key, api).await? && !self.is_unsure {
                return Ok(());
            }
            tokio::time::sleep(SHOCK).await;
        }
        bail!("{key} cannot be read in the end, or not for sure")
    }

    /// Reads what an earlier round left behind: `None` if there was no answer.
    ///
    /// # Errors
    /// As [`Client::work`].
    pub async fn look(&mut self, kind: Kind, key: &str, api: usize) -> Result<Option<Operation>> {
        let looked = self.request(kind, key, api, 0).await?;
        if let Some(look) = &looked {
            self.history.look(look.clone());
        }
        Ok(looked)
    }

    async fn send(&mut self, kind: Kind, key: &str, api: usize, ttl: u64) -> Result<bool> {
        let Some(operation) = self.request(kind, key, api, ttl).await? else {
            return Ok(false);
        };
        let answered = operation.outcome != Outcome::Unknown;
        self.is_unsure = operation.label.is_some();
        self.learn(&operation);
        self.history.add(operation);
        Ok(answered)
    }

    fn learn(&mut self, operation: &Operation) {
        if operation.version > 0 {
            self.known.insert(operation.key.clone(), operation.version);
        }
    }

    /// Asks, and writes down if it failed: `None`.
    async fn request(
        &mut self,
        kind: Kind,
        key: &str,
        api: usize,
        ttl: u64,
    ) -> Result<Option<Operation>> {
        let expected = self.known.get(key).copied().unwrap_or(0);
        // A version that nobody ever had is no question.
        let kind = match kind {
            Kind::Swap if expected == 0 => Kind::Create,
            Kind::Remove if expected == 0 => Kind::Delete,
            kind => kind,
        };
        let value = self.values.fetch_add(1, Ordering::Relaxed);
        let (url, tag) = (
            format!("{}/v1/cache/{key}", self.urls[api]),
            format!("\"{expected}\""),
        );
        let request = match kind {
            Kind::Set => self.write(&url, value, ttl),
            Kind::Create => self.write(&url, value, ttl).header("if-none-match", "*"),
            Kind::Swap => self.write(&url, value, ttl).header("if-match", tag),
            Kind::Delete => self.http.delete(&url),
            Kind::Remove => self.http.delete(&url).header("if-match", tag),
            Kind::Touch => self
                .http
                .patch(&url)
                .header("content-type", "application/json")
                .body("{\"ttl\":null}"),
            Kind::Read => self.http.get(&url).header("cache-control", "no-cache"),
            Kind::Plain => self.http.get(&url),
            Kind::Expire => bail!("nobody asks for the end of {key}"),
        };
        let call = self.history.now();
        let answered = understand(kind, request.send().await).await;
        let asked = Operation {
            client: self.id,
            api,
            key: key.to_owned(),
            kind,
            value,
            ttl,
            expected: if kind.expects() { expected } else { 0 },
            call,
            end: self.history.now(),
            outcome: Outcome::Unknown,
            version: 0,
            found: 0,
            label: None,
            is_batched: false,
        };
        Ok(self.conclude(asked, answered.with_context(|| format!("of {key}"))?))
    }

    /// What was asked with its answer; what failed is written down.
    fn conclude(&self, asked: Operation, answered: Answered) -> Option<Operation> {
        match answered {
            Answered::With(answer) => Some(Operation {
                outcome: answer.outcome,
                version: answer.version,
                found: answer.found,
                label: answer.label,
                ..asked
            }),
            Answered::Nothing(why) => {
                self.history.fail(Failure {
                    client: asked.client,
                    api: asked.api,
                    key: asked.key,
                    kind: asked.kind,
                    call: asked.call,
                    end: asked.end,
                    why,
                });
                None
            }
        }
    }

    fn write(&self, url: &str, value: i64, ttl: u64) -> reqwest::RequestBuilder {
        let ttl = match ttl {
            0 => String::new(),
            ttl => format!(",\"ttl\":{ttl}"),
        };
        self.http
            .request(Method::POST, url)
            .header("content-type", "application/json")
            .body(format!("{{\"value\":{value}{ttl}}}"))
    }
}
