//! How workers count each other and see which shards are taken.
//!
//! Everything is an advisory lock, so it ends with the session that holds it: a dead worker is not a member, and its
//! shards are free.

use std::time::Duration;

use birb_nest_core::Shard;
use sqlx::{ConnectOptions, Connection, PgConnection, Row as _};
use tokio::time::timeout;

use super::{connect, database_error};
use crate::config::PostgresConfig;

/// Class of the locks that own a shard: "birb" in ASCII. The object is the shard.
pub(super) const OWNER_CLASS: i32 = 0x6269_7262;
/// Class of the lock that members share: "birc" in ASCII. The object is 0.
const MEMBER_CLASS: i32 = 0x6269_7263;

/// `pg_locks` shows two-key advisory locks with `objsubid` 2, and those of all databases.
const ROSTER: &str = "\
with held as (
    select pid, classid::bigint as class, objid::bigint as object from pg_locks
    where locktype = 'advisory' and granted and objsubid = 2
      and database = (select oid from pg_database where datname = current_database())
)
select (select count(distinct pid) from held where class = $2) as members,
       array(select object::smallint from held where class = $1) as owned";

/// Who is there, at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    /// Workers, this one included; at least 1.
    pub n_members: usize,
    /// Numbers of the shards that somebody owns.
    pub owned: Vec<u16>,
}

/// A worker's standing announcement that it is there.
pub struct Membership {
    connection: PgConnection,
    limit: Duration,
}

impl Membership {
    /// Announces this worker for as long as the connection lives.
    ///
    /// # Errors
    /// A sentence; nothing is announced then.
    pub async fn join(config: &PostgresConfig) -> Result<Self, String> {
        let limit = config.postgres_timeout;
        let joining = async {
            let options = connect::options(config, "birb-nest worker: membership")
                .map_err(|error| error.to_string())?;
            let mut connection = options
                .connect()
                .await
                .map_err(|error| database_error(&error))?;
            sqlx::query("select pg_advisory_lock_shared($1, 0)")
                .bind(MEMBER_CLASS)
                .execute(&mut connection)
                .await
                .map_err(|error| database_error(&error))?;
            Ok::<_, String>(connection)
        };
        let connection = timeout(limit, joining)
            .await
            .map_err(|_| format!("no answer within {limit:?}"))??;
        Ok(Self { connection, limit })
    }

    /// Counts members and owned shards.
    ///
    /// # Errors
    /// A sentence; the membership may have ended and must be joined anew.
    pub async fn roster(&mut self) -> Result<Roster, String> {
        let row = timeout(
            self.limit,
            sqlx::query(ROSTER)
                .bind(i64::from(OWNER_CLASS))
                .bind(i64::from(MEMBER_CLASS))
                .fetch_one(&mut self.connection),
        )
        .await
        .map_err(|_| format!("no answer within {:?}", self.limit))?
        .map_err(|error| database_error(&error))?;
        let read = |error: sqlx::Error| database_error(&error);
        let n_members: i64 = row.try_get("members").map_err(read)?;
        let owned: Vec<i16> = row.try_get("owned").map_err(read)?;
        Ok(Roster {
            n_members: usize::try_from(n_members).unwrap_or(0).max(1),
            owned: owned
                .into_iter()
                .filter_map(|shard| u16::try_from(shard).ok())
                .collect(),
        })
    }

    /// Leaves at once instead of when the server notices.
    pub async fn leave(self) {
        let _ = timeout(self.limit, self.connection.close()).await;
    }
}

impl Roster {
    /// Whether somebody owns `shard`.
    #[must_use]
    pub fn is_owned(&self, shard: Shard) -> bool {
        self.owned
            .iter()
            .any(|&owned| usize::from(owned) == shard.index())
    }
}
