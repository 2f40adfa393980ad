//! What goes wrong.

use std::{ops::Range, time::Duration};

use rand::Rng;

use crate::history::{Kind, Label};

/// `WORKER_STALL_TIMEOUT` of the workers that are attacked.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(2);

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// Nothing.
    None,
    /// An API is killed, and started again.
    KillApi,
    /// A worker is killed, and started again.
    KillWorker,
    /// Redis is killed, and comes back empty.
    KillRedis,
    /// Redis is killed, and comes back with what it had a while ago.
    OldRedis,
    /// So it does while there is no worker, which would have it emptied for what it stored meanwhile.
    OldRedisAlone,
    /// nats-server is killed, and started again.
    KillNats,
    /// PostgreSQL is killed, and started again.
    KillPostgres,
    /// An API stops for a while, and goes on as if nothing had been.
    PauseApi,
    /// So does a worker.
    PauseWorker,
    /// So does Redis.
    PauseRedis,
    /// So does nats-server.
    PauseNats,
    /// So does PostgreSQL.
    PausePostgres,
    /// Links to a server are cut.
    CutRedis,
    /// See above.
    CutNats,
    /// See above.
    CutPostgres,
    /// All links are slow.
    SlowLinks,
    /// Somebody empties Redis.
    FlushAll,
    /// PostgreSQL takes no writes.
    ReadOnly,
    /// Nor does it, and the log is full.
    FullLog,
    /// An API comes back with a clock that is an hour off.
    WrongClock,
    /// nats-server is killed, and comes back with what it had a while ago: what it acknowledged since may be lost.
    LostTail,
}

impl Fault {
    /// All that make something wrong.
    pub const ALL: [Self; 21] = [
        Self::KillApi,
        Self::KillWorker,
        Self::KillRedis,
        Self::OldRedis,
        Self::OldRedisAlone,
        Self::KillNats,
        Self::KillPostgres,
        Self::PauseApi,
        Self::PauseWorker,
        Self::PauseRedis,
        Self::PauseNats,
        Self::PausePostgres,
        Self::CutRedis,
        Self::CutNats,
        Self::CutPostgres,
        Self::SlowLinks,
        Self::FlushAll,
        Self::ReadOnly,
        Self::FullLog,
        Self::WrongClock,
        Self::LostTail,
    ];

    /// Whether log or PostgreSQL cannot be asked.
    const fn is_of_nats_or_postgresql(self) -> bool {
        matches!(
            self,
            Self::KillNats
                | Self::PauseNats
                | Self::CutNats
                | Self::LostTail
                | Self::KillPostgres
                | Self::PausePostgres
                | Self::CutPostgres
        )
    }

    /// Whether it can be the reason of such answers.
    #[must_use]
    pub const fn allows(self, label: Label) -> bool {
        match label {
            // Redis cannot be told in time: it is away, or far, or was emptied; or the API itself stood still.
            Label::Pending => matches!(
                self,
                Self::KillRedis
                    | Self::OldRedis
                    | Self::OldRedisAlone
                    | Self::PauseRedis
                    | Self::CutRedis
                    | Self::SlowLinks
                    | Self::FlushAll
                    | Self::KillApi
                    | Self::PauseApi
                    | Self::WrongClock
            ),
            // The log cannot be asked, or is not sure of its end, which PostgreSQL would know.
            Label::Unconfirmed => matches!(
                self,
                Self::KillNats
                    | Self::PauseNats
                    | Self::CutNats
                    | Self::LostTail
                    | Self::SlowLinks
                    | Self::KillApi
                    | Self::PauseApi
                    | Self::WrongClock
                    | Self::KillPostgres
                    | Self::PausePostgres
                    | Self::CutPostgres
                    | Self::ReadOnly
                    | Self::FullLog
            ),
        }
    }
}

/// Whose: there are two APIs and two workers, each with links of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Of the first ones.
    First,
    /// Of the second ones.
    Second,
    /// Of all.
    Both,
}

impl Side {
    /// Which of two.
    #[must_use]
    pub fn of(self) -> Range<usize> {
        match self {
            Self::First => 0..1,
            Self::Second => 1..2,
            Self::Both => 0..2,
        }
    }
}

/// A fault, with all that is drawn for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attack {
    /// What.
    pub fault: Fault,
    /// Whose process or links, if it is about those.
    pub side: Side,
    /// How long clients work before.
    pub onset: Duration,
    /// How long an old copy is outdated before it is put back.
    pub warning: Duration,
    /// How long it is on.
    pub length: Duration,
    /// Whether Redis is emptied once it is on, so that those are asked that cannot answer.
    pub empties: bool,
    /// How wrong a clock is.
    pub clock: &'static str,
    /// How slow links are, in each direction.
    pub delay: Duration,
}

