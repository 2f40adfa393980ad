//! PostgreSQL: the projection that keeps everything.
//!
//! [`Database`] answers lookups from a pool; [`ShardSession`] is the one connection through which a shard's owner
//! stores batches; [`Membership`] is how workers count each other; setup has its own in [`mod@self`]'s `schema`.

mod borrowed;
mod connect;
mod dead_keys;
mod debts;
mod janitor;
mod letters;
mod list;
mod lookup;
mod members;
mod newest;
mod reshard;
mod schema;
mod shard;

use std::{sync::Arc, time::Duration};

use birb_nest_core::{Backoff, Base, Entry, Key, Place, Range, Shard, ShardCount, Version};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;

use self::{
    borrowed::Borrowed,
    schema::{Failure, judge_shards},
};
pub use self::{
    dead_keys::{DeadKey, DueKey},
    debts::Debt,
    janitor::{Janitor, Step},
    letters::Letter,
    list::Listed,
    members::{Membership, OwnedShard, Roster},
    newest::{Newest, Search},
    shard::{Applied, ApplyError, ShardSession, ShardState},
};
pub(crate) use self::{
    reshard::{Beginning, Numbers},
    schema::SetupSession,
};
use crate::{
    clock::Clock,
    config::PostgresConfig,
    jetstream::{AppliedTo, Stored},
    keeper::Keeper,
    metrics::METRICS,
    refusal::{OpenError, chain},
};

/// How often the connection is checked and the clock read, while all is well and while it is not.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// How long a piece of the table may take.
const SEARCH_LIMIT: Duration = Duration::from_secs(40);
const CHECK_WHILE_DOWN: Duration = Duration::from_millis(250);

/// PostgreSQL did not answer: nothing is known of the key.
#[derive(Debug, thiserror::Error)]
#[error("postgresql cannot be asked: {0}")]
pub struct LookupError(String);

/// What PostgreSQL says of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The base of the key's shard now; a lookup that asked the log under another one must be repeated.
    pub base: Base,
    /// How far the key's shard is stored.
    pub applied_to: Version,
    /// The stored entry, tombstones and expired ones included.
    pub entry: Option<Entry>,
    /// A newer write of the key, which PostgreSQL refused for good.
    pub dead: Option<DeadLetter>,
}

/// Where a refused write lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadLetter {
    /// Its version.
    pub version: Version,
    /// Its sequence in the dead-letter stream.
    pub sequence: u64,
}

/// A handle on PostgreSQL for lookups; cheap to clone.
#[derive(Clone)]
pub struct Database {
    pool: PgPool,
    shards: ShardCount,
    up: watch::Receiver<bool>,
    resharded: watch::Receiver<Option<OpenError>>,
    timeout: Duration,
    keeper: Arc<Keeper>,
}

/// What the supervisor has: the connections of others, to count and to close them, and one to ask through.
struct Pools {
    lookups: PgPool,
    watching: PgPool,
}

/// What the supervisor tells of.
struct Told {
    up: watch::Sender<bool>,
    /// Why this process is of no use any more.
    resharded: watch::Sender<Option<OpenError>>,
}

