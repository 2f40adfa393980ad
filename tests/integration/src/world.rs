//! What tests have in their hands: processes, an HTTP client, and a look into each server.

use std::{
    collections::HashMap,
    fmt::Debug,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use birb_nest_stack::{Environment, Options, Process, Role, Stack, shared};
use birb_nest_store::LogConfig;
use clap::{Args, FromArgMatches};
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::{Method, StatusCode, header::HeaderMap};
use serde_json::Value;

/// How long anything is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `look` returns something, looking again and again.
pub async fn eventually<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    look: impl FnMut() -> F,
) -> Result<T> {
    eventually_within(PATIENCE, what, look).await
}

/// As [`eventually`], for at most `patience`.
pub async fn eventually_within<T, F: Future<Output = Result<Option<T>>>>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look()
            .await
            .with_context(|| format!("while waiting: {what}"))?
        {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("waited {patience:?} in vain: {what}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Writes `n` keys and returns their versions.
pub async fn write_all(api: &Arc<Api>, prefix: &str, n: usize) -> Result<HashMap<String, u64>> {
    stream::iter(0..n)
        .map(|n| {
            let (api, key) = (api.clone(), format!("{prefix}{n}"));
            async move {
                let version = api.write(&key, &format!("\"{key}\"")).await?;
                Ok((key, version))
            }
        })
        .buffer_unordered(16)
        .try_collect()
        .await
}

/// A nest on some stack.
pub struct World<'a> {
    pub stack: &'a Stack,
    pub env: Environment,
}

/// A running API.
pub struct Api {
    pub process: Process,
    pub url: String,
    client: reqwest::Client,
}

/// An answer, read to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: String,
}

impl World<'static> {
    /// A nest of its own on the servers that all tests share, set up.
    pub async fn shared() -> Result<Self> {
        Self::shared_with(&[]).await
    }

    /// The same with these variables.
    pub async fn shared_with(variables: &[(&str, &str)]) -> Result<Self> {
        // Nobody breaks these servers: that one is slow means that this machine is busy.
        let patient = [("POSTGRES_TIMEOUT", "20s"), ("NATS_PUBLISH_TIMEOUT", "20s")];
        Self::on_with(shared().await?, &[&patient, variables].concat()).await
    }
}

/// A stack that a test may break.
pub async fn breakable() -> Result<Stack> {
    Stack::fresh_with(Options::default()).await
}

impl<'a> World<'a> {
    /// A nest of its own on `stack`, set up.
    pub async fn on(stack: &'a Stack) -> Result<Self> {
        Self::on_with(stack, &[]).await
    }

    /// The same with these variables.
    pub async fn on_with(stack: &'a Stack, variables: &[(&str, &str)]) -> Result<Self> {
        let mut world = Self::not_set_up(stack).await?;
        for (name, value) in variables {
            world.env.set(name, *value);
        }
        world.env.setup().await?;
        Ok(world)
    }

    /// A nest of its own on `stack`, for tests of `setup`.
    pub async fn not_set_up(stack: &'a Stack) -> Result<Self> {
        let mut env = stack.isolated().await?;
        let queue = format!("{}_REHYDRATE", env.vars["NATS_STREAM_NAME"]);
        env.set("NATS_REHYDRATE_STREAM_NAME", queue)
            .set("NATS_DLQ_MAX_BYTES", "4MiB")
            // Tests empty Redis to see what is below; rehydration has tests of its own.
            .set("WORKER_REHYDRATE_MAX_KEYS", "0")
            .set("NATS_STREAM_MAX_BYTES", "16MiB")
            // A Redis that is not told in time keeps nothing, or something old: tests that make it slow have the usual limit.
            .set("REDIS_TIMEOUT", "5s")
            .set(
                "LOG_LEVEL",
                "info,birb_nest_store=debug,birb_nest_worker=debug,birb_nest_api=debug",
            );
        Ok(Self { stack, env })
    }

    /// A running API of this nest.
    pub async fn api(&self) -> Result<Api> {
        Api::start(&self.env).await
    }

    /// A running worker of this nest.
    pub async fn worker(&self) -> Result<Process> {
        self.env.start(Role::Worker).await
    }

    /// A worker that drops from the log at once what it has stored.
    pub async fn eager_worker(&self) -> Result<Process> {
        let mut env = self.env.replica()?;
        env.set("LOG_TRIM_LAG", "1ms")
            .set("LOG_TRIM_INTERVAL", "20ms");
        env.start(Role::Worker).await
    }

    fn var(&self, name: &str) -> &str {
        &self.env.vars[name]
    }

    /// Rows of a query as lines.
    pub async fn sql(&self, sql: &str) -> Result<String> {
        self.stack.psql(self.var("POSTGRES_DB"), sql).await
    }

