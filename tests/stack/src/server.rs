//! One server: its life, its faults, its data.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::nats::Cluster;
use crate::wait::{POLL, blocking};
use crate::{
    NatsOptions, Port, Process, Proxy, RedisOptions, Snapshot, nats, postgres, proc_fs, redis,
    snapshot,
};

/// PostgreSQL may have to replay its log, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Which server, and how it is run.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Redis(RedisOptions),
    Nats(NatsOptions, Option<Cluster>),
    Postgres,
}

/// A Redis, NATS or PostgreSQL on one port of 127.0.0.1 and in one data directory, running or not.
///
/// The methods may be called in any order and from several tasks at once (one after the other takes effect). A future that
/// is dropped has no further effect on its caller, but what it began is completed.
#[derive(Clone, Debug)]
pub struct Server(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    port: Port,
    dir: PathBuf,
    log: PathBuf,
    process: Mutex<Option<Process>>,
    n_snapshots: AtomicU64,
}

impl Server {
    /// Not started yet. `root` gets the directory of this server and its log.
    pub(crate) fn new(kind: Kind, port: Port, root: &Path) -> Self {
        let name = kind.to_string();
        Self(Arc::new(Inner {
            dir: root.join(&name),
            log: root.join("logs").join(name + ".log"),
            kind,
            port,
            process: Mutex::new(None),
            n_snapshots: AtomicU64::new(0),
        }))
    }

    pub(crate) fn kind(&self) -> &Kind {
        &self.0.kind
    }

    /// `redis`, `nats` (in a cluster also `nats-1` and so on) or `postgres`.
    pub fn name(&self) -> String {
        self.0.kind.to_string()
    }

    /// The port on 127.0.0.1, the same for as long as the stack lives.
    pub fn port(&self) -> u16 {
        self.0.port.number()
    }

    /// The file with its output.
    pub fn log_file(&self) -> &Path {
        &self.0.log
    }

    /// The id of its process (for PostgreSQL, of the postmaster); `None` if none runs.
    pub fn pid(&self) -> Option<u32> {
        self.0.process().as_ref().map(Process::pid)
    }

    /// How it ended, if it ended by itself or was killed by someone else; `None` while it runs, is paused, or was stopped by us.
    ///
    /// # Errors
    /// The system refused to say.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        self.0.process().as_ref().map_or(Ok(None), Process::exited)
    }

    /// The last `n` lines it wrote since it was started, for messages.
    pub fn last_lines(&self, n: usize) -> String {
        self.0
            .process()
            .as_ref()
            .map(|process| process.last_lines(n))
            .unwrap_or_default()
    }

    /// A new proxy in front of it, on a port of its own.
    ///
    /// # Errors
    /// No port is free.
    pub fn proxy(&self) -> Result<Proxy> {
        Proxy::start(self.clone())
    }

    /// Starts it, unless it runs; afterwards it answers. A paused one is resumed.
    ///
    /// # Errors
    /// Its program is missing or too old, it ended while it started, or it does not answer within 60 s; with the end of its
    /// log.
    pub async fn start(&self) -> Result<()> {
        self.run(Inner::start).await
    }

    /// Stops it in good order: Redis and NATS by SIGTERM, PostgreSQL by SIGINT (a fast shutdown). Nothing to do if it does not run.
    ///
    /// # Errors
    /// It took longer than 30 s; it still runs then.
    pub async fn stop(&self) -> Result<()> {
        self.run(Inner::stop).await
    }

    /// [`Server::stop`], then [`Server::start`].
    ///
    /// # Errors
    /// Those of both.
    pub async fn restart(&self) -> Result<()> {
        self.run(|inner| inner.stop().and_then(|()| inner.start()))
            .await
    }

    /// Kills it and all its processes (SIGKILL), and returns when they are gone. Nothing to do if it does not run.
    ///
    /// # Errors
    /// Something survived for 10 s.
    pub async fn kill(&self) -> Result<()> {
        self.run(Inner::kill).await
    }

    /// Stops all its processes where they are (SIGSTOP); connections stay open and nobody answers.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self) -> Result<()> {
        self.run(|inner| inner.running(&inner.process())?.pause_now())
            .await
    }

    /// Lets it go on after [`Server::pause`].
    ///
    /// # Errors
    /// It does not run.
    pub async fn resume(&self) -> Result<()> {
        self.run(|inner| inner.running(&inner.process())?.resume_now())
            .await
    }

    /// Copies its data, whether it runs or not.
    ///
    /// Redis writes its data first (SAVE). NATS and PostgreSQL stand still for the moment of the copy, so that it looks as after a
    /// power failure. A server that runs or was paused runs afterwards.
    ///
    /// # Errors
    /// Redis does not answer, or the disk is full.
    pub async fn snapshot(&self) -> Result<Snapshot> {
        self.run(Inner::snapshot).await
    }

    /// Puts back the data of a snapshot of this server, which must not run; or of another one of its kind.
    ///
    /// # Errors
    /// It runs, or the disk is full.
    pub async fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        let path = snapshot.path.clone();
        self.run(move |inner| inner.restore(&path)).await
    }

    /// Removes the data of a Redis or a NATS server, which must not run.
    ///
    /// # Errors
    /// It runs, or it is PostgreSQL, which does not start without.
    pub async fn lose_data(&self) -> Result<()> {
        self.run(Inner::lose_data).await
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.0);
        blocking(move || work(&inner)).await
    }
}

