//! `birb-nest setup --reshard N`: another number of shards for a nest that is there.
//!
//! ```text
//! record the target -> make the streams that are missing, closed -> close all others (writes are 503 from here)
//!   -> workers store what is in them -> one transaction: number, bases, places, dead keys
//!   -> open the streams in their next life -> delete those that are too many -> done
//! ```
//! Each step looks at what is there, so whoever runs it again goes on where it ended; until the transaction it can be given
//! up. docs/adr/0017-resharding.md says why nothing is lost.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use birb_nest_core::{Base, Shard, ShardCount, Version};

use crate::{
    clock::Clock,
    config::{LogConfig, PostgresConfig},
    jetstream::{BareSession, Gate, Look},
    postgres::{Beginning, SetupSession},
    refusal::OpenError,
    sabotage::may_die_after,
};

/// How often the shards are looked at while workers store them.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often the progress of that is told.
const TELL_EVERY: Duration = Duration::from_secs(2);
/// How long nothing may be stored before that is given back to whoever watches.
const PATIENCE: Duration = Duration::from_secs(60);

/// Gives the nest `target` shards, or, when that is the present number, gives up a change that is under way.
///
/// # Errors
/// [`OpenError`]: what stands in the way and what to do about it. Doing it again goes on where this ended.
pub async fn run(
    postgres: &PostgresConfig,
    log: LogConfig,
    target: ShardCount,
) -> Result<(), OpenError> {
    let clock = Arc::new(Clock::new());
    let mut database = SetupSession::open(postgres, &clock).await?;
    if !database.has_nest().await? {
        return Err(database.refused("there is no nest to reshard: run `birb-nest setup`"));
    }
    database.migrate().await?;
    let Some(numbers) = database.numbers().await? else {
        return Err(database.refused("there is no nest to reshard: run `birb-nest setup`"));
    };
    // No acknowledgement of a write that was sent before a stream was closed is believed later than this after it.
    let settling = log.nats_publish_timeout;
    let present = numbers.present;
    let server = BareSession::open(&Arc::new(log)).await?;
    let mut resharding = Resharding {
        database,
        clock,
        before: server.with_shards(present),
        after: server.with_shards(target),
        present,
        target,
        settling,
    };
    match numbers.target {
        None if present == target => {
            let why = format!("its nest has {target} shards already");
            return Err(resharding.database.refused(&why));
        }
        None => resharding.begin().await?,
        Some(under_way) if under_way == target => {
            tracing::info!("going on with resharding to {target} shards");
        }
        Some(under_way) if target == present => {
            resharding.give_up().await?;
            tracing::warn!("resharding to {under_way} shards is given up: there are {present}");
            return Ok(());
        }
        Some(under_way) => {
            let why = format!(
                "its nest is being resharded to {under_way}: finish that first, with `birb-nest setup --reshard {under_way}`"
            );
            return Err(resharding.database.refused(&why));
        }
    }
    if present != target {
        resharding.prepare().await?;
        let looks = resharding.drain().await?;
        resharding.renumber(&looks).await?;
    }
    resharding.follow().await?;
    tracing::info!(
        "the nest has {target} shards now: start its APIs and workers with NATS_SHARDS={target}"
    );
    resharding.database.close().await;
    Ok(())
}

/// The change from one number of shards to another.
struct Resharding {
    database: SetupSession,
    clock: Arc<Clock>,
    /// The log as it was.
    before: BareSession,
    /// The log as it is to be.
    after: BareSession,
    present: ShardCount,
    target: ShardCount,
    settling: Duration,
}

/// Where a shard stands while the nest is resharded.
enum Standing {
    /// All that is in it is stored, and nothing can come.
    Stored(Look),
    /// It was, or is still, open in some way: it has been closed now, or a worker has to end a life first.
    Unsettled,
    /// So many messages have to be stored, at most.
    Behind(u64),
}

