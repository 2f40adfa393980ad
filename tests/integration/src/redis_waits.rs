//! When Redis has been told of everything, and when it stays as it is after it was emptied.

use anyhow::Result;

use crate::world::{World, eventually};

impl World<'_> {
    /// As [`World::flush_redis`] while a process runs: it notices within a second that the marker is gone, and empties Redis
    /// once more if there is something in it. When this returns, it has.
    pub async fn empty_redis(&self) -> Result<()> {
        self.flush_redis().await?;
        eventually("somebody says again whose Redis this is", async || {
            let run: Option<String> = redis::cmd("GET")
                .arg("birb:run")
                .query_async(&mut self.redis().await?)
                .await?;
            Ok(run.map(drop))
        })
        .await
    }

    /// Waits until PostgreSQL knows that Redis was told of all that is stored.
    pub async fn redis_is_told(&self) -> Result<()> {
        eventually("PostgreSQL knows that Redis was told", async || {
            let behind =
                "select count(*) from shard_state where applied_to > base and told_to < applied_to";
            Ok((self.sql(behind).await?.trim() == "0").then_some(()))
        })
        .await
    }
}
