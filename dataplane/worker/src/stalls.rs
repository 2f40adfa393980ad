//! Noticing owners that hang: alive enough to hold their locks, and storing nothing, or not even asking how their shard stands.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use birb_nest_core::Version;
use birb_nest_store::{jetstream::Depth, postgres::OwnedShard};

/// An owner asks every second; one on a machine that is busy may be late by less than this.
const SILENCE: Duration = Duration::from_secs(5);

/// What is remembered of shards that others own.
#[derive(Debug)]
pub struct Stalls {
    patience: Duration,
    standing: HashMap<u16, Standing>,
    silent: HashMap<u16, Silent>,
}

/// A shard whose owner asks PostgreSQL for nothing.
#[derive(Debug)]
struct Silent {
    backend: i32,
    asked_at: i64,
    since: Instant,
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
            silent: HashMap::new(),
        }
    }

    /// Whether the session that owns `shard` has asked PostgreSQL for nothing for too long at `now`, by this process's own
    /// clock: nobody is behind it any more, or it hangs. That matters also where there is nothing to store: dead letters are
    /// tried again by the owner alone.
    pub fn is_silent(&mut self, now: Instant, shard: &OwnedShard) -> bool {
        let Some(asked_at) = shard.asked_at.filter(|_| !shard.is_busy) else {
            self.silent.remove(&shard.index);
            return false;
        };
        let silent = self.silent.entry(shard.index).or_insert(Silent {
            backend: shard.backend,
            asked_at,
            since: now,
        });
        if silent.backend != shard.backend || silent.asked_at != asked_at {
            *silent = Silent {
                backend: shard.backend,
                asked_at,
                since: now,
            };
        }
        now.duration_since(silent.since) >= self.patience.max(SILENCE)
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
        let has_work = is_fenced || depth.behind(shard.applied_to) > 0;
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
            asked_at: Some(1),
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

    #[test]
    fn an_owner_that_asks_for_nothing_is_silent_though_there_is_nothing_to_do() {
        let start = Instant::now();
        let mut stalls = Stalls::new(Duration::from_secs(15));
        let mut look = |seconds, backend, asked_at, is_busy| {
            let shard = OwnedShard {
                asked_at,
                is_busy,
                ..owned(backend, 10)
            };
            stalls.is_silent(start + Duration::from_secs(seconds), &shard)
        };
        assert!(!look(0, 1, Some(100), false));
        assert!(!look(14, 1, Some(100), false));
        assert!(look(15, 1, Some(100), false));
        assert!(!look(16, 1, Some(101), false), "it asked");
        assert!(!look(31, 2, Some(101), false), "another one");
        assert!(!look(45, 2, Some(101), false));
        assert!(!look(46, 2, Some(101), true), "it waits for an answer");
        assert!(!look(60, 2, Some(101), false), "it has its answer");
        assert!(!look(100, 2, None, false), "who can say");
        let mut hasty = Stalls::new(Duration::from_secs(1));
        let shard = owned(1, 10);
        assert!(!hasty.is_silent(start, &shard));
        assert!(!hasty.is_silent(start + Duration::from_secs(4), &shard));
        assert!(hasty.is_silent(start + Duration::from_secs(5), &shard));
    }
}