impl Resharding {
    /// Records the target, unless the log is not whole.
    async fn begin(&mut self) -> Result<(), OpenError> {
        for shard in self.present.iter() {
            self.look(shard).await?;
        }
        self.database.aim(Some(self.target)).await?;
        tracing::info!(
            "resharding from {} to {} shards; `birb-nest setup --reshard {}` gives it up",
            self.present,
            self.target,
            self.present
        );
        may_die_after("recorded");
        Ok(())
    }

    async fn look(&self, shard: Shard) -> Result<Look, OpenError> {
        let found = self.before.look(shard).await?;
        found.ok_or_else(|| {
            OpenError::unreachable(
                self.before.server(),
                format!("the stream of shard {shard} is missing: run `birb-nest setup`"),
            )
        })
    }

    /// Makes the streams that the new number needs beside those that are there, closed: should the server have no room, it
    /// says so before writes are refused.
    async fn prepare(&mut self) -> Result<(), OpenError> {
        let base = self.base_above(&[])?;
        for shard in self.target.iter().skip(self.present.get().into()) {
            if self.after.look(shard).await?.is_some() {
                continue;
            }
            let made = self.after.create(shard, base, Gate::Resharding).await;
            if let Err(error) = made {
                if error.is_refusal() {
                    self.give_up().await?;
                }
                return Err(error);
            }
        }
        may_die_after("made");
        Ok(())
    }

