//! What goes wrong, and is healed again.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use birb_nest_stack::{Environment, Process, Proxy, Role, Server, Snapshot, Stack};
use reqwest::StatusCode;

/// Longer than any deadline inside.
const PATIENCE: Duration = Duration::from_secs(8);
/// So many writes refused in a row, of keys of any shard, and the log is full: there are eight shards.
const REFUSALS: usize = 40;

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
    /// The links of one API and one worker to a server are cut.
    CutRedis,
    /// See above.
    CutNats,
    /// See above.
    CutPostgres,
    /// Those links are slow.
    SlowLinks,
    /// Somebody empties Redis.
    FlushAll,
    /// PostgreSQL takes no writes.
    ReadOnly,
    /// Nor does it, and the log is full.
    FullLog,
    /// An API comes back with a clock that is an hour ahead.
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
}

/// Two APIs, two workers and the servers under them. The second API and the second worker reach the servers through links
/// that can be cut.
pub struct Site<'a> {
    stack: &'a Stack,
    envs: [Environment; 2],
    links: [Proxy; 3],
    /// Where each process is, while it runs.
    apis: [Process; 2],
    workers: [Process; 2],
    old: Option<Snapshot>,
    /// How many keys have been written to fill the log.
    n_fillers: usize,
}

impl<'a> Site<'a> {
    /// Sets it up and starts it.
    ///
    /// # Errors
    /// Something does not start.
    pub async fn start(stack: &'a Stack, variables: &[(&str, String)]) -> Result<Self> {
        let mut first = stack.isolated().await?;
        for (name, value) in [
            ("NATS_STREAM_MAX_BYTES", "1MiB"),
            ("NATS_DLQ_MAX_BYTES", "4MiB"),
            // What is stored leaves the log soon, so that PostgreSQL is asked.
            ("LOG_TRIM_LAG", "300ms"),
            ("LOG_TRIM_INTERVAL", "100ms"),
            ("WORKER_STALL_TIMEOUT", "2s"),
            ("LOG_LEVEL", "info"),
        ] {
            first.set(name, value);
        }
        let queue = format!("{}_REHYDRATE", first.vars["NATS_STREAM_NAME"]);
        first.set("NATS_REHYDRATE_STREAM_NAME", queue);
        for (name, value) in variables {
            first.set(name, value.clone());
        }
        first.setup().await?;
        let mut second = first.replica()?;
        let [redis, nats, postgres] = [&stack.redis, &stack.nats, &stack.postgres];
        let links = [redis.proxy()?, nats.proxy()?, postgres.proxy()?];
        for link in &links {
            second.through(link);
        }
        let envs = [first, second];
        Ok(Self {
            apis: [
                envs[0].start(Role::Api).await?,
                envs[1].start(Role::Api).await?,
            ],
            workers: [
                envs[0].start(Role::Worker).await?,
                envs[1].start(Role::Worker).await?,
            ],
            stack,
            envs,
            links,
            old: None,
            n_fillers: 0,
        })
    }

    /// Where the APIs are.
    #[must_use]
    pub fn urls(&self) -> [String; 2] {
        [self.envs[0].api_url(), self.envs[1].api_url()]
    }

    /// Makes something wrong.
    ///
    /// # Errors
    /// It cannot be done.
    pub async fn begin(&mut self, fault: Fault) -> Result<()> {
        let stack = self.stack;
        match fault {
            Fault::None => {}
            Fault::KillApi => self.apis[1].kill().await?,
            Fault::KillWorker => self.workers[1].kill().await?,
            Fault::KillRedis => stack.redis.kill().await?,
            Fault::OldRedis | Fault::OldRedisAlone => {
                if fault == Fault::OldRedisAlone {
                    for worker in &self.workers {
                        worker.kill().await?;
                    }
                }
                stack.redis.kill().await?;
                stack.redis.restore(self.old()?).await?;
            }
            Fault::LostTail => {
                stack.nats.kill().await?;
                stack.nats.restore(self.old()?).await?;
            }
            Fault::WrongClock => {
                self.apis[1].kill().await?;
                let mut env = self.envs[1].clone();
                env.set_clock("+1h")?;
                self.apis[1] = env.start(Role::Api).await?;
            }
            Fault::KillNats => stack.nats.kill().await?,
            Fault::KillPostgres => stack.postgres.kill().await?,
            Fault::PauseApi => self.apis[0].pause().await?,
            Fault::PauseWorker => self.workers[0].pause().await?,
            Fault::PauseRedis => stack.redis.pause().await?,
            Fault::PauseNats => stack.nats.pause().await?,
            Fault::PausePostgres => stack.postgres.pause().await?,
            Fault::CutRedis => self.links[0].cut(),
            Fault::CutNats => self.links[1].cut(),
            Fault::CutPostgres => self.links[2].cut(),
            Fault::SlowLinks => {
                for link in &self.links {
                    link.delay(Duration::from_millis(40));
                }
            }
            Fault::FlushAll => self.redis("FLUSHALL").await?,
            Fault::ReadOnly => self.read_only(true).await?,
            Fault::FullLog => {
                self.read_only(true).await?;
                self.fill_log().await?;
            }
        }
        Ok(())
    }

