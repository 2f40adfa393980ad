//! Puts a nest to sleep (`spec.suspend`): the API ends, workers store what is left in the log, then they end too. Servers stay,
//! and so does everything in them.
//!
//! **Invariant:** the log is only believed to be empty by readings that began after the last pod of the API was gone.

use std::time::Duration;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use crate::{
    api::{Suspension, SuspensionStage},
    error::Result,
    observe::Rollout,
    pass::Pass,
    render::{Names, selector_text},
    replicas,
};

/// How long the workers may take to store what is left in the log.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(600);
/// How soon to look again while they do.
const POLL: Duration = Duration::from_secs(5);

/// What is to be known of a nest on its way to sleep.
struct Sight {
    /// Messages that are not stored yet, as read after the API had ended; none while that is not known.
    backlog: Option<u64>,
    /// Workers there should be; none without a Deployment of them.
    workers: Option<i32>,
    /// Whether there is an API, which may have written.
    has_api: bool,
}

/// Does what is next on the way to sleep. It does not matter whether anything else of the nest can be brought further.
///
/// # Errors
/// What may go better the next time.
pub async fn step(pass: &mut Pass<'_>) -> Result<()> {
    let before = pass.stored.status.as_ref();
    let before = before.and_then(|status| status.suspension.clone());
    // It sleeps until it was woken, whatever keeps this pass from it: only so is it known whom to wake.
    pass.findings.suspension.clone_from(&before);
    if pass.is_paused() {
        return Ok(());
    }
    replicas::stop_autoscaler(pass).await?;
    if !pass.nest.is_suspended {
        replicas::wake(pass).await?;
        pass.findings.suspension = None;
        return Ok(());
    }
    let names = Names(&pass.nest.name);
    let api = pass.deployment(&names.api()).await?;
    if let Some(api) = &api {
        replicas::force(pass, api, 0).await?;
    }
    let pods = pass.pods(&selector_text(&pass.nest, "api")).await?;
    let uid = &pass.nest.uid;
    let is_quiet = pods.is_empty();
    let worker = pass.deployment(&names.worker()).await?;
    let sight = Sight {
        backlog: pass.context.scaling.left(uid, is_quiet),
        workers: worker.as_ref().map(|worker| Rollout::of(worker).desired),
        has_api: api.is_some(),
    };
    let next = next(before.as_ref(), &sight, Timestamp::now());
    match (next.stage, &worker) {
        (SuspensionStage::Draining, _) => pass.look_again(POLL),
        (_, Some(worker)) => replicas::force(pass, worker, 0).await?,
        (_, None) => {}
    }
    pass.findings.suspension = Some(next);
    Ok(())
}

fn next(before: Option<&Suspension>, sight: &Sight, now: Timestamp) -> Suspension {
    let since = before.map_or(now, |before| before.since.0);
    let lasted = Duration::try_from(now.duration_since(since)).unwrap_or_default();
    let stage = match before.map(|before| before.stage) {
        Some(end @ (SuspensionStage::Drained | SuspensionStage::NotDrained)) => end,
        _ => match sight {
            Sight {
                backlog: Some(0), ..
            } => SuspensionStage::Drained,
            // Never started.
            Sight {
                workers: None,
                has_api: false,
                ..
            } => SuspensionStage::Drained,
            // Nobody would store it, and without workers nobody looks.
            Sight { workers: None, .. }
            | Sight {
                workers: Some(0),
                backlog: Some(_),
                ..
            } => SuspensionStage::NotDrained,
            _ if lasted >= DRAIN_LIMIT => SuspensionStage::NotDrained,
            _ => SuspensionStage::Draining,
        },
    };
    Suspension {
        since: Time(since),
        stage,
    }
}

#[cfg(test)]
mod tests {
    use SuspensionStage::{Drained, Draining, NotDrained};

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn sight(backlog: Option<u64>, workers: Option<i32>) -> Sight {
        Sight {
            backlog,
            workers,
            has_api: true,
        }
    }

    #[test]
    fn workers_have_ten_minutes_to_store_what_is_left() {
        let begun = next(None, &sight(None, Some(3)), at(1000));
        assert_eq!((begun.since.0, begun.stage), (at(1000), Draining));
        for (second, backlog, stage) in [
            (1001, Some(7), Draining),
            (1002, None, Draining),
            (1003, Some(0), Drained),
            (1599, Some(7), Draining),
            (1600, Some(7), NotDrained),
            (1600, None, NotDrained),
            (1600, Some(0), Drained),
        ] {
            let next = next(Some(&begun), &sight(backlog, Some(3)), at(second));
            assert_eq!(
                (next.since.0, next.stage),
                (at(1000), stage),
                "{second} {backlog:?}"
            );
        }
    }

    #[test]
    fn what_has_come_to_its_end_stays_so() {
        for stage in [Drained, NotDrained] {
            let before = Suspension {
                since: Time(at(0)),
                stage,
            };
            for backlog in [None, Some(0), Some(9)] {
                assert_eq!(
                    next(Some(&before), &sight(backlog, Some(0)), at(9999)),
                    before
                );
            }
        }
    }

    #[test]
    fn nobody_waits_for_workers_that_are_not_there() {
        let never_started = Sight {
            has_api: false,
            ..sight(None, None)
        };
        assert_eq!(next(None, &never_started, at(0)).stage, Drained);
        assert_eq!(next(None, &sight(None, None), at(0)).stage, NotDrained);
        assert_eq!(
            next(None, &sight(Some(9), Some(0)), at(0)).stage,
            NotDrained
        );
        assert_eq!(next(None, &sight(None, Some(0)), at(0)).stage, Draining);
    }
}
