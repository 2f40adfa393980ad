//! Whether a worker that stands still loses its shards to the other one.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// A worker that could store nothing for a while rests for tens of seconds before it takes shards again.
const REST: Duration = Duration::from_secs(60);
/// Some looks that are a second apart after the stall timeout; the rest is for a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until the worker at `url` owns a shard.
///
/// # Errors
/// It takes none.
pub async fn owns(url: &str) -> Result<()> {
    let deadline = Instant::now() + REST;
    while n_owned(url).await? == 0.0 {
        ensure!(
            Instant::now() < deadline,
            "a worker took no shard for {REST:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Waits until the worker at `url` has ended another one's sessions, as it had `n_before` times before, and owns all
/// `n_shards`.
///
/// # Errors
/// It does not.
pub async fn takes_over(url: &str, n_before: f64, n_shards: usize) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (n_ended, n_owned) = (n_evictions(url).await? - n_before, n_owned(url).await?);
        if n_ended > 0.0 && n_owned >= n_shards as f64 {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "a worker stood still for longer than {PATIENCE:?}: the other one ended its sessions {n_ended} times, and owns {n_owned} of {n_shards} shards"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How often the worker at `url` has ended sessions of another one.
///
/// # Errors
/// It does not say.
pub async fn n_evictions(url: &str) -> Result<f64> {
    metric(url, "birbnest_worker_evictions_total").await
}

async fn n_owned(url: &str) -> Result<f64> {
    metric(url, "birbnest_worker_shards").await
}

/// The sum over a metric's samples; what was never counted may not be shown.
async fn metric(url: &str, name: &str) -> Result<f64> {
    let text = reqwest::get(format!("{url}/metrics")).await?.text().await?;
    let samples = text
        .lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']))
        .filter_map(|rest| rest.rsplit_once(' '))
        .map(|(_, value)| Ok(value.parse::<f64>()?))
        .collect::<Result<Vec<_>>>()?;
    Ok(samples.iter().sum())
}
