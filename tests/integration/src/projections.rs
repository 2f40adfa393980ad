//! Older never replaces newer, in Redis and in PostgreSQL, in whatever order and however often things are delivered.

use std::{collections::BTreeMap, sync::Arc};

use anyhow::Result;
use birb_nest_core::{
    Batch, BatchLimits, Coalescer, Content, Document, Entry, Key, Shard, State, Timestamp, Version,
};
use birb_nest_store::{
    Clock, LogConfig,
    postgres::{Database, ShardSession},
    redis::{Cache, Fill, Lease, Stored, Token},
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, TestRunner},
};

use crate::world::{World, eventually};

const N_CASES: usize = 40;

fn key(n: u8) -> Key {
    Key::parse(&format!("k{n}")).unwrap()
}

fn entry(version: u64, deleted: bool) -> Entry {
    Entry {
        version: Version::new(version).unwrap(),
        written_at: Timestamp::from_micros(1),
        expires_at: None,
        state: if deleted {
            State::Deleted
        } else {
            State::Present(Content {
                content_type: Content::JSON.into(),
                metadata: bytes::Bytes::new(),
                value: version.to_string().into(),
            })
        },
    }
}

fn cases<T: std::fmt::Debug>(strategy: impl Strategy<Value = T>) -> Vec<T> {
    let mut runner = TestRunner::new(Config::default());
    (0..N_CASES)
        .map(|_| strategy.new_tree(&mut runner).unwrap().current())
        .collect()
}

