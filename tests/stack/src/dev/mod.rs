//! Starts everything, watches it, stops it in order.

mod banner;
mod follow;
mod supervise;

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs;
use std::future::pending;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use birb_nest_stack::{Environment, Options, Port, Ports, Role, Stack, nest_binary};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use follow::Follower;
use supervise::{Supervised, watch_server};

#[derive(Args)]
pub(crate) struct Arguments {
    /// Where data, logs and `env` (the variables to connect with) go.
    #[arg(long, default_value = ".dev")]
    data: PathBuf,
    /// Start only Redis, NATS and PostgreSQL.
    #[arg(long)]
    servers_only: bool,
    /// Port of the API.
    #[arg(long, env, default_value_t = 8080)]
    api_port: u16,
    /// Port of the worker's /readyz and /metrics.
    #[arg(long, env, default_value_t = 9091)]
    worker_admin_port: u16,
    /// Port of Redis; not 6379, where a package's own server may run.
    #[arg(long, env, default_value_t = 16379)]
    redis_port: u16,
    /// Port of NATS; not 4222, for the same reason.
    #[arg(long, env, default_value_t = 14222)]
    nats_port: u16,
    /// Port of PostgreSQL; not 5432, for the same reason.
    #[arg(long, env, default_value_t = 15432)]
    postgres_port: u16,
}

/// Runs until it is told to stop (Ctrl-C, SIGTERM, SIGHUP); everything is stopped when it returns.
pub(crate) async fn run(arguments: Arguments) -> Result<()> {
    let mut signals = Signals::listen()?;
    if !arguments.servers_only {
        nest_binary()?;
    }
    let (stack, environment) = open(&arguments).await?;
    let logs = stack.root().join("logs");
    remove_old(&logs)?;
    let env_file = stack.root().join("env");
    let mut roles = match arguments.servers_only {
        true => Vec::new(),
        false => [Role::Api, Role::Worker]
            .map(|role| Supervised::new(role, &environment))
            .into(),
    };
    let mut followers: Vec<Follower> = roles
        .iter()
        .map(|role| Follower::new(&logs, role.name()))
        .collect();

    let outcome = tokio::select! {
        failed = live(&stack, &environment, &mut roles, &env_file) => failed,
        never = follow::forever(&mut followers) => never,
        () = signals.received() => Ok(()),
    };
    say("stopping; Ctrl-C again kills");
    let stopped = tokio::select! {
        stopped = stop(&stack, roles) => stopped,
        () = signals.received() => bail!("killed instead of stopped"),
    };
    remove_if_there(&env_file)?;
    follow::drain(&mut followers);
    say("stopped");
    outcome.and(stopped)
}

/// Opens the data directory, with all ports checked before anything starts.
async fn open(arguments: &Arguments) -> Result<(Stack, Environment)> {
    let [redis, nats, postgres] = [
        arguments.redis_port,
        arguments.nats_port,
        arguments.postgres_port,
    ];
    let ports = move || {
        Ok(Ports {
            redis: Port::at(redis).require_free("REDIS_PORT")?,
            nats: Port::at(nats).require_free("NATS_PORT")?,
            postgres: Port::at(postgres).require_free("POSTGRES_PORT")?,
        })
    };
    let stack = Stack::open(&arguments.data, ports, Options::default()).await?;
    let mut api = Port::at(arguments.api_port);
    let mut worker_admin = Port::at(arguments.worker_admin_port);
    if !arguments.servers_only {
        api = api.require_free("API_PORT")?;
        worker_admin = worker_admin.require_free("WORKER_ADMIN_PORT")?;
    }
    let environment = stack.environment(api, worker_admin);
    Ok((stack, environment))
}

/// Starts everything, says so, and keeps it alive; returns only with an error.
async fn live(
    stack: &Stack,
    environment: &Environment,
    roles: &mut [Supervised<'_>],
    env_file: &Path,
) -> Result<()> {
    say("starting Redis, NATS and PostgreSQL");
    stack.start().await?;
    write_env(env_file, environment)?;
    tokio::try_join!(
        watch_server(&stack.redis),
        watch_server(&stack.nats),
        watch_server(&stack.postgres),
        live_roles(stack, environment, roles),
    )?;
    Ok(())
}

async fn live_roles(
    stack: &Stack,
    environment: &Environment,
    roles: &mut [Supervised<'_>],
) -> Result<Infallible> {
    let [api, worker] = roles else {
        banner::print(stack, environment, true);
        return pending().await;
    };
    say("running birb-nest setup, then starting api and worker");
    environment.setup().await?;
    tokio::try_join!(api.start(), worker.start())?;
    banner::print(stack, environment, false);
    let (ended, _) = tokio::try_join!(api.watch(), worker.watch())?;
    Ok(ended)
}

/// API and worker first, while the servers still answer them.
async fn stop(stack: &Stack, roles: Vec<Supervised<'_>>) -> Result<()> {
    let mut outcome = Ok(());
    for role in roles {
        outcome = outcome.and(role.stop().await);
    }
    outcome.and(stack.stop().await)
}

fn write_env(path: &Path, environment: &Environment) -> Result<()> {
    let mut text = "# Written by `birb-nest-stack dev`, removed when it stops.\n".to_owned();
    for (name, value) in &environment.vars {
        writeln!(text, "{name}='{value}'")?;
    }
    fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}

fn remove_old(logs: &Path) -> Result<()> {
    match fs::remove_dir_all(logs) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", logs.display()))
        }
        _ => Ok(()),
    }
}

fn remove_if_there(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

/// A line of our own among the logs.
fn say(line: &str) {
    println!("dev    | {line}");
}

/// What asks us to stop.
struct Signals([Signal; 3]);

impl Signals {
    fn listen() -> Result<Self> {
        let on = |kind| signal(kind).context("failed to listen for signals");
        Ok(Self([
            on(SignalKind::interrupt())?,
            on(SignalKind::terminate())?,
            on(SignalKind::hangup())?,
        ]))
    }

    async fn received(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
