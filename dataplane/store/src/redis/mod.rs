//! Redis: the projection that makes reads fast. It may vanish; it never lies.
//!
//! **Only the holder of a standing lease token creates a key**, and a token is taken before the log is asked or
//! written. Whatever carries a version replaces what is older, breaks other tokens, and leaves an empty place empty.
//! So nothing that comes late, from a stalled writer or reader, can put an older value back
//! (docs/adr/0004-redis-leases.md). The scripts in `lua/` are these rules, one each.

mod repair;
mod session;
mod supervise;
mod value;

use std::{sync::Arc, time::Duration};

use birb_nest_core::{Document, Key, Timestamp, Version};
use redis::{RedisError, Script, aio::MultiplexedConnection};
use tokio::sync::watch;

pub use self::value::{Stored, Token};
use self::{
    repair::Repairs,
    session::{Emptied, Session, Shared, server_name},
};
use crate::{
    clock::Clock,
    config::RedisConfig,
    keeper::Keeper,
    metrics::METRICS,
    refusal::{OpenError, chain},
    sabotage::script,
};

/// How long a token stands: longer than any lookup or publish takes, short enough that a dead holder does not hurt.
pub(crate) const LEASE: Duration = Duration::from_secs(10);
/// How long "has no value" is believed.
const ABSENT_FOR: Duration = Duration::from_secs(5);
/// How long a deleted or expired entry stays, to end lookups.
const MARKER_FOR: Duration = Duration::from_secs(60);

/// Redis did not do what was asked, or did not say so in time.
#[derive(Debug, thiserror::Error)]
#[error("redis cannot be used: {0}")]
pub struct CacheError(String);

/// What a reader found when it tried to take the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lease {
    /// The place was empty; the reader's token stands there now.
    Taken,
    /// Something was there.
    Found(Stored),
}

/// What a lookup may put into Redis.
#[derive(Debug, Clone, Copy)]
pub enum Fill<'a> {
    /// An entry or a tombstone.
    Document(&'a Document),
    /// The knowledge that the key has no value.
    Absent,
}

/// A handle on Redis; cheap to clone.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
    keeper: Arc<Keeper>,
}

struct Inner {
    session: watch::Receiver<Shared>,
    residency: Duration,
    timeout: Duration,
    scripts: Scripts,
    repairs: Repairs,
    emptied: Emptied,
}

struct Scripts {
    lease: Script,
    install: Script,
    fill: Script,
    release: Script,
    forget: Script,
    empty: Script,
}

