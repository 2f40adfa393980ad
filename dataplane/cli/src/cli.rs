//! The command line: one subcommand per role, each with the settings of the servers it talks to.

use birb_nest_api::ApiConfig;
use birb_nest_core::ShardCount;
use birb_nest_store::{LogConfig, PostgresConfig, RedisConfig};
use birb_nest_worker::WorkerConfig;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// A persistent cache: JetStream is the log, Redis and PostgreSQL are projections of it.
///
/// Every flag is also an environment variable: `--postgres-host` is `POSTGRES_HOST`. A flag wins over its variable.
/// Passwords and addresses with passwords are also read from the file that `<VARIABLE>_FILE` names.
#[derive(Debug, Parser)]
#[command(name = "birb-nest", version)]
pub struct Cli {
    #[command(subcommand)]
    pub role: Role,
}

/// What this process does.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// Serve the REST API.
    Api(ApiRole),
    /// Store what is written to the log in PostgreSQL.
    Worker(WorkerRole),
    /// Prepare PostgreSQL, NATS and Redis; idempotent, and safe when several run at once.
    Setup(SetupRole),
    /// Print docs/CONFIGURATION.md.
    #[command(hide = true)]
    DocsConfig,
}

#[derive(Debug, Args)]
pub struct ApiRole {
    #[command(flatten)]
    pub config: ApiConfig,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub log: LogOutput,
}

#[derive(Debug, Args)]
pub struct WorkerRole {
    #[command(flatten)]
    pub config: WorkerConfig,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub log: LogOutput,
}

#[derive(Debug, Args)]
pub struct SetupRole {
    /// Give the nest that is there another number of shards, 1 to 64, instead: writes are refused until workers have stored
    /// what is in the log. Run again, it goes on where it ended; the present number gives up what is not decided yet.
    #[arg(long, value_name = "SHARDS")]
    pub reshard: Option<ShardCount>,
    #[command(flatten)]
    pub servers: Servers,
    #[command(flatten)]
    pub log: LogOutput,
}

/// The three servers.
#[derive(Debug, Args)]
pub struct Servers {
    #[command(flatten)]
    pub postgres: PostgresConfig,
    #[command(flatten)]
    pub redis: RedisConfig,
    #[command(flatten)]
    pub log: LogConfig,
}

/// What this process says on its standard error.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogOutput {
    /// Least important lines to show: error, warn, info, debug or trace; or filters per module as of the `tracing`
    /// crate, like `info,birb_nest_store=debug`.
    #[arg(long, default_value = "info", value_parser = filter)]
    pub log_level: String,
    /// Lines for people, or one JSON object per line.
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Role {
    pub fn log(&self) -> &LogOutput {
        match self {
            Self::Api(role) => &role.log,
            Self::Worker(role) => &role.log,
            Self::Setup(role) => &role.log,
            Self::DocsConfig => unreachable!("it logs nothing"),
        }
    }
}

fn filter(text: &str) -> Result<String, String> {
    // To the filter's own parser a word without `=` is a module: `loud` would silence everything.
    let is_level = |word: &str| word.parse::<tracing::level_filters::LevelFilter>().is_ok();
    let plain = |directive: &str| directive.contains(['=', '[']) || is_level(directive);
    if text.split(',').map(str::trim).all(plain)
        && tracing_subscriber::EnvFilter::try_new(text).is_ok()
    {
        return Ok(text.to_owned());
    }
    Err("a level (error, warn, info, debug, trace) or filters like `info,birb_nest_store=debug` are expected".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
