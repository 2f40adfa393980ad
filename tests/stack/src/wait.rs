//! Waiting: for a condition, and for blocking work from async code.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How often a condition is looked at again.
pub(crate) const POLL: Duration = Duration::from_millis(5);

/// Blocks until `done` says true; after `limit` fails with "waited `limit` in vain until `what`".
///
/// # Errors
/// It did not in time, or `done` failed.
pub fn until(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !done()? {
        if Instant::now() >= deadline {
            bail!("waited {limit:?} in vain until {what}");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Runs `work` on tokio's blocking threads. Dropping the future does not stop the work.
///
/// # Errors
/// Those of `work`.
pub async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work)
        .await
        .context("blocking work panicked or its runtime went away")?
}
