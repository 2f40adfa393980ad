//! A client: it asks, and writes down what it was answered.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rand::{Rng, SeedableRng, rngs::StdRng};
use reqwest::{Method, Response, StatusCode};
use serde_json::Value;

use crate::{
    cold::read_many,
    history::{Failure, History, Kind, Label, Operation, Outcome},
};

/// Longer than any deadline inside, so that what has no answer by then really has none.
const PATIENCE: Duration = Duration::from_secs(8);
/// How long a client rests after it was not answered: such operations make a history hard to judge.
const SHOCK: Duration = Duration::from_millis(300);

/// How often something is asked that must have an answer.
const ATTEMPTS: usize = 10;

/// What an answer says of a key.
struct Answer {
    outcome: Outcome,
    version: u64,
    found: i64,
    label: Option<Label>,
}

/// What came of a request.
enum Answered {
    /// It happened, or may have.
    With(Answer),
    /// Nothing happened.
    Nothing(String),
}

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
            let kind = match self.random.random_range(0..100) {
                0..4 if is_fleeting => Kind::Set,
                4..6 if is_fleeting => Kind::Create,
                6..50 if is_fleeting => Kind::Read,
                0..25 if !is_fleeting => Kind::Set,
                25..32 if !is_fleeting => Kind::Create,
                32..50 if !is_fleeting => Kind::Swap,
                50..58 if !is_fleeting => Kind::Delete,
                58..72 if !is_fleeting => Kind::Read,
                _ => Kind::Plain,
            };
            let ttl = if is_fleeting && kind.is_write() {
                self.random.random_range(1..3)
            } else {
                0
            };
            let api = self.random.random_range(0..2);
            if self.send(kind, key, api, ttl).await? {
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

    /// Asks for all of `keys` at once, as [`Client::make_sure`].
    ///
    /// # Errors
    /// Of any of them there is no answer that is sure of itself.
    pub async fn ask_for_many(&mut self, keys: &[String], api: usize) -> Result<()> {
        let mut n_attempts = 0;
        let (call, found) = loop {
            n_attempts += 1;
            let call = self.history.now();
            match read_many(&self.http, &self.urls[api], keys).await {
                Err(_) if n_attempts < ATTEMPTS => tokio::time::sleep(SHOCK).await,
                found => break (call, found?),
            }
        };
        let end = self.history.now();
        for (key, found) in found {
            let (version, value) = found.unwrap_or_default();
            self.history.add(Operation {
                client: self.id,
                api,
                key,
                kind: Kind::Plain,
                value: 0,
                ttl: 0,
                expected: 0,
                call,
                end,
                outcome: found.map_or(Outcome::Absent, |_| Outcome::Ok),
                version,
                found: value,
                label: None,
            });
        }
        Ok(())
    }

    async fn send(&mut self, kind: Kind, key: &str, api: usize, ttl: u64) -> Result<bool> {
        let expected = self.known.get(key).copied().unwrap_or(0);
        // A version that nobody ever had is no question.
        let kind = if kind == Kind::Swap && expected == 0 {
            Kind::Create
        } else {
            kind
        };
        let value = self.values.fetch_add(1, Ordering::Relaxed);
        let url = format!("{}/v1/cache/{key}", self.urls[api]);
        let request = match kind {
            Kind::Set => self.write(&url, value, ttl),
            Kind::Create => self.write(&url, value, ttl).header("if-none-match", "*"),
            Kind::Swap => self
                .write(&url, value, ttl)
                .header("if-match", format!("\"{expected}\"")),
            Kind::Delete => self.http.delete(&url),
            Kind::Read => self.http.get(&url).header("cache-control", "no-cache"),
            Kind::Plain => self.http.get(&url),
            Kind::Expire => bail!("nobody asks for the end of {key}"),
        };
        let call = self.history.now();
        let answered = match request.send().await {
            Ok(response) => understand(response).await?,
            Err(error) if error.is_connect() || kind.is_read() => {
                Answered::Nothing(error.to_string())
            }
            Err(_) => Answered::With(Answer::unknown()),
        };
        let answer = match answered {
            Answered::With(answer) if kind.is_read() && answer.outcome == Outcome::Unknown => {
                Err("no answer in time".to_owned())
            }
            Answered::With(answer) => Ok(answer),
            Answered::Nothing(why) => Err(why),
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(why) => {
                self.history.fail(Failure {
                    client: self.id,
                    api,
                    key: key.to_owned(),
                    kind,
                    call,
                    end: self.history.now(),
                    why,
                });
                return Ok(false);
            }
        };
        ensure!(
            !(kind.is_write() && answer.outcome == Outcome::Absent),
            "a write of {key} was answered 404"
        );
        let label = if kind == Kind::Plain {
            Label::Unconfirmed
        } else {
            Label::Pending
        };
        ensure!(
            answer.label.is_none_or(|found| found == label),
            "{kind:?} of {key} was answered as {:?}",
            answer.label
        );
        if answer.version > 0 {
            self.known.insert(key.to_owned(), answer.version);
        }
        let answered = answer.outcome != Outcome::Unknown;
        self.is_unsure = answer.label.is_some();
        self.history.add(Operation {
            client: self.id,
            api,
            key: key.to_owned(),
            kind,
            value,
            ttl,
            expected: if kind == Kind::Swap { expected } else { 0 },
            call,
            end: self.history.now(),
            outcome: answer.outcome,
            version: answer.version,
            found: answer.found,
            label: answer.label,
        });
        Ok(answered)
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

impl Answer {
    const fn unknown() -> Self {
        Self {
            outcome: Outcome::Unknown,
            version: 0,
            found: 0,
            label: None,
        }
    }
}

/// What an answer means.
async fn understand(response: Response) -> Result<Answered> {
    let status = response.status();
    let header = |name: &str| {
        let value = response.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let version = header("etag")
        .and_then(|etag| etag.trim_matches('"').parse().ok())
        .unwrap_or(0);
    let label = match header("birb-cache").as_deref() {
        None => None,
        Some("pending") => Some(Label::Pending),
        Some("unconfirmed") => Some(Label::Unconfirmed),
        Some(other) => bail!("Birb-Cache: {other} is not in docs/API.md"),
    };
    // Broken off in the middle: whatever it was, it happened.
    let Ok(body) = response.text().await else {
        return Ok(Answered::With(Answer::unknown()));
    };
    let outcome = match status {
        StatusCode::OK | StatusCode::CREATED | StatusCode::NO_CONTENT => Outcome::Ok,
        StatusCode::NOT_FOUND => Outcome::Absent,
        StatusCode::PRECONDITION_FAILED => Outcome::Mismatch,
        StatusCode::SERVICE_UNAVAILABLE => {
            let error: Value = serde_json::from_str(&body).context("a 503 is JSON")?;
            match error["code"].as_str() {
                Some("UNAVAILABLE") => return Ok(Answered::Nothing(body)),
                Some("UNKNOWN_OUTCOME") => Outcome::Unknown,
                code => bail!("a 503 with {code:?}: {body}"),
            }
        }
        StatusCode::GATEWAY_TIMEOUT => Outcome::Unknown,
        _ => bail!("{status} must not come: {body}"),
    };
    let found = match outcome {
        Outcome::Ok if status == StatusCode::OK => {
            let entry: Value = serde_json::from_str(&body).context("an entry is JSON")?;
            entry["value"].as_i64().context("values are numbers")?
        }
        _ => 0,
    };
    Ok(Answered::With(Answer {
        outcome,
        version,
        found,
        label,
    }))
}