impl Database {
    /// Connects, checks the schema, and keeps watch from then on: over the connection and over the clock. `role` shows
    /// in `pg_stat_activity`. `shards` is how many the nest is taken to have.
    ///
    /// # Errors
    /// Only when the server, its schema or the number of shards is refused; a server that cannot be reached yet is waited for
    /// in the background.
    pub async fn open(
        config: &PostgresConfig,
        role: &str,
        clock: Arc<Clock>,
        shards: ShardCount,
    ) -> Result<Self, OpenError> {
        let server = connect::server_name(config);
        let options = connect::options(config, &format!("birb-nest {role}"))?;
        let pool_of = |n_connections| {
            PgPoolOptions::new()
                .max_connections(n_connections)
                .acquire_timeout(config.postgres_timeout)
        };
        let pool = pool_of(config.postgres_max_connections)
            // A primary that becomes a standby ends its connections; so looking once at each is enough. A standby may
            // lag behind what was acknowledged.
            .after_connect(|connection, _| Box::pin(schema::refuse_standby(connection)))
            .connect_lazy_with(options.clone());
        // Of its own: a server whose lookups wait for each other is not down. It is not closed to standbys: a pool does
        // not say why it has no connection, and whoever looks is to see that.
        let watching = pool_of(1).connect_lazy_with(options);
        let checking = timeout(
            config.postgres_timeout,
            schema::check(&watching, &server, &clock, true),
        );
        let checked = checking
            .await
            .unwrap_or_else(|_| {
                let error = OpenError::unreachable(&server, "no answer in time");
                Err(Failure::NoAnswer(error))
            })
            .map_err(OpenError::from)
            .and_then(|found| found.map_or(Ok(()), |found| judge_shards(&server, found, shards)));
        let up = match checked {
            Ok(()) => true,
            Err(error) if error.is_refusal() => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "starting without PostgreSQL");
                false
            }
        };
        let ((up, is_up), (why, resharded)) = (watch::channel(up), watch::channel(None));
        let told = Told { up, resharded: why };
        let (keeper, limit) = (Keeper::default(), config.postgres_timeout);
        keeper.spawn("PostgreSQL supervisor", |stop| {
            let pools = Pools {
                lookups: pool.clone(),
                watching,
            };
            watch_over(pools, server, clock, shards, limit, told, stop)
        });
        Ok(Self {
            pool,
            shards,
            up: is_up,
            resharded,
            timeout: limit,
            keeper: Arc::new(keeper),
        })
    }

    /// Waits until a background task that PostgreSQL cannot be used without has ended, and names it: a defect.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn failed(&self) -> &'static str {
        self.keeper.failed().await
    }

    /// Waits until the nest has another number of shards than this process takes it to have, and says so: the process is of
    /// no use any more.
    ///
    /// # Cancel safety
    /// Safe.
    pub async fn resharded(&self) -> OpenError {
        let mut resharded = self.resharded.clone();
        match resharded.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(error)) => error.clone(),
            // The supervisor ends with the last handle, and this is one.
            _ => std::future::pending().await,
        }
    }

    /// Whether the last check succeeded. While it did not, lookups fail at once.
    #[must_use]
    pub fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// What is stored under `key`.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn lookup(&self, key: &Key, shard: Shard) -> Result<Row, LookupError> {
        let rows = self.lookup_many(&[(key.clone(), shard)]).await?;
        rows.into_iter()
            .next()
            .ok_or_else(|| LookupError("no answer for the key".to_owned()))
    }

    /// Changes when PostgreSQL goes and comes.
    #[must_use]
    pub fn up(&self) -> watch::Receiver<bool> {
        self.up.clone()
    }

    /// Goes on with a search for the newest keys; tells whether there is more to look at. A search takes as many calls as the
    /// table is large.
    ///
    /// # Errors
    /// [`LookupError`], within 40 s; doing it again is safe.
    pub async fn go_on_with(&self, search: &mut Search) -> Result<bool, LookupError> {
        // The server's own statement_timeout is shorter; this one is for a server that does not answer at all.
        timeout(SEARCH_LIMIT, search.step(&self.pool))
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {SEARCH_LIMIT:?}")))
            .map_err(LookupError)
    }

    /// Keys of `range` in the order of their bytes, tombstones, expired ones and dead letters included, of at most
    /// `limit` rows; and where to go on if there may be more.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn list(
        &self,
        range: &Range,
        limit: u32,
    ) -> Result<(Vec<Listed>, Option<Place>), LookupError> {
        self.ask(list::page(&self.pool, range, limit)).await
    }

    /// How many keys of `range` have a value; counting ends at `most`.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn count(&self, range: &Range, most: u32) -> Result<u64, LookupError> {
        self.ask(list::count(&self.pool, range, most)).await
    }

    /// Dead letters behind that of the key `after`, in the order of their keys' bytes, at most `limit`.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn letters(
        &self,
        after: Option<&Key>,
        parked_only: bool,
        limit: u32,
    ) -> Result<Vec<Letter>, LookupError> {
        self.ask(letters::list(&self.pool, after, parked_only, limit))
            .await
    }

    /// The dead letter of `key` if it has this version.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn letter(&self, key: &Key, version: Version) -> Result<Option<Letter>, LookupError> {
        self.ask(letters::find(&self.pool, key, version)).await
    }

    /// Has the dead letter of `key` tried again at once; tells whether there is one of this version.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn replay(&self, key: &Key, version: Version) -> Result<bool, LookupError> {
        self.ask(letters::replay(&self.pool, key, version)).await
    }

    /// Has parked dead letters tried again at once, at most `limit`; tells how many.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn replay_parked(&self, limit: u32) -> Result<u64, LookupError> {
        self.ask(letters::replay_parked(&self.pool, limit)).await
    }

    async fn ask<T>(
        &self,
        asking: impl Future<Output = Result<T, String>>,
    ) -> Result<T, LookupError> {
        if !self.is_up() {
            return Err(LookupError("it is down".to_owned()));
        }
        timeout(self.timeout, asking)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout)))
            .map_err(LookupError)
    }

    /// [`Database::applied_to`], for the log to ask.
    #[must_use]
    pub fn progress(&self) -> AppliedTo {
        let database = self.clone();
        Arc::new(move || {
            let database = database.clone();
            Box::pin(async move { database.applied_to().await })
        })
    }

    /// How far each shard is stored, in their order; `None` when PostgreSQL cannot say.
    pub async fn applied_to(&self) -> Option<Vec<Version>> {
        let stored = self.stored().await?;
        Some(stored.iter().map(|stored| stored.applied_to).collect())
    }

    /// The same with the life of each shard.
    pub async fn stored(&self) -> Option<Vec<Stored>> {
        if !self.is_up() {
            return None;
        }
        // Of shards of another number nothing is said.
        let asking = async {
            let mut connection = Borrowed::from(&self.pool).await.ok()?;
            let rows = sqlx::query_as(
                "select base, applied_to from shard_state join nest_state n on n.shards = $1 order by shard",
            )
            .bind(reshard::as_i16(self.shards))
            .fetch_all(&mut *connection)
            .await
            .ok()?;
            connection.done();
            Some(rows)
        };
        let rows: Vec<(i64, i64)> = timeout(self.timeout, asking).await.ok()??;
        if rows.len() != usize::from(self.shards.get()) {
            return None;
        }
        let stored = |(base, applied_to): (i64, i64)| {
            Some(Stored {
                base: Base::new(u64::try_from(base).ok()?)?,
                applied_to: Version::new(u64::try_from(applied_to).ok()?)?,
            })
        };
        rows.into_iter().map(stored).collect()
    }

    /// What is stored under each of `keys`, in their order.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn lookup_many(&self, keys: &[(Key, Shard)]) -> Result<Vec<Row>, LookupError> {
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        if !self.is_up() {
            return Err(LookupError("it is down".to_owned()));
        }
        let looking = lookup::many(&self.pool, self.shards, keys);
        let found = match timeout(self.timeout, looking).await {
            Ok(found) => found.map_err(LookupError),
            Err(_) => Err(LookupError(format!("no answer within {:?}", self.timeout))),
        };
        if found.is_err() {
            METRICS.error("postgres_lookup");
        }
        found
    }
}

