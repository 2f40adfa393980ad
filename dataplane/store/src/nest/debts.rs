//! Paying what Redis is owed: a batch that a worker stored, and could not tell it of.

use std::time::Duration;

use super::Nest;
use crate::metrics::METRICS;

/// How often a process looks for debts, on average: any of them may be the one that reaches Redis.
const LOOK_EVERY: Duration = Duration::from_secs(1);

impl Nest {
    /// Empties Redis whenever it is owed something and can be reached. Never ends.
    pub(super) async fn pay_redis_debts(&self) {
        loop {
            // Not all at once: the first one pays for all.
            tokio::time::sleep(LOOK_EVERY.mul_f64(rand::random_range(0.5..1.5))).await;
            if self.0.database.is_up()
                && self.0.cache.is_up()
                && let Err(why) = self.pay().await
            {
                tracing::debug!(why, "what Redis is owed waits");
            }
        }
    }

    async fn pay(&self) -> Result<(), String> {
        let (cache, database) = (&self.0.cache, &self.0.database);
        let debts = database
            .redis_debts()
            .await
            .map_err(|error| error.to_string())?;
        if debts.is_empty() {
            return Ok(());
        }
        cache.flush().await.map_err(|error| error.to_string())?;
        tracing::warn!(
            n_shards = debts.len(),
            "emptied Redis: it had not been told of what these shards stored"
        );
        database
            .clear_redis_debts(&debts)
            .await
            .map_err(|error| error.to_string())?;
        METRICS.redis_debt("paid", debts.len());
        Ok(())
    }
}