    /// The stored (version, deleted, value) of a key.
    pub async fn row(&self, key: &str) -> Result<Option<(u64, bool, String)>> {
        let sql = format!(
            "select version, deleted, encode(value, 'escape') from cache_entries where key = '{}'",
            key.replace('\'', "''")
        );
        let line = self.sql(&sql).await?;
        let Some(line) = line.lines().next().filter(|line| !line.is_empty()) else {
            return Ok(None);
        };
        let mut columns = line.splitn(3, '|');
        let mut next = || columns.next().context("three columns");
        Ok(Some((next()?.parse()?, next()? == "t", next()?.to_owned())))
    }

    /// Waits until the row of `key` has `version` or a newer one.
    pub async fn stored(&self, key: &str, version: u64) -> Result<()> {
        eventually("the row is stored", async || {
            Ok(self
                .row(key)
                .await?
                .filter(|row| row.0 >= version)
                .map(drop))
        })
        .await
    }

    /// As [`World::stored`], for many keys.
    pub async fn all_stored<'k>(
        &self,
        keys: impl Iterator<Item = (&'k String, &'k u64)> + Clone,
    ) -> Result<()> {
        eventually("all rows are stored", async || {
            let rows = self.sql("select version, key from cache_entries").await?;
            let versions: HashMap<&str, u64> = rows
                .lines()
                .filter_map(|line| line.split_once('|'))
                .filter_map(|(version, key)| Some((key, version.parse().ok()?)))
                .collect();
            let stored = |(key, version): (&String, &u64)| {
                versions
                    .get(key.as_str())
                    .is_some_and(|found| found >= version)
            };
            Ok(keys.clone().all(stored).then_some(()))
        })
        .await
    }

    /// A connection to this nest's Redis database.
    pub async fn redis(&self) -> Result<redis::aio::MultiplexedConnection> {
        let url = format!(
            "redis://127.0.0.1:{}/{}",
            self.stack.redis.port(),
            self.var("REDIS_DB")
        );
        // The client's own limits are half a second and one: this machine may be busier.
        let settings = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        Ok(redis::Client::open(url)?
            .get_multiplexed_async_connection_with_config(&settings)
            .await?)
    }

    /// Everything of this nest gone from Redis, as `FLUSHALL` would do it to one that is alone there.
    pub async fn flush_redis(&self) -> Result<()> {
        redis::cmd("FLUSHDB")
            .exec_async(&mut self.redis().await?)
            .await?;
        Ok(())
    }

    /// What Redis holds under a key.
    pub async fn in_redis(&self, key: &str) -> Result<Option<String>> {
        Ok(redis::cmd("GET")
            .arg(format!("birb:e:{key}"))
            .query_async(&mut self.redis().await?)
            .await?)
    }

    pub async fn jetstream(&self) -> Result<async_nats::jetstream::Context> {
        let url = format!("nats://127.0.0.1:{}", self.stack.nats.port());
        Ok(async_nats::jetstream::new(async_nats::connect(url).await?))
    }

    /// Messages in all shards' streams, and the sum of their last sequences.
    pub async fn log_depth(&self) -> Result<(u64, u64)> {
        let jetstream = self.jetstream().await?;
        let (mut messages, mut last) = (0, 0);
        for shard in self.config::<LogConfig>()?.nats_shards.iter() {
            let name = format!("{}_{shard}", self.var("NATS_STREAM_NAME"));
            let stream = jetstream.get_stream(name).await?;
            messages += stream.cached_info().state.messages;
            last += stream.cached_info().state.last_sequence;
        }
        Ok((messages, last))
    }

    /// The subject of each of its shards.
    pub async fn subjects(&self) -> Result<Vec<String>> {
        let jetstream = self.jetstream().await?;
        let mut subjects = Vec::new();
        for shard in self.config::<LogConfig>()?.nats_shards.iter() {
            let name = format!("{}_{shard}", self.var("NATS_STREAM_NAME"));
            let stream = jetstream.get_stream(name).await?;
            subjects.push(stream.cached_info().config.subjects[0].clone());
        }
        Ok(subjects)
    }

    /// Fences the lives that have these subjects, as a process does that finds that its log lost its tail.
    pub async fn fence(&self, lives: &[String]) -> Result<()> {
        let fenced = |open: &String| open.trim_end_matches(".*").replace(".w.", ".fenced.");
        let fenced: Vec<String> = lives.iter().map(fenced).collect();
        self.set_subjects(&fenced).await
    }

    /// Gives each of its shards the subject that it has here.
    pub async fn set_subjects(&self, subjects: &[String]) -> Result<()> {
        let jetstream = self.jetstream().await?;
        for (shard, subject) in subjects.iter().enumerate() {
            let name = format!("{}_{shard}", self.var("NATS_STREAM_NAME"));
            let stream = jetstream.get_stream(name).await?;
            let mut config = stream.cached_info().config.clone();
            config.subjects = vec![subject.clone()];
            jetstream.update_stream(config).await?;
        }
        Ok(())
    }

    /// Fences every shard.
    pub async fn fence_all(&self) -> Result<()> {
        self.fence(&self.subjects().await?).await
    }

    /// Settings for the adapters, from this nest's variables.
    pub fn config<T: Args + FromArgMatches>(&self) -> Result<T> {
        let command = T::augment_args(clap::Command::new("test"));
        let known: Vec<String> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long().map(str::to_owned))
            .collect();
        let flags = self.env.vars.iter().filter_map(|(name, value)| {
            let flag = name.to_lowercase().replace('_', "-");
            known.contains(&flag).then(|| format!("--{flag}={value}"))
        });
        let matches =
            command.try_get_matches_from(std::iter::once("test".to_owned()).chain(flags))?;
        Ok(T::from_arg_matches(&matches)?)
    }
}

