//! Noticing owners that hang: alive enough to hold their locks, and storing nothing.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use birb_nest_core::Version;
use birb_nest_store::{jetstream::Depth, postgres::OwnedShard};

/// What is remembered of shards that others own.
#[derive(Debug)]
pub struct Stalls {
    patience: Duration,
    standing: HashMap<u16, Standing>,
}

/// A shard that has messages and does not move.
#[derive(Debug)]
struct Standing {
    backend: i32,
    applied_to: Version,
    since: Instant,
}

impl Stalls {
    /// An owner may stand still for `patience` while there is something to store.
    pub fn new(patience: Duration) -> Self {
        Self {
            patience,
            standing: HashMap::new(),
        }
    }

    /// Whether the owner of `shard`, whose log holds `depth`, has stood still for too long at `now`. An owner that has
    /// moved, waits for PostgreSQL, has nothing to do, or is a new one starts afresh. With a fenced log there is always
    /// something to do: it ends before what is stored, and takes no writes until its owner begins another life.
    pub fn is_stalled(
        &mut self,
        now: Instant,
        shard: &OwnedShard,
        depth: Depth,
        is_fenced: bool,
    ) -> bool {
        let has_work = is_fenced || (depth.n_messages > 0 && depth.last > shard.applied_to);
        if !has_work || shard.is_busy {
            self.standing.remove(&shard.index);
            return false;
        }
        let standing = self.standing.entry(shard.index).or_insert(Standing {
            backend: shard.backend,
            applied_to: shard.applied_to,
            since: now,
        });
        if standing.backend != shard.backend || standing.applied_to != shard.applied_to {
            *standing = Standing {
                backend: shard.backend,
                applied_to: shard.applied_to,
                since: now,
            };
        }
        now.duration_since(standing.since) >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(backend: i32, applied_to: u64) -> OwnedShard {
        OwnedShard {
            index: 3,
            backend,
            worker: "w".to_owned(),
            applied_to: version(applied_to),
            is_busy: false,
        }
    }

    fn ends_at(last: u64) -> Depth {
        Depth {
            n_messages: 5,
            n_bytes: 50,
            last: version(last),
        }
    }

    fn version(number: u64) -> Version {
        Version::new(number).expect("small")
    }

    #[test]
    fn only_an_owner_that_stands_still_with_work_to_do_is_stalled() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stalls = Stalls::new(Duration::from_secs(15));
        let mut look = |seconds, backend, applied_to, log_end| {
            stalls.is_stalled(
                at(seconds),
                &owned(backend, applied_to),
                ends_at(log_end),
                false,
            )
        };
        assert!(!look(0, 1, 10, 10), "nothing to do");
        assert!(
            !look(1000, 1, 10, 11),
            "idle for long, and work has just come"
        );
        assert!(!look(1014, 1, 10, 12));
        assert!(look(1015, 1, 10, 12));
        assert!(!look(1016, 2, 10, 12), "a new owner has its own time");
        assert!(!look(1030, 2, 11, 12), "it moved");
        assert!(!look(1044, 2, 11, 12));
        assert!(look(1045, 2, 11, 12));
        assert!(!look(1046, 2, 12, 12), "it caught up");
        assert!(!look(2000, 2, 12, 13));
        let busy = OwnedShard {
            is_busy: true,
            ..owned(2, 12)
        };
        assert!(
            !stalls.is_stalled(at(3000), &busy, ends_at(13), false),
            "it waits for PostgreSQL"
        );
        let purged = Depth {
            n_messages: 0,
            ..ends_at(13)
        };
        assert!(
            !stalls.is_stalled(at(4000), &owned(2, 12), purged, false),
            "there is nothing to store"
        );
        assert!(!stalls.is_stalled(at(5000), &owned(2, 12), purged, true));
        assert!(
            stalls.is_stalled(at(5015), &owned(2, 12), purged, true),
            "a fenced log waits for its next life"
        );
    }
}
