//! What Redis is owed: batches that are stored, and that their worker could not tell Redis of.
//!
//! Whoever reaches both servers pays, by emptying Redis.

use birb_nest_core::Version;

use tokio::time::timeout;

use super::{Database, LookupError, borrowed::Borrowed, database_error};

/// A shard that owes, and how far it was stored when that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Debt {
    shard: i16,
    applied_to: Version,
}

impl Database {
    /// The shards that owe.
    ///
    /// # Errors
    /// [`LookupError`] within `POSTGRES_TIMEOUT`.
    pub async fn redis_debts(&self) -> Result<Vec<Debt>, LookupError> {
        let asking = async {
            let mut connection = Borrowed::from(&self.pool).await?;
            let rows = sqlx::query_as("select shard, applied_to from shard_state where redis_debt")
                .fetch_all(&mut *connection)
                .await
                .map_err(|error| database_error(&error))?;
            connection.done();
            Ok(rows)
        };
        let rows: Vec<(i16, i64)> = self.within(asking).await?;
        Ok(rows
            .into_iter()
            .filter_map(|(shard, applied_to)| {
                let applied_to = Version::new(u64::try_from(applied_to).ok()?)?;
                Some(Debt { shard, applied_to })
            })
            .collect())
    }

    /// Records that Redis was emptied after `debts` were asked for. A shard that has stored more since may owe again,
    /// and stays in debt.
    ///
    /// # Errors
    /// [`LookupError`]; doing it again is safe.
    pub async fn clear_redis_debts(&self, debts: &[Debt]) -> Result<(), LookupError> {
        let shards: Vec<i16> = debts.iter().map(|debt| debt.shard).collect();
        let applied_to: Vec<i64> = debts.iter().map(|debt| debt.applied_to.as_i64()).collect();
        let clearing = async {
            let mut connection = Borrowed::from(&self.pool).await?;
            sqlx::query(
                "update shard_state s set redis_debt = false
                 from unnest($1::smallint[], $2::bigint[]) as paid (shard, applied_to)
                 where s.shard = paid.shard and s.applied_to = paid.applied_to",
            )
            .bind(shards)
            .bind(applied_to)
            .execute(&mut *connection)
            .await
            .map_err(|error| database_error(&error))?;
            connection.done();
            Ok(())
        };
        self.within(clearing).await
    }

    async fn within<T>(
        &self,
        asking: impl Future<Output = Result<T, String>>,
    ) -> Result<T, LookupError> {
        timeout(self.timeout, asking)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {:?}", self.timeout)))
            .map_err(LookupError)
    }
}