impl Api {
    /// Starts one that has all its servers when this returns.
    pub async fn start(env: &Environment) -> Result<Self> {
        let api = Self::start_alone(env).await?;
        eventually("it has all its servers", async || {
            let ready = reqwest::get(format!("{}/readyz", api.url)).await?;
            let missing = &ready.json::<Value>().await?["missing"];
            let has_all = missing.as_array().is_some_and(Vec::is_empty);
            Ok(has_all.then_some(()))
        })
        .await?;
        Ok(api)
    }

    /// The same for one that may lack Redis and PostgreSQL.
    pub async fn start_alone(env: &Environment) -> Result<Self> {
        let process = env.start(Role::Api).await?;
        Ok(Self {
            process,
            url: env.api_url(),
            client: reqwest::Client::builder().timeout(PATIENCE).build()?,
        })
    }

    pub async fn send(&self, method: Method, path: &str, body: Option<String>) -> Result<Answer> {
        self.send_with(method, path, &[], body).await
    }

    /// The same with headers.
    pub async fn send_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<String>,
    ) -> Result<Answer> {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request
                .header("content-type", "application/json")
                .body(body);
        }
        let response = request.send().await?;
        Ok(Answer {
            status: response.status(),
            headers: response.headers().clone(),
            body: response.text().await?,
        })
    }

    /// POST of `value` (JSON) with headers.
    pub async fn post_if(
        &self,
        key: &str,
        headers: &[(&str, &str)],
        value: &str,
    ) -> Result<Answer> {
        self.write_if(Method::POST, key, headers, value).await
    }

    /// The same with POST or PUT.
    pub async fn write_if(
        &self,
        method: Method,
        key: &str,
        headers: &[(&str, &str)],
        value: &str,
    ) -> Result<Answer> {
        let body = format!("{{\"value\":{value}}}");
        self.send_with(method, &path(key), headers, Some(body))
            .await
    }

    /// GET, DELETE or HEAD with headers.
    pub async fn ask(&self, method: Method, key: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        self.send_with(method, &path(key), headers, None).await
    }

    pub async fn post(&self, key: &str, body: impl Into<String>) -> Result<Answer> {
        self.send(Method::POST, &path(key), Some(body.into())).await
    }

    pub async fn get(&self, key: &str) -> Result<Answer> {
        self.send(Method::GET, &path(key), None).await
    }

    pub async fn delete(&self, key: &str) -> Result<Answer> {
        self.send(Method::DELETE, &path(key), None).await
    }

    /// Writes `value` (JSON) and returns the version; anything but 201 is a failure.
    pub async fn write(&self, key: &str, value: &str) -> Result<u64> {
        let answer = self.post(key, format!("{{\"value\":{value}}}")).await?;
        answer.expect(StatusCode::CREATED)?.version()
    }

    /// The value of a key as JSON text; `None` for 404.
    pub async fn read(&self, key: &str) -> Result<Option<String>> {
        let answer = self.get(key).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        Ok(Some(
            answer.expect(StatusCode::OK)?.json()?["value"].to_string(),
        ))
    }
}

impl Answer {
    pub fn expect(self, status: StatusCode) -> Result<Self> {
        if self.status != status {
            bail!("{status} was expected, this came: {self:?}");
        }
        Ok(self)
    }

    /// A 503 as docs/API.md has it, with this code.
    pub fn refused(&self, code: &str) -> Result<()> {
        ensure!(self.status == StatusCode::SERVICE_UNAVAILABLE, "{self:?}");
        ensure!(self.json()?["code"] == code, "{self:?}");
        ensure!(!self.header("retry-after").is_empty(), "{self:?}");
        Ok(())
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("not JSON: {}", self.body))
    }

    pub fn version(&self) -> Result<u64> {
        // Not from the body: its value may be a number that no parser here takes.
        let etag = self.header("etag");
        etag.trim_matches('"')
            .parse()
            .with_context(|| format!("`{etag}` is no ETag"))
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    }
}

fn path(key: &str) -> String {
    let mut path = "/v1/cache/".to_owned();
    for byte in key.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~:".contains(&byte) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("%{byte:02X}"));
        }
    }
    path
}