    /// Makes it right again.
    ///
    /// # Errors
    /// It cannot be done.
    pub async fn heal(&mut self, fault: Fault) -> Result<()> {
        let stack = self.stack;
        match fault {
            Fault::None | Fault::FlushAll => {}
            Fault::KillApi => self.apis[1] = self.envs[1].start(Role::Api).await?,
            Fault::KillWorker => self.workers[1] = self.envs[1].start(Role::Worker).await?,
            Fault::KillRedis | Fault::OldRedis => stack.redis.start().await?,
            Fault::OldRedisAlone => {
                stack.redis.start().await?;
                for (worker, env) in self.workers.iter_mut().zip(&self.envs) {
                    *worker = env.start(Role::Worker).await?;
                }
            }
            Fault::KillNats | Fault::LostTail => stack.nats.start().await?,
            Fault::WrongClock => {
                self.apis[1].kill().await?;
                self.apis[1] = self.envs[1].start(Role::Api).await?;
            }
            Fault::KillPostgres => stack.postgres.start().await?,
            Fault::PauseApi => self.apis[0].resume().await?,
            Fault::PauseWorker => self.workers[0].resume().await?,
            Fault::PauseRedis => stack.redis.resume().await?,
            Fault::PauseNats => stack.nats.resume().await?,
            Fault::PausePostgres => stack.postgres.resume().await?,
            Fault::CutRedis => self.links[0].heal(),
            Fault::CutNats => self.links[1].heal(),
            Fault::CutPostgres => self.links[2].heal(),
            Fault::SlowLinks => {
                for link in &self.links {
                    link.delay(Duration::ZERO);
                }
            }
            Fault::ReadOnly | Fault::FullLog => self.read_only(false).await?,
        }
        Ok(())
    }

    /// What has to be done in the middle of a round, before its fault.
    ///
    /// # Errors
    /// It cannot be done.
    pub async fn prepare(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::OldRedis | Fault::OldRedisAlone => {
                self.old = Some(self.stack.redis.snapshot().await?)
            }
            Fault::LostTail => self.old = Some(self.stack.nats.snapshot().await?),
            _ => {}
        }
        Ok(())
    }

    fn old(&self) -> Result<&Snapshot> {
        self.old.as_ref().context("nothing was copied")
    }

    /// Ends of the logs of all processes, for messages.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let processes = self.apis.iter().chain(&self.workers);
        processes
            .map(|process| process.last_lines(15))
            .collect::<Vec<_>>()
            .join("\n---\n")
    }

    async fn redis(&self, command: &str) -> Result<()> {
        let server: &Server = &self.stack.redis;
        let url = format!("redis://127.0.0.1:{}/", server.port());
        let mut connection = redis::Client::open(url)?
            .get_multiplexed_async_connection()
            .await?;
        Ok(redis::cmd(command).exec_async(&mut connection).await?)
    }

    /// Writes keys of its own, ever smaller ones, until no shard takes any more.
    async fn fill_log(&mut self) -> Result<()> {
        let http = reqwest::Client::builder().timeout(PATIENCE).build()?;
        for n_bytes in [100_000, 5_000, 200] {
            let body = format!("{{\"value\":\"{}\"}}", "x".repeat(n_bytes));
            let mut n_refused = 0;
            while n_refused < REFUSALS {
                ensure!(self.n_fillers < 10_000, "the log is never full");
                let key = format!("filler-{}", self.n_fillers);
                self.n_fillers += 1;
                let write = http
                    .post(format!("{}/v1/cache/{key}", self.envs[0].api_url()))
                    .header("content-type", "application/json")
                    .body(body.clone());
                match write.send().await?.status() {
                    StatusCode::CREATED => n_refused = 0,
                    StatusCode::SERVICE_UNAVAILABLE => n_refused += 1,
                    status => bail!("{status} from a log that is filled"),
                }
            }
        }
        Ok(())
    }

    async fn read_only(&self, on: bool) -> Result<()> {
        let database = &self.envs[0].vars["POSTGRES_DB"];
        let on = if on { "on" } else { "off" };
        // From another database: this one is read-only for us, too.
        let sql = format!(
            "alter database \"{database}\" set default_transaction_read_only = {on};
             select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'"
        );
        self.stack.psql("postgres", &sql).await?;
        Ok(())
    }
}
