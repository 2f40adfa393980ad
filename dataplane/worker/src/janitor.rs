//! Reaping rows of entries that are long gone, by one worker at a time and slowly.

use std::time::Duration;

use birb_nest_store::postgres::Janitor;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{metrics::METRICS, owner::Context};

/// Keys per step, and the rest between two steps: at most 10,000 keys/s are walked past.
const KEYS_PER_STEP: u32 = 500;
const REST: Duration = Duration::from_millis(50);

/// The first round begins within this time: a worker that is often restarted would never come to it otherwise.
const FIRST_WITHIN: Duration = Duration::from_secs(10);

/// Walks through all keys soon after the start and every `WORKER_JANITOR_INTERVAL`, until `stop`.
pub async fn run(context: &Context, stop: CancellationToken) {
    let interval = context.config.worker_janitor_interval;
    let walking = async {
        // Workers are often started together.
        let mut wait = interval
            .min(FIRST_WITHIN)
            .mul_f64(rand::random_range(0.0..1.0));
        loop {
            sleep(wait).await;
            wait = interval;
            if let Err(why) = walk(context).await {
                tracing::debug!(why, "the janitor's round ended early");
            }
        }
    };
    tokio::select! {
        () = walking => {}
        () = stop.cancelled() => {}
    }
}

async fn walk(context: &Context) -> Result<(), String> {
    let claimed = Janitor::claim(
        &context.postgres,
        context.log.shards(),
        &context.name,
        context.config.worker_stall_timeout,
    );
    let Some(mut janitor) = claimed.await? else {
        return Ok(());
    };
    // From anywhere to the end, then from the beginning to there: rounds that are broken off, for workers come and go, would
    // otherwise all look at the same keys, and never at those behind them.
    let start = janitor.somewhere(rand::random_range(0.0..1.0)).await?;
    let (mut after, mut n_reaped, mut has_turned) = (start.clone(), 0, start.is_empty());
    loop {
        let step = janitor
            .step(&after, KEYS_PER_STEP, context.config.worker_janitor_grace)
            .await?;
        METRICS.reaped(step.n_reaped);
        n_reaped += step.n_reaped;
        match step.last {
            // Keys are in the order of their bytes there, too.
            Some(last) if has_turned && !start.is_empty() && last >= start => break,
            Some(last) => after = last,
            None if has_turned => break,
            None => {
                after.clear();
                has_turned = true;
            }
        }
        sleep(REST).await;
    }
    if n_reaped > 0 {
        tracing::info!(n_reaped, "reaped rows of entries that are gone");
    }
    Ok(())
}