impl Cache {
    /// Connects and keeps a session from then on.
    ///
    /// # Errors
    /// Only when the database is refused; a server that cannot be reached yet is waited for in the background.
    pub async fn open(config: RedisConfig, clock: Arc<Clock>) -> Result<Self, OpenError> {
        let emptied = Arc::new(watch::Sender::new(0));
        let first = match Session::open(&config, &clock, &emptied).await {
            Ok(session) => Some(Arc::new(session)),
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "starting without Redis");
                None
            }
        };
        let (sender, session) = watch::channel(first);
        let inner = Arc::new(Inner {
            session,
            residency: config.redis_default_ttl,
            timeout: config.redis_timeout,
            scripts: Scripts {
                lease: Script::new(include_str!("lua/lease.lua")),
                install: Script::new(&script(include_str!("lua/install.lua"))),
                fill: Script::new(include_str!("lua/fill.lua")),
                release: Script::new(include_str!("lua/release.lua")),
                forget: Script::new(include_str!("lua/forget.lua")),
                empty: Script::new(include_str!("lua/empty.lua")),
            },
            repairs: Repairs::default(),
            emptied: emptied.clone(),
        });
        let keeper = Keeper::default();
        keeper.spawn("repair of Redis", |stop| repair::run(inner.clone(), stop));
        keeper.spawn("Redis supervisor", |stop| {
            supervise::run(config, clock, emptied, sender, stop)
        });
        Ok(Self {
            inner,
            keeper: Arc::new(keeper),
        })
    }

    /// Waits until a background task that Redis cannot be used without has ended, and names it: a defect.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn failed(&self) -> &'static str {
        self.keeper.failed().await
    }

    /// Whether there is a trusted connection.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.inner.session.borrow().is_some()
    }

    /// How long one request waits for Redis in all.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.inner.timeout
    }

    /// What stands under `key`.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn get(&self, key: &Key) -> Result<Option<Stored>, CacheError> {
        let found: Option<Vec<u8>> = self
            .inner
            .ask("redis_get", async |mut connection| {
                redis::cmd("GET")
                    .arg(name(key))
                    .query_async(&mut connection)
                    .await
            })
            .await?;
        Ok(found.and_then(value::parse))
    }

    /// What stands under each of `keys`, in their order.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn get_many(&self, keys: &[Key]) -> Result<Vec<Option<Stored>>, CacheError> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let found: Vec<Option<Vec<u8>>> = self
            .inner
            .ask("redis_get", async |mut connection| {
                let mut command = redis::cmd("MGET");
                for key in keys {
                    command.arg(name(key));
                }
                command.query_async(&mut connection).await
            })
            .await?;
        Ok(found
            .into_iter()
            .map(|value| value.and_then(value::parse))
            .collect())
    }

    /// As [`Cache::get_many`], but documents have no bodies: where there would be one, it is empty.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn get_heads(&self, keys: &[Key]) -> Result<Vec<Option<Stored>>, CacheError> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        let found: Vec<Vec<u8>> = self
            .inner
            .ask("redis_get", async |mut connection| {
                let mut commands = redis::pipe();
                for key in keys {
                    commands.getrange(name(key), 0, value::HEADER as isize - 1);
                }
                commands.query_async(&mut connection).await
            })
            .await?;
        // Nothing is no value either.
        Ok(found.into_iter().map(value::parse).collect())
    }

    /// Takes the lease on `key` for a lookup, unless something stands there. Call it before the log is asked.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn lease_for_read(&self, key: &Key, token: &Token) -> Result<Lease, CacheError> {
        let found: Option<Vec<u8>> = self
            .inner
            .ask("redis_lease", async |mut connection| {
                redis::cmd("SET")
                    .arg(name(key))
                    .arg(token.as_str())
                    .arg("NX")
                    .arg("GET")
                    .arg("PX")
                    .arg(LEASE.as_millis())
                    .query_async(&mut connection)
                    .await
            })
            .await?;
        Ok(match found {
            None => Lease::Taken,
            // What nobody of ours wrote is treated as somebody's lease: looked past, and gone when its time is up.
            Some(bytes) => Lease::Found(value::parse(bytes).unwrap_or(Stored::Leased)),
        })
    }

    /// Takes the lease on `key` for a write, if its place is empty. Call it before the write is published.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn lease_for_write(&self, key: &Key, token: &Token) -> Result<(), CacheError> {
        self.inner
            .ask("redis_lease", async |mut connection| {
                self.inner
                    .scripts
                    .lease
                    .key(name(key))
                    .arg(token.as_str())
                    .arg(LEASE.as_millis())
                    .invoke_async(&mut connection)
                    .await
            })
            .await
    }

    /// Tells Redis of a written version: replaces what is older.
    ///
    /// # Errors
    /// [`CacheError`]; the older value may still stand, or the new one may yet come, at any later time.
    pub async fn install(
        &self,
        key: &Key,
        token: &Token,
        document: &Document,
        now: Timestamp,
    ) -> Result<(), CacheError> {
        self.inner
            .ask("redis_install", async |mut connection| {
                self.inner
                    .scripts
                    .install
                    .key(name(key))
                    .arg(token.as_str())
                    .arg(value::version_digits(document.version))
                    .arg(value::encode(document))
                    .arg(self.inner.residency(document, now))
                    .invoke_async(&mut connection)
                    .await
            })
            .await
    }

    /// Puts what a lookup found in place of the token it took before; returns whether it did.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn fill(
        &self,
        key: &Key,
        token: &Token,
        fill: Fill<'_>,
        now: Timestamp,
    ) -> Result<bool, CacheError> {
        let (bytes, keep) = match fill {
            Fill::Document(document) => {
                (value::encode(document), self.inner.residency(document, now))
            }
            Fill::Absent => (value::ABSENT.to_vec(), millis(ABSENT_FOR)),
        };
        self.inner
            .ask("redis_fill", async |mut connection| {
                self.inner
                    .scripts
                    .fill
                    .key(name(key))
                    .arg(token.as_str())
                    .arg(bytes)
                    .arg(keep)
                    .invoke_async(&mut connection)
                    .await
            })
            .await
    }

    /// Gives up the lease that `token` is, if it still stands: the next one who looks the key up may take it at once.
    ///
    /// # Errors
    /// [`CacheError`]; the token goes when its time is up.
    pub async fn release(&self, key: &Key, token: &Token) -> Result<(), CacheError> {
        self.inner
            .ask("redis_release", async |mut connection| {
                self.inner
                    .scripts
                    .release
                    .key(name(key))
                    .arg(token.as_str())
                    .invoke_async(&mut connection)
                    .await
            })
            .await
    }

    /// Deletes what is older than each of `versions`: values, tokens and negative entries. Idempotent.
    ///
    /// # Errors
    /// [`CacheError`]; some of it may have been done, or may yet be.
    pub async fn forget(&self, versions: &[(Key, Version)]) -> Result<(), CacheError> {
        self.inner.forget(versions).await
    }

    /// Empties the database, which stays claimed. One that is not claimed any more is left alone.
    ///
    /// # Errors
    /// [`CacheError`]; it may have been emptied, or may yet be.
    pub async fn flush(&self) -> Result<(), CacheError> {
        let () = self
            .inner
            .ask("redis_flush", async |mut connection| {
                self.inner
                    .scripts
                    .empty
                    .key(session::MARKER)
                    .invoke_async(&mut connection)
                    .await
            })
            .await?;
        METRICS.redis_flushed();
        self.inner.emptied.send_modify(|n| *n += 1);
        Ok(())
    }

    /// Changes whenever this process found or made the database empty.
    #[must_use]
    pub fn emptied(&self) -> watch::Receiver<u64> {
        self.inner.emptied.subscribe()
    }

    /// About how many more bytes fit: what is left of four fifths of `maxmemory`; without one, as many as you like.
    ///
    /// # Errors
    /// [`CacheError`].
    pub async fn room(&self) -> Result<u64, CacheError> {
        let info: String = self
            .inner
            .ask("redis_info", async |mut connection| {
                redis::cmd("INFO")
                    .arg("memory")
                    .query_async(&mut connection)
                    .await
            })
            .await?;
        let value = |name: &str| {
            info.lines().find_map(|line| {
                line.strip_prefix(name)?
                    .strip_prefix(':')?
                    .trim()
                    .parse::<u64>()
                    .ok()
            })
        };
        match (value("maxmemory"), value("used_memory")) {
            (Some(most), Some(used)) if most > 0 => Ok((most / 5 * 4).saturating_sub(used)),
            _ => Ok(u64::MAX),
        }
    }

    /// Has the background delete what is older than `version`, as soon as Redis can be told.
    pub fn repair_later(&self, key: Key, version: Version) {
        self.inner.repairs.add(key, version);
    }
}

