//! The task that reads the lag of all nests, each as often as it asks for. It never asks the API server: what it has to know
//! of a nest, passes tell it; and what it decides, they do.

use std::{collections::HashSet, time::Duration};

use futures::{SinkExt, StreamExt, channel::mpsc::Sender, stream::FuturesUnordered};
use kube::runtime::reflector::{ObjectRef, Store};
use tokio::time::{MissedTickBehavior, interval};

use super::{
    Scaling,
    lag::{self, Pool},
};
use crate::api::BirbNest;

/// How exact the times are at which lags are read.
const TICK: Duration = Duration::from_millis(500);

/// Reads and decides without end; sends a nest to `passes` when something else should be done or said.
pub async fn follow(
    scaling: &Scaling,
    nests: Store<BirbNest>,
    mut passes: Sender<ObjectRef<BirbNest>>,
) {
    let pool = Pool::default();
    let mut readings = FuturesUnordered::new();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                scaling.retain(|nest, uid| {
                    nests.get(nest).is_some_and(|found| found.metadata.uid.as_deref() == Some(uid))
                });
                let keys: HashSet<String> = scaling.pool_keys();
                pool.keep(&keys);
                for due in scaling.due() {
                    let pool = &pool;
                    readings.push(async move { (lag::read(pool, &due.key, &due.access).await, due.uid) });
                }
            }
            Some((reading, uid)) = readings.next() => {
                if let Some(nest) = scaling.decide(&uid, reading) {
                    // Nobody listens any more when the process ends.
                    let _ = passes.send(nest).await;
                }
            }
        }
    }
}