impl Inner {
    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        self.process
            .lock()
            .expect("nothing panics while it holds the process")
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn running<'a>(&self, slot: &'a Option<Process>) -> Result<&'a Process> {
        let process = slot
            .as_ref()
            .with_context(|| format!("{} does not run: start it first", self.kind))?;
        match process.exited()? {
            None => Ok(process),
            Some(status) => bail!("{} ended by itself ({status}): start it first", self.kind),
        }
    }

    fn start(&self) -> Result<()> {
        let mut slot = self.process();
        match self.running(&slot) {
            Ok(process) => process.resume_now()?,
            Err(_) => {
                proc_fs::kill_leftovers(&self.dir)?;
                std::fs::create_dir_all(&self.dir)
                    .with_context(|| format!("failed to create {}", self.dir.display()))?;
                let command = self
                    .command()
                    .with_context(|| format!("failed to prepare {}", self.kind))?;
                *slot = Some(Process::spawn(
                    &self.kind.to_string(),
                    command,
                    &self.dir,
                    &self.log,
                )?);
            }
        }
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let Err(error) = self.answers() else {
                return Ok(());
            };
            let Some(process) = slot.as_ref() else {
                unreachable!("it was started above")
            };
            let failure = match process.exited()? {
                Some(status) => format!("{} ended while it started ({status})", self.kind),
                None if Instant::now() >= deadline => {
                    format!("{} does not answer after {START_LIMIT:?}", self.kind)
                }
                None => {
                    std::thread::sleep(POLL);
                    continue;
                }
            };
            let log = process.last_lines(20);
            return Err(error.context(format!(
                "{failure}; {} ends with:\n{log}",
                self.log.display()
            )));
        }
    }

    fn command(&self) -> Result<Command> {
        match &self.kind {
            Kind::Redis(options) => redis::command(options, self.port.number(), &self.dir),
            Kind::Nats(options, cluster) => {
                nats::command(options, cluster.as_ref(), self.port.number(), &self.dir)
            }
            Kind::Postgres => postgres::command(self.port.number(), &self.dir),
        }
    }

    fn answers(&self) -> Result<()> {
        match &self.kind {
            Kind::Redis(options) => redis::answers(options, self.port.number()),
            Kind::Nats(options, _) => nats::answers(options, self.port.number()),
            Kind::Postgres => postgres::answers(self.port.number()),
        }
    }

    fn stop(&self) -> Result<()> {
        let mut slot = self.process();
        if let Ok(process) = self.running(&slot) {
            let signal = if matches!(self.kind, Kind::Postgres) {
                Signal::INT
            } else {
                Signal::TERM
            };
            process.end_now(signal, STOP_LIMIT)?;
        }
        *slot = None;
        Ok(())
    }

    fn kill(&self) -> Result<()> {
        let mut slot = self.process();
        if let Some(process) = slot.as_ref() {
            process.kill_now()?;
        }
        *slot = None;
        Ok(())
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let slot = self.process();
        let running = self.running(&slot).ok();
        let number = self.n_snapshots.fetch_add(1, Ordering::Relaxed);
        let snapshot = Snapshot {
            path: self.dir.join(format!("snapshot-{number}")),
        };
        match (&self.kind, running) {
            (Kind::Redis(options), Some(process)) => {
                process.resume_now()?;
                redis::save(options, self.port.number()).context("failed to save Redis' data")?;
                snapshot::copy(&self.data(), &snapshot.path)?;
                if !options.snapshots {
                    // Else a Redis that keeps nothing would find it when it starts again.
                    std::fs::remove_file(self.data().join("dump.rdb"))?;
                }
            }
            (_, Some(process)) => {
                process.pause_now()?;
                let copied = snapshot::copy(&self.data(), &snapshot.path);
                process.resume_now()?;
                copied?;
            }
            (_, None) => snapshot::copy(&self.data(), &snapshot.path)?,
        }
        Ok(snapshot)
    }

    fn lose_data(&self) -> Result<()> {
        let slot = self.process();
        if self.running(&slot).is_ok() || matches!(self.kind, Kind::Postgres) {
            bail!("{} cannot lose its data now", self.kind);
        }
        snapshot::remove(&self.data())
    }

    fn restore(&self, path: &Path) -> Result<()> {
        let slot = self.process();
        if self.running(&slot).is_ok() {
            bail!(
                "{} runs: stop or kill it before its data is put back",
                self.kind
            );
        }
        proc_fs::kill_leftovers(&self.dir)?;
        self.clean_up()?;
        snapshot::remove(&self.data())?;
        snapshot::copy(path, &self.data())
    }

    fn clean_up(&self) -> Result<()> {
        if matches!(self.kind, Kind::Postgres) {
            postgres::clean_up(&self.dir)?;
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // What survives, or is left, is found by the next start.
        if self.kill().is_ok() {
            let _ = self.clean_up();
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redis(_) => f.write_str("redis"),
            Self::Nats(_, Some(cluster)) if cluster.place > 0 => {
                write!(f, "nats-{}", cluster.place)
            }
            Self::Nats(..) => f.write_str("nats"),
            Self::Postgres => f.write_str("postgres"),
        }
    }
}
