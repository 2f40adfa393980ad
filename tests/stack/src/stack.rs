//! The three servers together.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Result, bail};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::nats::{self, Cluster};
use crate::root::Root;
use crate::server::Kind;
use crate::wait::blocking;
use crate::{Environment, NatsOptions, Port, RedisOptions, Server, postgres, redis};

/// How the servers are run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Redis.
    pub redis: RedisOptions,
    /// NATS.
    pub nats: NatsOptions,
    /// Further NATS servers that replicate streams with the first; two make a cluster of three.
    pub n_nats_peers: usize,
}

/// Where the servers listen on 127.0.0.1.
#[derive(Debug)]
pub struct Ports {
    /// Redis.
    pub redis: Port,
    /// NATS.
    pub nats: Port,
    /// PostgreSQL.
    pub postgres: Port,
}

impl Ports {
    /// Three free ones.
    ///
    /// # Errors
    /// No port is free.
    pub fn reserve() -> Result<Self> {
        Ok(Self {
            redis: Port::reserve()?,
            nats: Port::reserve()?,
            postgres: Port::reserve()?,
        })
    }
}

/// A Redis, a NATS and a PostgreSQL, each usable on its own. Dropped, they are killed.
#[derive(Debug)]
pub struct Stack {
    /// Redis.
    pub redis: Server,
    /// NATS with `JetStream`.
    pub nats: Server,
    /// PostgreSQL with the superuser `birb`, its password `birb` and the database `birb_nest`.
    pub postgres: Server,
    /// The other servers of NATS's cluster, if it is one.
    pub nats_peers: Vec<Server>,
    nats_options: NatsOptions,
    n_isolated: AtomicU32,
    /// Last, so that the servers are gone when it is removed.
    root: Root,
}

/// The stack that all tests of this process share, started by the first one that asks; its `JetStream` has room for the
/// reservations of many tests.
///
/// It is never dropped: the servers die with the process, and the next stack that starts removes the directory.
///
/// # Errors
/// Those of [`Stack::fresh`]; the next call tries again.
pub async fn shared() -> Result<&'static Stack> {
    static SHARED: OnceCell<Stack> = OnceCell::const_new();
    let nats = NatsOptions {
        max_file_bytes: 1 << 40,
        ..NatsOptions::default()
    };
    SHARED
        .get_or_try_init(|| {
            Stack::fresh_with(Options {
                nats,
                ..Options::default()
            })
        })
        .await
}

impl Stack {
    /// A running stack with default options on free ports in a temporary directory, which is removed on drop.
    ///
    /// # Errors
    /// A server's program is missing or too old, or a server does not start.
    /// # Cancel safety
    /// Dropping the future kills what was started.
    pub async fn fresh() -> Result<Self> {
        Self::fresh_with(Options::default()).await
    }

    /// [`Stack::fresh`] with the given options.
    ///
    /// # Errors
    /// Those of [`Stack::fresh`].
    pub async fn fresh_with(options: Options) -> Result<Self> {
        let (root, ports) =
            blocking(|| Ok((Root::temporary("stacks", clean_up)?, Ports::reserve()?))).await?;
        let stack = Self::new(root, ports, options)?;
        stack.start().await?;
        Ok(stack)
    }

    /// A stack whose data in `dir` is kept, not started yet. What a crashed run left behind is killed first; then `ports` is
    /// called, so that it finds them free.
    ///
    /// # Errors
    /// Another process has a stack in `dir`, or `ports` failed.
    pub async fn open(
        dir: &Path,
        ports: impl FnOnce() -> Result<Ports> + Send + 'static,
        options: Options,
    ) -> Result<Self> {
        let dir = dir.to_owned();
        let (root, ports) = blocking(move || Ok((Root::kept(&dir, clean_up)?, ports()?))).await?;
        Self::new(root, ports, options)
    }