impl Attack {
    /// Whether it can be the reason of such answers.
    #[must_use]
    pub fn allows(&self, label: Label) -> bool {
        self.fault.allows(label) || (self.empties && Fault::FlushAll.allows(label))
    }

    /// Whether it can be the reason that an API does not do that: promise 5.
    #[must_use]
    pub fn may_fail(&self, api: usize, kind: Kind) -> bool {
        let is_hit = self.side.of().contains(&api);
        // Without PostgreSQL the log takes what has no condition.
        let needs_postgresql = !matches!(kind, Kind::Set | Kind::Delete);
        match self.fault {
            // Without Redis everything goes on, and APIs need no worker.
            Fault::None
            | Fault::KillWorker
            | Fault::PauseWorker
            | Fault::KillRedis
            | Fault::OldRedis
            | Fault::OldRedisAlone
            | Fault::PauseRedis
            | Fault::CutRedis
            | Fault::FlushAll => false,
            Fault::KillApi
            | Fault::PauseApi
            | Fault::WrongClock
            | Fault::CutNats
            | Fault::SlowLinks => is_hit,
            Fault::KillPostgres | Fault::PausePostgres | Fault::ReadOnly => needs_postgresql,
            Fault::CutPostgres => is_hit && needs_postgresql,
            Fault::KillNats | Fault::PauseNats | Fault::LostTail | Fault::FullLog => true,
        }
    }

    /// The worker that must have taken all shards over before it ends.
    #[must_use]
    pub fn heir(&self) -> Option<usize> {
        match (self.fault, self.side) {
            (Fault::PauseWorker, Side::First) => Some(1),
            (Fault::PauseWorker, Side::Second) => Some(0),
            _ => None,
        }
    }

    /// The APIs whose clients cannot but notice it.
    #[must_use]
    pub fn is_noticed_at(&self) -> Option<Range<usize>> {
        match self.fault {
            Fault::KillApi
            | Fault::PauseApi
            | Fault::WrongClock
            | Fault::CutRedis
            | Fault::CutNats
            | Fault::SlowLinks => Some(self.side.of()),
            Fault::KillRedis
            | Fault::OldRedis
            | Fault::OldRedisAlone
            | Fault::PauseRedis
            | Fault::KillNats
            | Fault::PauseNats
            | Fault::LostTail
            | Fault::FullLog => Some(0..2),
            // Clients have no need of workers, nor often of PostgreSQL, and a read of an emptied Redis looks as any.
            Fault::None
            | Fault::KillWorker
            | Fault::PauseWorker
            | Fault::KillPostgres
            | Fault::PausePostgres
            | Fault::CutPostgres
            | Fault::ReadOnly
            | Fault::FlushAll => None,
        }
    }

    /// An answer that takes so long while it is on, for `length`, takes long because of it.
    #[must_use]
    pub fn is_long(&self, length: Duration) -> Duration {
        match self.fault {
            // There and back.
            Fault::SlowLinks => self.delay * 2,
            _ => length / 2,
        }
    }

    /// Draws one. Most are about as long as `phase`, some several times as long, and so is everybody paused.
    pub fn draw(fault: Fault, phase: Duration, random: &mut impl Rng) -> Self {
        let length = match fault {
            // For longer than the other worker bears it.
            Fault::PauseWorker => STALL_TIMEOUT.mul_f64(random.random_range(1.5..2.5)),
            // For longer than deadlines inside.
            Fault::PauseApi | Fault::PauseRedis | Fault::PauseNats | Fault::PausePostgres => {
                phase.mul_f64(random.random_range(2.0..4.0))
            }
            _ if random.random_ratio(1, 4) => phase.mul_f64(random.random_range(2.0..4.0)),
            _ => phase.mul_f64(random.random_range(0.3..1.2)),
        };
        // Without workers, nobody but a new write puts right what an old Redis has.
        let warning = match fault {
            Fault::OldRedisAlone => 1.0,
            _ => random.random_range(0.1..0.4),
        };
        Self {
            fault,
            side: match random.random_range(0..5) {
                0..2 => Side::First,
                2..4 => Side::Second,
                // While both workers stand still, nobody is there who could take over.
                _ if fault == Fault::PauseWorker => Side::First,
                _ => Side::Both,
            },
            onset: phase.mul_f64(random.random_range(0.3..1.2)),
            warning: phase.mul_f64(warning),
            length,
            empties: fault.is_of_nats_or_postgresql() && random.random(),
            clock: if random.random() { "+1h" } else { "-1h" },
            delay: Duration::from_millis(random.random_range(20..50)),
        }
    }
}