async fn watch_over(
    pools: Pools,
    server: String,
    clock: Arc<Clock>,
    shards: ShardCount,
    limit: Duration,
    told: Told,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(CHECK_WHILE_DOWN, CHECK_EVERY);
    let mut wait = CHECK_EVERY;
    let mut wrong = None;
    loop {
        METRICS.dependency_up("postgres", *told.up.borrow());
        METRICS.clock_skew(clock.skew_seconds());
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => {
                tokio::join!(pools.lookups.close(), pools.watching.close());
                return;
            }
        }
        let (n_open, n_idle) = (pools.lookups.size() as usize, pools.lookups.num_idle());
        METRICS.pool(n_idle, n_open.saturating_sub(n_idle));
        let checked = timeout(
            limit,
            schema::check(&pools.watching, &server, &clock, false),
        )
        .await;
        let was_up = *told.up.borrow();
        if let Ok(Ok(Some(found))) = checked
            && let Err(error) = judge_shards(&server, found, shards)
        {
            told.up.send_replace(false);
            told.resharded.send_replace(Some(error));
            stop.cancelled().await;
            return;
        }
        wait = match checked {
            Ok(Ok(_)) => {
                if !was_up {
                    tracing::info!("{server} is ready");
                }
                wrong = None;
                backoff.succeed();
                CHECK_EVERY
            }
            failure => {
                let (why, is_wrong) = match failure {
                    Ok(Err(Failure::Wrong(error))) => (error.to_string(), true),
                    Ok(Err(Failure::NoAnswer(error))) => (error.to_string(), false),
                    _ => (format!("no answer within {limit:?}"), false),
                };
                // That one gives no answer is told with its loss; that it is the wrong one may turn out later.
                let is_news = is_wrong && wrong.as_ref() != Some(&why);
                if was_up {
                    tracing::warn!(why, "lost {server}");
                } else if is_news {
                    tracing::warn!(why, "{server} is still not ready");
                } else {
                    tracing::debug!(why, "{server} is still not ready");
                }
                if is_wrong {
                    wrong = Some(why);
                }
                backoff.fail(rand::random())
            }
        };
        let is_up = backoff.n_failures() == 0;
        if is_up != was_up {
            told.up.send_replace(is_up);
        }
    }
}

/// What a query answers within `limit`, or a sentence.
async fn within<T>(
    limit: Duration,
    asking: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, String> {
    match timeout(limit, asking).await {
        Ok(answer) => answer.map_err(|error| database_error(&error)),
        Err(_) => Err(format!("no answer within {limit:?}")),
    }
}

fn database_error(error: &sqlx::Error) -> String {
    match error.as_database_error() {
        Some(inner) => match inner.code() {
            Some(code) => format!("{} (SQLSTATE {code})", inner.message()),
            None => inner.message().to_owned(),
        },
        None => chain(error),
    }
}