/// Messages in any order, repeated at will, cut into batches anywhere.
#[tokio::test]
async fn older_never_replaces_newer_in_postgresql() -> Result<()> {
    let world = World::shared().await?;
    let config = world.config()?;
    let shards = world.config::<LogConfig>()?.nats_shards;
    let database = Database::open(&config, "test", Arc::new(Clock::new()), shards).await?;
    let shard = Shard::from_index(0);
    let mut session = ShardSession::claim(&config, shard, "test")
        .await
        .unwrap()
        .unwrap();
    let base = session.state().await.unwrap().base;
    let mut place = base.get();
    let deliveries = prop::collection::vec(
        prop::collection::vec((0u8..4, 1u64..30, any::<bool>()), 1..8),
        1..8,
    );
    for batches in cases(deliveries) {
        world.sql("delete from cache_entries").await?;
        let mut newest: BTreeMap<u8, u64> = BTreeMap::new();
        for messages in batches {
            let limits = BatchLimits {
                max_messages: 100,
                max_bytes: 1 << 20,
                linger: std::time::Duration::ZERO,
            };
            let mut coalescer = Coalescer::new(limits);
            for &(k, version, deleted) in &messages {
                // A version names one write: whether it deletes follows from it.
                let entry = entry(base.get() + version, deleted && version.is_multiple_of(2));
                coalescer.push(entry.version, Some((key(k), entry)));
                let newest = newest.entry(k).or_default();
                *newest = version.max(*newest);
            }
            place += 100;
            let batch = Batch {
                through: Version::new(place).unwrap(),
                ..coalescer.take()
            };
            session.apply(base, &batch, Version::ZERO).await?;
            for (&k, &version) in &newest {
                let row = database.lookup(&key(k), shard).await?;
                assert_eq!(
                    row.entry.unwrap().version.get(),
                    base.get() + version,
                    "{messages:?}"
                );
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_batch_is_stored_once_and_only_under_its_base() -> Result<()> {
    let world = World::shared().await?;
    let config = world.config()?;
    let shard = Shard::from_index(3);
    let mut session = ShardSession::claim(&config, shard, "test")
        .await
        .unwrap()
        .unwrap();
    assert!(
        ShardSession::claim(&config, shard, "rival")
            .await
            .unwrap()
            .is_none()
    );
    let base = session.state().await.unwrap().base;
    let version = base.version(5).unwrap();
    let batch = Batch {
        entries: vec![(key(1), entry(version.get(), false))],
        through: version,
        n_messages: 1,
    };
    assert_eq!(
        session.apply(base, &batch, Version::ZERO).await?.n_changed,
        1
    );
    assert_eq!(session.state().await.unwrap().applied_to, version);
    // Delivered again, or read under a base that is over: nothing is stored, and the owner learns that it is late.
    assert!(session.apply(base, &batch, Version::ZERO).await.is_err());
    let next = base.version(6).unwrap();
    let foreign = Batch {
        entries: vec![(key(2), entry(next.get(), false))],
        through: next,
        n_messages: 1,
    };
    let other_base = birb_nest_core::Base::new(base.get() - 1).unwrap();
    assert!(
        session
            .apply(other_base, &foreign, Version::ZERO)
            .await
            .is_err()
    );
    assert_eq!(world.row("k2").await?, None);
    assert_eq!(session.state().await.unwrap().applied_to, version);
    session.release().await;
    // PostgreSQL ends a session a moment after that was asked for.
    eventually("the shard is free", async || {
        Ok(ShardSession::claim(&config, shard, "heir").await.unwrap())
    })
    .await
    .map(drop)
}

#[derive(Debug, Clone)]
enum Step {
    /// A writer takes its lease, for later.
    LeaseToWrite(u8),
    /// The writer of this number tells Redis, at last.
    Install(usize),
    /// A reader takes its lease and learns what is newest now.
    LeaseToRead(u8),
    /// The reader of this number fills, at last.
    Fill(usize),
    /// The worker stored the newest version.
    Forget(u8),
    /// Evicted, flushed, expired.
    Vanish(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..2).prop_map(Step::LeaseToWrite),
        (0usize..12).prop_map(Step::Install),
        (0u8..2).prop_map(Step::LeaseToRead),
        (0usize..12).prop_map(Step::Fill),
        (0u8..2).prop_map(Step::Forget),
        (0u8..2).prop_map(Step::Vanish),
    ]
}

/// Writers and readers that stall anywhere. Once a version's writer has told Redis, Redis never holds an older one.
#[tokio::test]
async fn older_never_replaces_newer_in_redis() -> Result<()> {
    let world = World::shared().await?;
    let clock = Arc::new(Clock::new());
    let cache = Cache::open(world.config()?, clock.clone()).await?;
    for steps in cases(prop::collection::vec(step(), 1..60)) {
        world.flush_redis().await?;
        // The log: a write gets its version when it is published, which is between its lease and its install.
        let mut log: BTreeMap<u8, u64> = BTreeMap::new();
        let mut told: BTreeMap<u8, u64> = BTreeMap::new();
        let (mut writers, mut readers) = (Vec::new(), Vec::new());
        let document = |k: u8, version: u64| {
            Document::render(&key(k), &entry(version, version.is_multiple_of(3)))
        };
        for (n, step) in steps.iter().enumerate() {
            match *step {
                Step::LeaseToWrite(k) => {
                    let token = Token::random();
                    cache.lease_for_write(&key(k), &token).await?;
                    let version = n as u64 + 1;
                    log.insert(k, version);
                    writers.push((k, token, version));
                }
                Step::Install(which) if which < writers.len() => {
                    let (k, token, version) = &writers[which];
                    cache
                        .install(&key(*k), token, &document(*k, *version), clock.now())
                        .await?;
                    let newest = told.entry(*k).or_default();
                    *newest = (*newest).max(*version);
                }
                Step::LeaseToRead(k) => {
                    let token = Token::random();
                    if cache.lease_for_read(&key(k), &token).await? == Lease::Taken {
                        readers.push((k, token, log.get(&k).copied()));
                    }
                }
                Step::Fill(which) if which < readers.len() => {
                    let (k, token, seen) = &readers[which];
                    let found = seen.map(|version| document(*k, version));
                    let fill = found.as_ref().map_or(Fill::Absent, Fill::Document);
                    cache.fill(&key(*k), token, fill, clock.now()).await?;
                }
                Step::Forget(k) => {
                    if let Some(&version) = log.get(&k) {
                        cache
                            .forget(&[(key(k), Version::new(version).unwrap())])
                            .await?;
                        told.insert(k, version);
                    }
                }
                Step::Vanish(k) => {
                    redis::cmd("DEL")
                        .arg(format!("birb:e:k{k}"))
                        .exec_async(&mut world.redis().await?)
                        .await?;
                }
                Step::Install(_) | Step::Fill(_) => {}
            }
            for k in 0..2 {
                let least = told.get(&k).copied().unwrap_or(0);
                match cache.get(&key(k)).await? {
                    Some(Stored::Document(held)) => {
                        assert!(held.version.get() >= least, "at step {n} of {steps:?}")
                    }
                    Some(Stored::Absent) => assert_eq!(least, 0, "at step {n} of {steps:?}"),
                    Some(Stored::Leased) | None => {}
                }
            }
        }
    }
    Ok(())
}