    fn new(root: Root, ports: Ports, options: Options) -> Result<Self> {
        let n_peers = options.n_nats_peers;
        let routes: Arc<[Port]> = match n_peers {
            0 => Arc::new([]),
            _ => (0..=n_peers)
                .map(|_| Port::reserve())
                .collect::<Result<_>>()?,
        };
        let nats = |place: usize, port: Port| {
            let cluster = (n_peers > 0).then(|| Cluster {
                place,
                routes: routes.clone(),
            });
            Server::new(Kind::Nats(options.nats.clone(), cluster), port, root.path())
        };
        let nats_peers = (1..=n_peers)
            .map(|place| Ok(nats(place, Port::reserve()?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            redis: Server::new(Kind::Redis(options.redis), ports.redis, root.path()),
            nats: nats(0, ports.nats),
            postgres: Server::new(Kind::Postgres, ports.postgres, root.path()),
            nats_peers,
            nats_options: options.nats,
            n_isolated: AtomicU32::new(0),
            root,
        })
    }

    /// All servers of NATS, the first of which is `nats`.
    pub fn nats_servers(&self) -> impl Iterator<Item = &Server> {
        std::iter::once(&self.nats).chain(&self.nats_peers)
    }

    /// The directory with one directory per server, and `logs`.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// One of each kind, in the order in which they are started.
    pub fn servers(&self) -> [&Server; 3] {
        [&self.redis, &self.nats, &self.postgres]
    }

    /// Starts all servers at once, those that do not run.
    ///
    /// # Errors
    /// Those of [`Server::start`].
    pub async fn start(&self) -> Result<()> {
        // At once: a cluster answers when most of it runs.
        let mut peers = JoinSet::new();
        for peer in self.nats_peers.clone() {
            peers.spawn(async move { peer.start().await });
        }
        tokio::try_join!(self.redis.start(), self.nats.start(), self.postgres.start())?;
        while let Some(started) = peers.join_next().await {
            started??;
        }
        let n_servers = 1 + self.nats_peers.len();
        if n_servers > 1 {
            let (options, port) = (self.nats_options.clone(), self.nats.port());
            blocking(move || nats::until_replicated(&options, port, n_servers)).await?;
        }
        Ok(())
    }

    /// Stops all servers in good order.
    ///
    /// # Errors
    /// Those of [`Server::stop`]; the others are stopped nevertheless.
    pub async fn stop(&self) -> Result<()> {
        let (redis, nats, postgres) =
            tokio::join!(self.redis.stop(), self.nats.stop(), self.postgres.stop());
        let mut stopped = redis.and(nats).and(postgres);
        for peer in &self.nats_peers {
            stopped = stopped.and(peer.stop().await);
        }
        stopped
    }

    /// Runs SQL as superuser through psql; returns rows as lines, columns separated by `|`.
    ///
    /// # Errors
    /// PostgreSQL cannot be reached, or refused the statement.
    pub async fn psql(&self, database: &str, sql: &str) -> Result<String> {
        let (port, database, sql) = (self.postgres.port(), database.to_owned(), sql.to_owned());
        blocking(move || postgres::psql(port, &database, &sql)).await
    }

    /// The variables for the default database, Redis database 0 and the default stream names, with the given ports.
    pub fn environment(&self, api: Port, worker_admin: Port) -> Environment {
        Environment::new(self, None, [api, worker_admin])
    }

    /// Variables with a new empty database, a Redis database, stream names and a subject prefix that nobody else has, and
    /// free ports.
    ///
    /// # Errors
    /// PostgreSQL does not run, no port is free, or all 511 Redis databases of this stack are taken.
    pub async fn isolated(&self) -> Result<Environment> {
        let number = 1 + self.n_isolated.fetch_add(1, Ordering::Relaxed);
        if number >= redis::DATABASES {
            bail!(
                "all {} Redis databases of this stack are taken: use a fresh stack",
                redis::DATABASES
            );
        }
        let database = format!("birb_nest_{number}");
        self.psql("postgres", &format!("create database {database}"))
            .await?;
        let mut environment = Environment::new(
            self,
            Some(format!("t{number}")),
            [Port::reserve()?, Port::reserve()?],
        );
        environment
            .set("POSTGRES_DB", database)
            .set("REDIS_DB", number.to_string())
            .set("NATS_STREAM_NAME", format!("BIRB_{number}"))
            .set("NATS_DLQ_STREAM_NAME", format!("BIRB_{number}_DLQ"))
            .set("NATS_SUBJECT_PREFIX", format!("birb{number}"));
        Ok(environment)
    }
}

fn clean_up(root: &Path) -> Result<()> {
    postgres::clean_up(&root.join("postgres"))
}
