//! How workers count each other and see which shards are taken.
//!
//! Everything is an advisory lock, so it ends with the session that holds it: a dead worker is not a member, and its
//! shards are free.

use std::time::Duration;

use birb_nest_core::{Shard, Version};
use sqlx::PgConnection;

use super::{connect, within};
use crate::config::PostgresConfig;

/// Class of the locks that own a shard: "birb" in ASCII. The object is the shard.
pub(super) const OWNER_CLASS: i32 = 0x6269_7262;
/// Class of the lock that members share: "birc" in ASCII. The object is 0.
const MEMBER_CLASS: i32 = 0x6269_7263;

/// `pg_locks` shows two-key advisory locks with `objsubid` 2, and those of all databases.
macro_rules! held {
    ($class:literal, $rest:literal) => {
        concat!(
            "with held as (
                select pid, objid::bigint as object from pg_locks
                where locktype = 'advisory' and granted and objsubid = 2 and classid::bigint = ",
            $class,
            " and database = (select oid from pg_database where datname = current_database())
            ) ",
            $rest
        )
    };
}

/// A member asks for the roster again and again: one whose session has begun no query for `$2` seconds hangs. Who may not see
/// that of another role's sessions takes them for alive.
const OTHERS: &str = held!(
    "$1",
    "select count(distinct pid) from held left join pg_stat_activity a using (pid)
     where pid <> pg_backend_pid()
       and coalesce(a.query_start > clock_timestamp() - $2 * interval '1 second', true)"
);

const OWNERS: &str = held!(
    "$1",
    "select object::smallint as shard, pid, coalesce(a.application_name, '') as application, s.applied_to,
            coalesce(a.state = 'active' and a.query_start > clock_timestamp() - interval '40 seconds', false) as busy,
            (extract(epoch from a.query_start) * 1000000)::bigint as asked_at
     from held join pg_stat_activity a using (pid) join shard_state s on s.shard = object"
);

/// Who is there, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    /// Workers that are members beside this one, and do not hang.
    pub n_others: usize,
    /// The shards that somebody owns.
    pub owned: Vec<OwnedShard>,
}

/// A shard and the session that owns it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedShard {
    /// Its number.
    pub index: u16,
    /// The server process of the owner's session.
    pub backend: i32,
    /// The owner's name; empty when it does not say.
    pub worker: String,
    /// How far it has come.
    pub applied_to: Version,
    /// PostgreSQL has been working for it, for less time than the longest statement may take.
    pub is_busy: bool,
    /// When it began its last statement, in microseconds of PostgreSQL's clock; `None` if this worker may not see that.
    pub asked_at: Option<i64>,
}

/// A worker's standing announcement that it is there, once it has joined.
pub struct Membership {
    connection: PgConnection,
    limit: Duration,
    has_joined: bool,
}

impl Membership {
    /// Connects, as the worker of this name. Whoever has not joined can look, and is not counted.
    ///
    /// # Errors
    /// A sentence.
    pub async fn open(config: &PostgresConfig, worker: &str) -> Result<Self, String> {
        let application = format!("{}membership", application(worker));
        Ok(Self {
            connection: connect::connect(config, &application).await?,
            limit: config.postgres_timeout,
            has_joined: false,
        })
    }

    /// Announces the worker for as long as the connection lives. Idempotent.
    ///
    /// # Errors
    /// A sentence; the membership must be opened anew.
    pub async fn join(&mut self) -> Result<(), String> {
        if !self.has_joined {
            self.announce("select pg_advisory_lock_shared($1, 0)")
                .await?;
            self.has_joined = true;
        }
        Ok(())
    }

    /// Takes the announcement back. Idempotent.
    ///
    /// # Errors
    /// A sentence; the membership must be opened anew.
    pub async fn leave(&mut self) -> Result<(), String> {
        if self.has_joined {
            self.announce("select pg_advisory_unlock_shared($1, 0)")
                .await?;
            self.has_joined = false;
        }
        Ok(())
    }

    async fn announce(&mut self, sql: &'static str) -> Result<(), String> {
        let announcing = sqlx::query(sql)
            .bind(MEMBER_CLASS)
            .execute(&mut self.connection);
        within(self.limit, announcing).await.map(drop)
    }

    /// Counts members and owned shards. Members that have not asked for as long as `patience` hang, and are not counted until
    /// they ask again.
    ///
    /// # Errors
    /// A sentence; the membership may have ended and must be joined anew.
    pub async fn roster(&mut self, patience: Duration) -> Result<Roster, String> {
        let asking = async {
            let n_others: i64 = sqlx::query_scalar(OTHERS)
                .bind(i64::from(MEMBER_CLASS))
                .bind(patience.as_secs_f64())
                .fetch_one(&mut self.connection)
                .await?;
            let owners: Vec<(i16, i32, String, i64, bool, Option<i64>)> = sqlx::query_as(OWNERS)
                .bind(i64::from(OWNER_CLASS))
                .fetch_all(&mut self.connection)
                .await?;
            Ok((n_others, owners))
        };
        let (n_others, owners) = within(self.limit, asking).await?;
        Ok(Roster {
            n_others: usize::try_from(n_others).unwrap_or(0),
            owned: owners
                .into_iter()
                .filter_map(
                    |(shard, backend, application, applied_to, is_busy, asked_at)| {
                        Some(OwnedShard {
                            index: u16::try_from(shard).ok()?,
                            backend,
                            worker: worker_of(&application).to_owned(),
                            applied_to: Version::new(u64::try_from(applied_to).ok()?)?,
                            is_busy,
                            asked_at,
                        })
                    },
                )
                .collect(),
        })
    }

    /// Ends the session that owns a shard, if it is still that one.
    ///
    /// # Errors
    /// A sentence; the membership may have ended and must be joined anew.
    pub async fn end(&mut self, owned: &OwnedShard) -> Result<(), String> {
        let ending = sqlx::query(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where pid = $1 and datname = current_database() and starts_with(application_name, $2)",
        )
        .bind(owned.backend)
        .bind(application(&owned.worker))
        .execute(&mut self.connection);
        within(self.limit, ending).await.map(drop)
    }

    /// Ends every session of the worker called `worker`: its shards are free and it is no member any more. Should it
    /// still live, whatever it tries to write fails.
    ///
    /// # Errors
    /// A sentence; the membership may have ended and must be joined anew.
    pub async fn evict(&mut self, worker: &str) -> Result<(), String> {
        within(
            self.limit,
            sqlx::query(
                "select pg_terminate_backend(pid) from pg_stat_activity
                 where datname = current_database() and starts_with(application_name, $1)",
            )
            .bind(application(worker))
            .execute(&mut self.connection),
        )
        .await?;
        Ok(())
    }
}

/// What the `application_name` of all sessions of a worker begins with.
pub(super) fn application(worker: &str) -> String {
    format!("birb-nest worker {worker}: ")
}

fn worker_of(application: &str) -> &str {
    let named = application.strip_prefix("birb-nest worker ");
    named
        .and_then(|rest| rest.split_once(": "))
        .map_or("", |(worker, _)| worker)
}

impl Roster {
    /// Whether somebody owns `shard`.
    #[must_use]
    pub fn is_owned(&self, shard: Shard) -> bool {
        self.owned
            .iter()
            .any(|owned| usize::from(owned.index) == shard.index())
    }
}
