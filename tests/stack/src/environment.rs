//! The variables that point `birb-nest` at a stack, and its processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::server::Kind;
use crate::{
    Port, Process, Proxy, Role, Server, Stack, nest_binary, postgres, spawner, wait_http_ok,
};

/// A debug build on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(60);

static N_SPAWNED: AtomicU64 = AtomicU64::new(0);

/// What a `birb-nest` process is told: where the servers are, and which part of each is its own.
///
/// A clone has the same ports; [`Environment::replica`] has its own, for a second API or worker beside the first.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Variable names and values. Nothing else but PATH is given to the processes.
    pub vars: BTreeMap<String, String>,
    /// Log files are `NAME-ROLE-NUMBER.log`, or `ROLE.log` if there is no name.
    name: Option<String>,
    root: PathBuf,
    ports: Arc<[Port; 2]>,
}

/// Variables that give a process a wall clock which is wrong by `offset`, like `+1h`. Its monotonic clock stays right.
///
/// # Errors
/// libfaketime is not installed.
pub fn wrong_clock(offset: &str) -> Result<[(&'static str, String); 3]> {
    let library = ["x86_64-linux-gnu", "aarch64-linux-gnu"]
        .iter()
        .map(|machine| format!("/usr/lib/{machine}/faketime/libfaketime.so.1"))
        .find(|path| Path::new(path).exists())
        .context(
            "libfaketime is missing: `scripts/init.sh --tests` installs it on Debian and Ubuntu",
        )?;
    Ok([
        ("LD_PRELOAD", library),
        ("FAKETIME", offset.to_owned()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ])
}

impl Environment {
    /// `ports`: of the API and of the worker's `/readyz` and `/metrics`.
    pub(crate) fn new(stack: &Stack, name: Option<String>, ports: [Port; 2]) -> Self {
        let mut environment = Self {
            vars: BTreeMap::new(),
            name,
            root: stack.root().to_owned(),
            ports: Arc::new(ports),
        };
        for server in stack.servers() {
            environment.point(server, server.port());
        }
        if !stack.nats_peers.is_empty() {
            let urls: Vec<String> = stack
                .nats_servers()
                .map(|server| format!("nats://127.0.0.1:{}", server.port()))
                .collect();
            environment
                .set("NATS_URL", urls.join(","))
                .set("NATS_REPLICAS", urls.len().to_string());
        }
        environment
            .set("POSTGRES_DB", postgres::DATABASE)
            .set("REDIS_DB", "0")
            .set("API_HOST", "127.0.0.1")
            .set("WORKER_ADMIN_HOST", "127.0.0.1");
        environment.set("LOG_FORMAT", "text").set_ports();
        environment
    }

    /// Sets one variable.
    pub fn set(&mut self, variable: &str, value: impl Into<String>) -> &mut Self {
        self.vars.insert(variable.to_owned(), value.into());
        self
    }

    /// Takes one variable out.
    pub fn unset(&mut self, variable: &str) -> &mut Self {
        self.vars.remove(variable);
        self
    }

    /// Lets processes that are started from now on reach the proxy's server through the proxy.
    pub fn through(&mut self, proxy: &Proxy) -> &mut Self {
        self.point(proxy.server(), proxy.port());
        self
    }

    /// Gives processes that are started from now on a wall clock that is wrong by `offset`, like `+1h`.
    ///
    /// # Errors
    /// libfaketime is not installed.
    pub fn set_clock(&mut self, offset: &str) -> Result<&mut Self> {
        for (variable, value) in wrong_clock(offset)? {
            self.set(variable, value);
        }
        Ok(self)
    }

    /// The same servers and names, with ports of its own for one more API and worker.
    ///
    /// # Errors
    /// No port is free.
    pub fn replica(&self) -> Result<Self> {
        let mut replica = self.clone();
        replica.ports = Arc::new([Port::reserve()?, Port::reserve()?]);
        replica.set_ports();
        Ok(replica)
    }

    /// Makes a directory for files of a test, removed with the stack.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_dir(&self) -> Result<PathBuf> {
        let n = N_SPAWNED.fetch_add(1, Ordering::Relaxed);
        let dir = self.root.join("files").join(n.to_string());
        std::fs::create_dir_all(&dir)
            .with_context(|| format!("failed to make {}", dir.display()))?;
        Ok(dir)
    }

    /// `http://127.0.0.1:PORT` of the API.
    pub fn api_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[0].number())
    }

    /// `http://127.0.0.1:PORT` of the worker's `/readyz` and `/metrics`.
    pub fn worker_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[1].number())
    }

    /// Starts `birb-nest ROLE`, and waits for nothing.
    ///
    /// # Errors
    /// The program is not there.
    pub fn spawn(&self, role: Role) -> Result<Process> {
        self.spawn_with(role, &[])
    }

    /// Starts `birb-nest ROLE ARGS`, and waits for nothing.
    ///
    /// # Errors
    /// The program is not there.
    pub fn spawn_with(&self, role: Role, args: &[String]) -> Result<Process> {
        let mut command: Command = spawner::tethered(&nest_binary()?, &[])?;
        command
            .arg(role.to_string())
            .args(args)
            .env_clear()
            .envs(&self.vars)
            .current_dir(&self.root);
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        let log = match &self.name {
            None => format!("{role}.log"),
            Some(name) => format!(
                "{name}-{role}-{}.log",
                N_SPAWNED.fetch_add(1, Ordering::Relaxed)
            ),
        };
        Process::spawn(
            &format!("birb-nest {role}"),
            command,
            &self.root,
            &self.root.join("logs").join(log),
        )
    }

    /// Runs `birb-nest setup` to its end.
    ///
    /// # Errors
    /// It failed, or took longer than 60 s; with the end of its log.
    /// # Cancel safety
    /// Dropping the future kills it.
    pub async fn setup(&self) -> Result<()> {
        let setup = self.spawn(Role::Setup)?;
        let status = tokio::time::timeout(READY_LIMIT, setup.wait()).await;
        let outcome = match status {
            Ok(Ok(status)) if status.success() => return Ok(()),
            Ok(status) => format!("failed ({})", status?),
            Err(_) => format!("did not end within {READY_LIMIT:?}"),
        };
        bail!(
            "birb-nest setup {outcome}; its log ends with:\n{}",
            setup.last_lines(30)
        )
    }

    /// Starts the API or a worker and waits until its `/readyz` answers 200.
    ///
    /// # Errors
    /// It ended, or was not ready within 60 s; with the end of its log. [`Role::Setup`] has no `/readyz`: use [`Environment::setup`].
    /// # Cancel safety
    /// Dropping the future kills it.
    pub async fn start(&self, role: Role) -> Result<Process> {
        let url = match role {
            Role::Api => self.api_url(),
            Role::Worker => self.worker_url(),
            Role::Setup => bail!("birb-nest setup ends by itself and is never ready"),
        };
        let process = self.spawn(role)?;
        let url = format!("{url}/readyz");
        let ready = tokio::select! {
            ready = wait_http_ok(&url, READY_LIMIT) => ready,
            status = process.wait() => Err(anyhow::anyhow!("it ended ({})", status?)),
        };
        ready.with_context(|| {
            format!(
                "birb-nest {role} did not get ready; its log ends with:\n{}",
                process.last_lines(30)
            )
        })?;
        Ok(process)
    }

    fn point(&mut self, server: &Server, port: u16) {
        let address = |name: &str| {
            [
                (format!("{name}_HOST"), "127.0.0.1".to_owned()),
                (format!("{name}_PORT"), port.to_string()),
            ]
        };
        match server.kind() {
            Kind::Redis(options) => {
                self.vars.extend(address("REDIS"));
                self.vars.extend(
                    options
                        .password
                        .clone()
                        .map(|password| ("REDIS_PASSWORD".to_owned(), password)),
                );
            }
            Kind::Nats(options, _) => {
                self.set("NATS_URL", format!("nats://127.0.0.1:{port}"));
                if let Some((user, password)) = &options.login {
                    self.set("NATS_USER", user).set("NATS_PASSWORD", password);
                }
            }
            Kind::Postgres => {
                self.vars.extend(address("POSTGRES"));
                self.set("POSTGRES_USER", postgres::USER)
                    .set("POSTGRES_PASSWORD", postgres::PASSWORD);
            }
        }
    }

    fn set_ports(&mut self) {
        let [api, worker] = [0, 1].map(|index: usize| self.ports[index].number().to_string());
        self.set("API_PORT", api).set("WORKER_ADMIN_PORT", worker);
    }
}