impl Inner {
    /// Runs one command on the present session; a broken connection ends the session.
    async fn ask<T>(
        &self,
        operation: &'static str,
        command: impl AsyncFnOnce(MultiplexedConnection) -> Result<T, RedisError>,
    ) -> Result<T, CacheError> {
        let session = self.session.borrow().clone();
        let Some(session) = session else {
            return Err(CacheError("not connected".to_owned()));
        };
        command(session.connection()).await.map_err(|error| {
            METRICS.error(operation);
            if error.is_unrecoverable_error() {
                session.closed.cancel();
            }
            CacheError(format!("{operation}: {}", chain(&error)))
        })
    }

    async fn forget(&self, versions: &[(Key, Version)]) -> Result<(), CacheError> {
        if versions.is_empty() {
            return Ok(());
        }
        self.ask("redis_forget", async |mut connection| {
            let mut call = self.scripts.forget.prepare_invoke();
            for (key, version) in versions {
                call.key(name(key)).arg(value::version_digits(*version));
            }
            call.invoke_async(&mut connection).await
        })
        .await
    }

    /// How many milliseconds Redis keeps `document`.
    fn residency(&self, document: &Document, now: Timestamp) -> u64 {
        let life = match (&document.body, document.expires_at) {
            (None, _) => MARKER_FOR,
            (Some(_), None) => self.residency,
            (Some(_), Some(at)) => self.residency.min(at.since(now) + MARKER_FOR),
        };
        millis(life)
    }
}

fn name(key: &Key) -> String {
    format!("{}e:{key}", session::PREFIX)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis())
        .unwrap_or(u64::MAX)
        .max(1)
}

/// Claims the database for `setup`, and empties it when a log it was filled from is gone.
pub(crate) async fn claim(
    config: RedisConfig,
    clock: &Arc<Clock>,
    empty: bool,
) -> Result<(), OpenError> {
    let server = server_name(&config);
    let cache = Cache::open(config, clock.clone()).await?;
    if !cache.is_up() {
        return Err(OpenError::unreachable(server, "it could not be claimed"));
    }
    if empty {
        cache
            .flush()
            .await
            .map_err(|error| OpenError::unreachable(server, error))?;
    }
    Ok(())
}
