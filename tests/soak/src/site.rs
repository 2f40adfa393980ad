//! What is attacked, and healed again.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use birb_nest_stack::{Environment, Process, Proxy, Role, Server, Snapshot, Stack};
use redis::aio::MultiplexedConnection;
use reqwest::StatusCode;
use serde_json::Value;

use crate::{
    faults::{Attack, Fault, STALL_TIMEOUT, Side},
    stores::{self, Rows},
    takeover,
};

/// Longer than any deadline inside.
const PATIENCE: Duration = Duration::from_secs(8);
/// As many as there are unless it is set.
const N_SHARDS: usize = 8;
/// So many writes refused in a row, of keys of any shard, and the log is full.
const REFUSALS: usize = 5 * N_SHARDS;

/// Two APIs, two workers and the servers under them, which each API and each worker reaches through links that can be cut.
pub struct Site<'a> {
    stack: &'a Stack,
    envs: [Environment; 2],
    /// To Redis, NATS and PostgreSQL: of the first ones, and of the second ones.
    links: [[Proxy; 3]; 2],
    /// Where each process is, while it runs.
    apis: [Process; 2],
    workers: [Process; 2],
    /// Two keys of each shard, of which the second is never written.
    probes: Vec<[String; 2]>,
    old: Option<Snapshot>,
    /// How many keys have been written to fill the log.
    n_fillers: usize,
    /// How far all was stored when PostgreSQL began to take no writes.
    stored: String,
    /// How often the heir had ended sessions of others before the other worker stood still.
    n_evictions: f64,
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
            ("LOG_LEVEL", "info"),
        ] {
            first.set(name, value);
        }
        first.set("WORKER_STALL_TIMEOUT", format!("{STALL_TIMEOUT:?}"));
        let queue = format!("{}_REHYDRATE", first.vars["NATS_STREAM_NAME"]);
        first.set("NATS_REHYDRATE_STREAM_NAME", queue);
        for (name, value) in variables {
            first.set(name, value.clone());
        }
        first.setup().await?;
        let second = first.replica()?;
        let links = || {
            let servers = [&stack.redis, &stack.nats, &stack.postgres];
            let [redis, nats, postgres] = servers.map(Server::proxy);
            anyhow::Ok([redis?, nats?, postgres?])
        };
        let (links, mut envs) = ([links()?, links()?], [first, second]);
        for (env, links) in envs.iter_mut().zip(&links) {
            for link in links {
                env.through(link);
            }
        }
        let apis = [
            envs[0].start(Role::Api).await?,
            envs[1].start(Role::Api).await?,
        ];
        Ok(Self {
            probes: two_of_each_shard(&envs[0].api_url()).await?,
            apis,
            workers: [
                envs[0].start(Role::Worker).await?,
                envs[1].start(Role::Worker).await?,
            ],
            stack,
            envs,
            links,
            old: None,
            n_fillers: 0,
            stored: String::new(),
            n_evictions: 0.0,
        })
    }

    /// Where the APIs are.
    #[must_use]
    pub fn urls(&self) -> [String; 2] {
        [self.envs[0].api_url(), self.envs[1].api_url()]
    }

    /// Where Redis is for each API.
    #[must_use]
    pub fn redis_urls(&self) -> [String; 2] {
        let links = self.links.each_ref();
        links.map(|[redis, ..]| format!("redis://127.0.0.1:{}/", redis.port()))
    }

    /// Two keys of each shard, of which the second is never written.
    #[must_use]
    pub fn probes(&self) -> &[[String; 2]] {
        &self.probes
    }

    /// Makes something wrong.
    ///
    /// # Errors
    /// It cannot be done.
    pub async fn begin(&mut self, attack: &Attack) -> Result<()> {
        let (stack, side) = (self.stack, attack.side);
        match attack.fault {
            Fault::None => {}
            Fault::KillApi => kill(&self.apis[side.of()]).await?,
            Fault::KillWorker => kill(&self.workers[side.of()]).await?,
            Fault::KillRedis => {
                stack.redis.kill().await?;
                stack.redis.lose_data().await?;
            }
            Fault::OldRedis | Fault::OldRedisAlone => {
                if attack.fault == Fault::OldRedisAlone {
                    kill(&self.workers).await?;
                }
                stack.redis.kill().await?;
                stack.redis.restore(self.old()?).await?;
            }
            Fault::LostTail => {
                stack.nats.kill().await?;
                stack.nats.restore(self.old()?).await?;
            }
            Fault::WrongClock => {
                kill(&self.apis[side.of()]).await?;
                for n in side.of() {
                    let mut env = self.envs[n].clone();
                    env.set_clock(attack.clock)?;
                    self.apis[n] = env.start(Role::Api).await?;
                }
            }
            Fault::KillNats => stack.nats.kill().await?,
            Fault::KillPostgres => stack.postgres.kill().await?,
            Fault::PauseApi => pause(&self.apis[side.of()]).await?,
            Fault::PauseWorker => {
                if let Some(heir) = attack.heir() {
                    self.n_evictions = takeover::n_evictions(&self.envs[heir].worker_url()).await?;
                }
                pause(&self.workers[side.of()]).await?;
            }
            Fault::PauseRedis => stack.redis.pause().await?,
            Fault::PauseNats => stack.nats.pause().await?,
            Fault::PausePostgres => stack.postgres.pause().await?,
            Fault::CutRedis | Fault::CutNats | Fault::CutPostgres => {
                self.links_of(attack).for_each(Proxy::cut);
            }
            Fault::SlowLinks => self.links_of(attack).for_each(|it| it.delay(attack.delay)),
            Fault::FlushAll => self.redis("FLUSHALL").await?,
            Fault::ReadOnly | Fault::FullLog => {
                self.read_only(true).await?;
                self.stored = self.applied_to().await?;
                if attack.fault == Fault::FullLog {
                    self.fill_log().await?;
                }
            }
        }
        if attack.empties {
            self.redis("FLUSHALL").await?;
        }
        Ok(())
    }

    /// Waits until it has done what it is for.
    ///
    /// # Errors
    /// It does not.
    pub async fn bites(&self, attack: &Attack) -> Result<()> {
        match attack.heir() {
            Some(heir) => {
                let url = self.envs[heir].worker_url();
                takeover::takes_over(&url, self.n_evictions, N_SHARDS).await
            }
            None => Ok(()),
        }
    }

    /// Makes it right again.
    ///
    /// # Errors
    /// It cannot be done.
    pub async fn heal(&mut self, attack: &Attack) -> Result<()> {
        let (stack, side) = (self.stack, attack.side);
        match attack.fault {
            Fault::None | Fault::FlushAll => {}
            Fault::KillApi => self.start_again(Role::Api, side).await?,
            Fault::KillWorker => self.start_again(Role::Worker, side).await?,
            Fault::KillRedis | Fault::OldRedis => self.start_redis(attack.fault).await?,
            Fault::OldRedisAlone => {
                self.start_redis(attack.fault).await?;
                self.start_again(Role::Worker, Side::Both).await?;
            }
            Fault::KillNats | Fault::LostTail => stack.nats.start().await?,
            Fault::WrongClock => {
                kill(&self.apis[side.of()]).await?;
                self.start_again(Role::Api, side).await?;
            }
            Fault::KillPostgres => stack.postgres.start().await?,
            Fault::PauseApi => resume(&self.apis[side.of()]).await?,
            Fault::PauseWorker => resume(&self.workers[side.of()]).await?,
            Fault::PauseRedis => stack.redis.resume().await?,
            Fault::PauseNats => stack.nats.resume().await?,
            Fault::PausePostgres => stack.postgres.resume().await?,
            Fault::CutRedis | Fault::CutNats | Fault::CutPostgres => {
                self.links_of(attack).for_each(Proxy::heal);
            }
            Fault::SlowLinks => self
                .links_of(attack)
                .for_each(|it| it.delay(Duration::ZERO)),
            Fault::ReadOnly | Fault::FullLog => {
                let (before, after) = (&self.stored, self.applied_to().await?);
                ensure!(
                    *before == after,
                    "PostgreSQL was to take no writes, and has stored from {before} to {after}"
                );
                self.read_only(false).await?;
            }
        }
        Ok(())
    }

    /// The links that it is about.
    fn links_of(&self, attack: &Attack) -> impl Iterator<Item = &Proxy> {
        let servers = match attack.fault {
            Fault::CutRedis => 0..1,
            Fault::CutNats => 1..2,
            Fault::CutPostgres => 2..3,
            _ => 0..3,
        };
        let sides = self.links[attack.side.of()].iter();
        sides.flat_map(move |links| &links[servers.clone()])
    }

    async fn start_again(&mut self, role: Role, side: Side) -> Result<()> {
        let processes = match role {
            Role::Api => &mut self.apis,
            _ => &mut self.workers,
        };
        for n in side.of() {
            processes[n] = self.envs[n].start(role).await?;
        }
        Ok(())
    }

    /// What has to be done in the middle of a round, before its fault.
    ///
    /// # Errors
    /// It cannot be done.
    pub async fn prepare(&mut self, attack: &Attack) -> Result<()> {
        match attack.fault {
            Fault::OldRedis | Fault::OldRedisAlone => {
                self.old = Some(self.stack.redis.snapshot().await?)
            }
            Fault::LostTail => self.old = Some(self.stack.nats.snapshot().await?),
            // Who owns nothing can lose nothing.
            Fault::PauseWorker => {
                for env in &self.envs[attack.side.of()] {
                    takeover::owns(&env.worker_url()).await?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Waits until nothing is left to be stored. Returns what PostgreSQL has.
    ///
    /// # Errors
    /// It is not so after `patience`: a sentence about what is in the way.
    pub async fn all_is_stored(&self, patience: Duration) -> Result<Rows> {
        stores::drained(self.stack, &self.envs[0], patience).await
    }

    /// Waits until nothing is left to be stored, nothing is dead, and Redis has of no key anything else than PostgreSQL.
    /// Returns what that has.
    ///
    /// # Errors
    /// It is not so after `patience`: a sentence about what is in the way.
    pub async fn stores_agree(&self, patience: Duration) -> Result<Rows> {
        stores::agree(self.stack, &self.envs[0], patience).await
    }

    /// Asks PostgreSQL.
    ///
    /// # Errors
    /// It refuses.
    pub async fn sql(&self, sql: &str) -> Result<String> {
        self.stack
            .psql(&self.envs[0].vars["POSTGRES_DB"], sql)
            .await
    }

    /// How far all shards together are stored.
    async fn applied_to(&self) -> Result<String> {
        self.sql("select sum(applied_to) from shard_state").await
    }

    /// Starts it, and sees that it comes back with what it is to come back with.
    async fn start_redis(&self, fault: Fault) -> Result<()> {
        self.stack.redis.start().await?;
        let info: String = redis::cmd("INFO")
            .arg("persistence")
            .query_async(&mut self.connect_to_redis().await?)
            .await?;
        let mut loaded = info.lines().filter_map(|line| {
            let n = line.strip_prefix("rdb_last_load_keys_loaded:")?;
            n.trim().parse::<u64>().ok()
        });
        let n = loaded.next().context("Redis says what it has loaded")?;
        ensure!(
            (n == 0) == (fault == Fault::KillRedis),
            "after {fault:?} Redis came back with {n} keys"
        );
        Ok(())
    }

    /// Whether no process has ended by itself.
    ///
    /// # Errors
    /// Which one, and how.
    pub fn all_run(&self) -> Result<()> {
        for (name, processes) in [("API", &self.apis), ("worker", &self.workers)] {
            for (n, process) in processes.iter().enumerate() {
                let ended = process.exited()?;
                ensure!(
                    ended.is_none(),
                    "{name} {n} has ended by itself: {ended:?}\n{}",
                    process.last_lines(15)
                );
            }
        }
        Ok(())
    }

    /// The processes: two APIs, two workers.
    #[must_use]
    pub fn processes(&self) -> [&Process; 4] {
        let ([a, b], [c, d]) = (&self.apis, &self.workers);
        [a, b, c, d]
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
        let mut connection = self.connect_to_redis().await?;
        Ok(redis::cmd(command).exec_async(&mut connection).await?)
    }

    async fn connect_to_redis(&self) -> Result<MultiplexedConnection> {
        let url = format!("redis://127.0.0.1:{}/", self.stack.redis.port());
        stores::redis_at(&url).await
    }

    /// Writes keys of its own, ever smaller ones, until no shard takes any more.
    async fn fill_log(&mut self) -> Result<()> {
        let http = reqwest::Client::builder().timeout(PATIENCE).build()?;
        let most = self.n_fillers + 10_000;
        for n_bytes in [100_000, 5_000, 200] {
            let body = format!("{{\"value\":\"{}\"}}", "x".repeat(n_bytes));
            let mut n_refused = 0;
            while n_refused < REFUSALS {
                ensure!(self.n_fillers < most, "the log is never full");
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
        let sql = async |sql: String| self.stack.psql("postgres", &sql).await;
        sql(format!(
            "alter database \"{database}\" set default_transaction_read_only = {on}"
        ))
        .await?;
        let since = sql("select clock_timestamp()".to_owned()).await?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let ended = sql(format!(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity
                 where datname = '{database}' and backend_start <= '{}'",
                since.trim()
            ));
            if ended.await?.trim() == "0" {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "sessions of PostgreSQL do not end"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn two_of_each_shard(url: &str) -> Result<Vec<[String; 2]>> {
    let mut probes: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for n in 0..200 {
        let key = format!("probe-{n}");
        let found = reqwest::get(format!("{url}/v1/debug/{key}")).await?;
        let found: Value = found.json().await?;
        let shard = found["shard"].as_u64().context("a key has a shard")?;
        let keys = probes.entry(shard).or_default();
        if keys.len() < 2 {
            keys.push(key);
        }
    }
    let probes: Vec<[String; 2]> = probes
        .into_values()
        .filter_map(|it| it.try_into().ok())
        .collect();
    ensure!(probes.len() == N_SHARDS, "200 keys are not of all shards");
    Ok(probes)
}

async fn kill(processes: &[Process]) -> Result<()> {
    for process in processes {
        let ended = process.exited()?;
        ensure!(ended.is_none(), "a process has ended by itself: {ended:?}");
        process.kill().await?;
    }
    Ok(())
}

async fn pause(processes: &[Process]) -> Result<()> {
    for process in processes {
        process.pause().await?;
    }
    Ok(())
}

async fn resume(processes: &[Process]) -> Result<()> {
    for process in processes {
        process.resume().await?;
    }
    Ok(())
}
