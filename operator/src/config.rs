//! Flags and environment of the operator.

use std::{net::IpAddr, time::Duration};

use clap::{Args, Parser, ValueEnum};

/// Reconciles `BirbNest` resources into running nests.
///
/// Every flag is also an environment variable: `--admin-port` is `ADMIN_PORT`. A flag wins over its variable.
#[derive(Clone, Debug, Parser)]
#[command(name = "birb-nest-operator", version)]
pub struct Config {
    /// Where images come from.
    #[command(flatten)]
    pub images: Images,
    /// Which of several operators acts.
    #[command(flatten)]
    pub election: Election,
    /// Address of the port for probes and metrics.
    #[arg(long, env, default_value = "0.0.0.0")]
    pub admin_host: IpAddr,
    /// Port for /livez, /readyz and /metrics.
    #[arg(long, env, default_value_t = 8080)]
    pub admin_port: u16,
    /// Namespaces whose nests are looked after, separated by commas. Default: all.
    #[arg(long, env, value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// How often a nest is looked at though nothing happened.
    #[arg(long, env, default_value = "10m", value_parser = humantime::parse_duration)]
    pub resync: Duration,
    /// How soon a nest is looked at again that has something in its way which a person may mend without a change of the nest or
    /// of its Secrets.
    #[arg(long, env, default_value = "30s", value_parser = humantime::parse_duration)]
    pub retry: Duration,
    /// How long a setup Job that cannot reach its servers is left to Kubernetes' own growing pauses before it is begun anew.
    #[arg(long, env, default_value = "60s", value_parser = humantime::parse_duration)]
    pub setup_retry: Duration,
    /// How long a nest must have been ready in another release before the next one moves there.
    #[arg(long, env, default_value = "60s", value_parser = humantime::parse_duration)]
    pub upgrade_pause: Duration,
    /// Longest pass over a nest: one that takes longer waits for an API server that hangs. For tests.
    #[arg(long, env, hide = true, default_value = "60s", value_parser = humantime::parse_duration)]
    pub pass_limit: Duration,
    /// Longest silence of the API server. Passes and the election have shorter limits of their own; this one ends the listing with
    /// which a watch begins. It is longer than a watch, of which the API server ends each after 290 s. For tests.
    #[arg(long, env, hide = true, default_value = "295s", value_parser = humantime::parse_duration)]
    pub silence_limit: Duration,
    /// Logs.
    #[command(flatten)]
    pub log: LogOutput,
}

/// Default images of what a nest consists of; a nest may name others.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Images")]
pub struct Images {
    /// Repository of the data plane; its tag is the release.
    #[arg(
        long = "data-plane-image",
        env = "DATA_PLANE_IMAGE",
        default_value = "ghcr.io/birbparty/birb-nest"
    )]
    pub data_plane: String,
    /// Release of nests that name none: the tag of the image.
    #[arg(
        long = "data-plane-release",
        env = "DATA_PLANE_RELEASE",
        default_value = env!("CARGO_PKG_VERSION")
    )]
    pub release: String,
    /// Managed Redis.
    #[arg(
        long = "redis-image",
        env = "REDIS_IMAGE",
        default_value = "docker.io/library/redis:7-bookworm"
    )]
    pub redis: String,
    /// Managed NATS.
    #[arg(
        long = "nats-image",
        env = "NATS_IMAGE",
        default_value = "docker.io/library/nats:2.15.2"
    )]
    pub nats: String,
    /// Managed PostgreSQL.
    #[arg(
        long = "postgres-image",
        env = "POSTGRES_IMAGE",
        default_value = "docker.io/library/postgres:15-bookworm"
    )]
    pub postgres: String,
}

/// Leader election by a Lease.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Leader election")]
pub struct Election {
    /// Namespace of the Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub lease_namespace: String,
    /// Name of the Lease.
    #[arg(long, env, default_value = "birb-nest-operator")]
    pub lease_name: String,
    /// Who this process is in the Lease; unique among operators. Default: the host name with a random part.
    #[arg(long, env = "POD_NAME")]
    pub lease_holder: Option<String>,
    /// How long the Lease holds without being renewed: how long nobody acts after a leader died.
    #[arg(long, env, default_value = "15s", value_parser = humantime::parse_duration)]
    pub lease_duration: Duration,
}

/// What the process says on its standard error.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogOutput {
    /// Least important lines to show: error, warn, info, debug or trace; or filters per module.
    #[arg(long, env, default_value = "info")]
    pub log_level: String,
    /// Lines for people, or one JSON object per line.
    #[arg(long, env, value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Config {
    /// Checks what single values cannot.
    ///
    /// # Errors
    /// A sentence for the person who set it.
    pub fn validate(&self) -> Result<(), String> {
        let lease = self.election.lease_duration;
        if lease < Duration::from_secs(3) {
            return Err(format!(
                "LEASE_DURATION is {lease:?}; below 3s it would be lost to a short stall of the API server"
            ));
        }
        if let Some(name) = self.namespaces.iter().find(|name| !is_namespace(name)) {
            return Err(format!(
                "NAMESPACES names `{name}`, which is no name of a namespace"
            ));
        }
        if lease.subsec_nanos() != 0 {
            return Err(format!(
                "LEASE_DURATION is {lease:?}; a Lease holds for whole seconds"
            ));
        }
        Ok(())
    }
}

fn is_namespace(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Config::command().debug_assert();
    }

    #[test]
    fn namespaces_are_separated_by_commas_and_have_names() {
        let config = Config::parse_from(["operator", "--namespaces", "shop,mall-2"]);
        assert_eq!(config.namespaces, ["shop", "mall-2"]);
        assert_eq!(config.validate(), Ok(()));
        for odd in ["shop,,mall", "shop, mall", "Shop", "-", "sh.op"] {
            let config = Config::parse_from(["operator", &format!("--namespaces={odd}")]);
            assert!(
                config.validate().unwrap_err().contains("NAMESPACES"),
                "{odd}"
            );
        }
    }

    #[test]
    fn a_lease_too_short_is_refused() {
        let config = Config::parse_from(["operator", "--lease-duration", "2s"]);
        assert!(config.validate().unwrap_err().contains("LEASE_DURATION"));
        let config = Config::parse_from(["operator", "--lease-duration", "3500ms"]);
        assert!(config.validate().unwrap_err().contains("whole seconds"));
    }
}