    /// Waits until workers have stored all that the former shards hold, and nobody can write to them any more.
    async fn drain(&mut self) -> Result<Vec<Look>, OpenError> {
        let (mut settled_since, mut told, mut moved) =
            (Instant::now(), Instant::now(), Instant::now());
        let mut last_seen = Vec::new();
        loop {
            let (mut looks, mut waiting, mut seen, mut n_behind) = (vec![], vec![], vec![], 0);
            for shard in self.present.iter() {
                let (standing, place) = self.stand(shard).await?;
                match standing {
                    Standing::Stored(look) => looks.push(look),
                    Standing::Unsettled => {
                        settled_since = Instant::now();
                        waiting.push(shard.to_string());
                    }
                    Standing::Behind(n) => {
                        n_behind += n;
                        waiting.push(shard.to_string());
                    }
                }
                seen.push(place);
            }
            may_die_after("closed");
            if waiting.is_empty() && settled_since.elapsed() >= self.settling {
                may_die_after("stored");
                return Ok(looks);
            }
            if seen != last_seen {
                (last_seen, moved) = (seen, Instant::now());
            }
            if !waiting.is_empty() && moved.elapsed() > PATIENCE {
                return Err(OpenError::unreachable(
                    self.before.server(),
                    format!(
                        "nothing of shards {} was stored for {PATIENCE:?}: is a worker with NATS_SHARDS={} running, and what does it \
                         say? Writes are refused until this is run again and ends, or `birb-nest setup --reshard {}` gives it up",
                        waiting.join(", "),
                        self.present,
                        self.present
                    ),
                ));
            }
            if told.elapsed() > TELL_EVERY {
                told = Instant::now();
                tracing::info!(
                    "{} of {} shards are stored, at most {n_behind} messages to go",
                    looks.len(),
                    self.present
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Where `shard` stands, and how far it is stored; closes it if it is open.
    async fn stand(&mut self, shard: Shard) -> Result<(Standing, Version), OpenError> {
        // Asked before the stream is: a log that ends before that has lost its tail.
        let Some((base, applied_to)) = self.database.shard_state(shard).await? else {
            let why = format!("shard_state lacks shard {shard}");
            return Err(self.database.refused(&why));
        };
        let look = self.look(shard).await?;
        let standing = if look.gate == Gate::Fenced {
            Standing::Unsettled
        } else if look.base > base {
            let why = format!(
                "PostgresWentBack: shard {shard} lives under base {}, PostgreSQL knows an earlier life ({base}): `birb-nest setup \
                 --reshard {}` gives this up, and `birb-nest setup` stores what is left in the log; see docs/OPERATIONS.md",
                look.base, self.present
            );
            return Err(self.database.refused(&why));
        } else if look.base < base || look.end() < applied_to {
            tracing::error!(
                "the log of shard {shard} lost its tail: a worker opens its next life before it is resharded"
            );
            self.before.set_gate(shard, look.base, Gate::Fenced).await?;
            Standing::Unsettled
        } else if look.gate == Gate::Open {
            self.before
                .set_gate(shard, look.base, Gate::Resharding)
                .await?;
            may_die_after("closed-one");
            Standing::Unsettled
        } else if look.n_messages > 0 && applied_to < look.end() {
            Standing::Behind(look.end().get() - applied_to.get())
        } else {
            Standing::Stored(look)
        };
        Ok((standing, applied_to))
    }

    /// Gives PostgreSQL the new number; `looks` are the former shards.
    async fn renumber(&mut self, looks: &[Look]) -> Result<(), OpenError> {
        let mut sequences = Vec::with_capacity(self.target.get().into());
        for shard in self.target.iter() {
            let look = match looks.get(shard.index()) {
                Some(look) => Some(*look),
                None => self.after.look(shard).await?,
            };
            sequences.push(look.map_or(0, |look| look.last_sequence));
        }
        let beginning = Beginning {
            base: self.base_above(looks)?,
            sequences,
        };
        self.database
            .reshard(self.present, self.target, &beginning)
            .await?;
        tracing::info!(
            "PostgreSQL has {} shards now, base {}",
            self.target,
            beginning.base
        );
        may_die_after("numbered");
        Ok(())
    }

    /// A base greater than all that is in these shards, and than the time.
    fn base_above(&self, looks: &[Look]) -> Result<Base, OpenError> {
        let now = u64::try_from(self.clock.now().as_micros()).unwrap_or(0);
        let ends = looks.iter().map(|look| look.end().get() + 1);
        Base::new(ends.fold(now, u64::max)).ok_or_else(|| {
            OpenError::refused(self.before.server(), "the clock shows a time too far ahead")
        })
    }

    /// Brings the streams to where PostgreSQL is. What they still have of former lives is stored.
    async fn follow(&mut self) -> Result<(), OpenError> {
        for shard in self.target.iter() {
            let Some((base, applied_to)) = self.database.shard_state(shard).await? else {
                let why = format!("shard_state lacks shard {shard}");
                return Err(self.database.refused(&why));
            };
            match self.after.look(shard).await? {
                Some(look) if look.gate == Gate::Open && look.base == base => continue,
                Some(_) => {
                    let stored = base.sequence(applied_to);
                    self.after.purge(shard, stored).await?;
                    may_die_after("purged-one");
                    self.after.set_gate(shard, base, Gate::Open).await?;
                    self.after.update(shard, base).await?;
                }
                None => self.after.create(shard, base, Gate::Open).await?,
            }
            may_die_after("opened-one");
        }
        may_die_after("opened");
        self.delete_from(self.target).await?;
        may_die_after("deleted");
        self.database.aim(None).await
    }

    /// Leaves the nest as it was: what was closed is open again, in the same life.
    async fn give_up(&mut self) -> Result<(), OpenError> {
        for shard in self.present.iter() {
            let look = self.look(shard).await?;
            if look.gate == Gate::Resharding {
                self.before.set_gate(shard, look.base, Gate::Open).await?;
            }
        }
        self.delete_from(self.present).await?;
        self.database.aim(None).await
    }

    /// Deletes the streams beyond `count` that were closed for resharding.
    async fn delete_from(&self, count: ShardCount) -> Result<(), OpenError> {
        for index in count.get()..ShardCount::MAX {
            let shard = Shard::from_index(index);
            match self.after.look(shard).await {
                Ok(Some(look)) if look.gate == Gate::Resharding => {
                    self.after.delete(shard).await?;
                    may_die_after("deleted-one");
                }
                Ok(None) => {}
                // It belongs to something else.
                Ok(Some(_)) => tracing::warn!("the stream of shard {shard} is left alone"),
                Err(error) if error.is_refusal() => {
                    tracing::warn!(%error, "a stream is left alone");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
