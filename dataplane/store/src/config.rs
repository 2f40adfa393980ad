//! How to reach the three servers. Each field's comment is its manual: it becomes `--help` and docs/CONFIGURATION.md.
//!
//! The variable of a flag is its name in capitals: `--postgres-host` is `POSTGRES_HOST`. Secrets are also read from
//! the file that `<VARIABLE>_FILE` names.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use birb_nest_core::ShardCount;
use clap::Args;
use secrecy::{ExposeSecret, SecretString};

/// A text that is never printed.
#[derive(Clone)]
pub struct Secret(SecretString);

impl Secret {
    /// The text itself, for the one place that sends it to its server.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl Secret {
    /// What may be shown of a URL: host, port and path, without credentials and parameters.
    #[must_use]
    pub fn address(&self) -> &str {
        let url = self.expose();
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        let address = rest.rsplit_once('@').map_or(rest, |(_, address)| address);
        address.split('?').next().unwrap_or(address)
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.into()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Parses `250ms`, `10s`, `5m`, `1h`; zero is refused.
///
/// # Errors
/// A sentence that shows the form.
pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("must be longer than 0".to_owned()),
        Err(_) => Err("a duration like `250ms`, `10s`, `5m` or `1h` is expected".to_owned()),
    }
}

/// Parses a number of bytes, plain or with a binary unit: `1048576`, `64KiB`, `8MiB`, `1GiB`; zero is refused.
///
/// # Errors
/// A sentence that shows the form.
pub fn bytes(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let factor: usize = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => {
            return Err("bytes are expected, like `1048576`, `64KiB`, `8MiB` or `1GiB`".to_owned());
        }
    };
    digits
        .parse::<usize>()
        .ok()
        .and_then(|n| n.checked_mul(factor))
        .filter(|&n| n > 0 && i64::try_from(n).is_ok())
        .ok_or_else(|| "bytes are expected, like `1048576`, `64KiB`, `8MiB` or `1GiB`".to_owned())
}

/// How far TLS to PostgreSQL goes, as libpq names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SslMode {
    /// Plain text.
    Disable,
    /// TLS when the server offers it; an attacker can talk it out of it.
    Prefer,
    /// TLS, whoever the server is.
    Require,
    /// TLS, with a certificate of a known authority.
    VerifyCa,
    /// TLS, with a certificate of a known authority for this very host.
    VerifyFull,
}

/// PostgreSQL: where rows live.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "PostgreSQL")]
pub struct PostgresConfig {
    /// The whole address, `postgres://user:password@host:port/database`; wins over host, port, user, password and db.
    #[arg(long)]
    pub postgres_url: Option<Secret>,
    /// Host name or address. Workers need a direct connection or a session-pooling proxy: they hold advisory locks.
    #[arg(long, default_value = "localhost")]
    pub postgres_host: String,
    /// Port.
    #[arg(long, default_value_t = 5432)]
    pub postgres_port: u16,
    /// Role to log in as. `setup` needs CREATE on the database, the others only read and write the tables.
    #[arg(long, default_value = "birb")]
    pub postgres_user: String,
    /// Password of that role.
    #[arg(long)]
    pub postgres_password: Option<Secret>,
    /// Database name.
    #[arg(long, default_value = "birb_nest")]
    pub postgres_db: String,
    /// TLS: `verify-full` is the one to use where a network is crossed.
    #[arg(long, value_enum, default_value = "prefer")]
    pub postgres_sslmode: SslMode,
    /// PEM file with the authority that signed the server's certificate; public authorities are known.
    #[arg(long)]
    pub postgres_ca_file: Option<PathBuf>,
    /// Most connections an API process opens for lookups. Each costs the server some 10 MB; too few make misses queue.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub postgres_max_connections: u32,
    /// How long a lookup may take, waiting for a connection included, before it counts as PostgreSQL being down.
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub postgres_timeout: Duration,
}

/// Redis: what makes reads fast, and may vanish.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Redis")]
pub struct RedisConfig {
    /// The whole address, `redis://user:password@host:port/db` or `rediss://` for TLS; wins over the parts below.
    #[arg(long)]
    pub redis_url: Option<Secret>,
    /// Host name or address of the primary.
    #[arg(long, default_value = "localhost")]
    pub redis_host: String,
    /// Port.
    #[arg(long, default_value_t = 6379)]
    pub redis_port: u16,
    /// Password, if the server wants one.
    #[arg(long)]
    pub redis_password: Option<Secret>,
    /// Database number. birb-nest owns the whole database and empties it when it cannot trust it; a database that
    /// holds somebody else's keys is refused.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(i64).range(0..=1_000_000))]
    pub redis_db: i64,
    /// Use TLS with the host, port and password above. With an address, insist that it begins with `rediss://`.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub redis_tls: bool,
    /// PEM file with the authority that signed the server's certificate, for TLS; without it public authorities.
    #[arg(long)]
    pub redis_ca_file: Option<PathBuf>,
    /// Connections a process opens; commands of all requests share them. One carries some 100,000 commands/s.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub redis_connections: u16,
    /// How long a request waits for Redis in all before it goes on without it.
    #[arg(long, default_value = "250ms", value_parser = duration)]
    pub redis_timeout: Duration,
    /// How long Redis keeps an entry after it was last written or filled. Bounds memory, not the entry's life.
    #[arg(long, default_value = "24h", value_parser = duration)]
    pub redis_default_ttl: Duration,
}

/// NATS JetStream: the log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "NATS JetStream")]
pub struct LogConfig {
    /// Server address, `nats://host:port`, without credentials; several are separated by commas.
    #[arg(long, default_value = "nats://localhost:4222")]
    pub nats_url: String,
    /// User name, if the server wants one.
    #[arg(long)]
    pub nats_user: Option<String>,
    /// Password of that user.
    #[arg(long)]
    pub nats_password: Option<Secret>,
    /// Credentials file (JWT and seed), in place of user and password.
    #[arg(long)]
    pub nats_creds_file: Option<PathBuf>,
    /// Require TLS.
    #[arg(long, default_value_t = false, action = clap::ArgAction::Set)]
    pub nats_tls: bool,
    /// PEM file with the authority that signed the server's certificate, in place of those that the system knows.
    #[arg(long)]
    pub nats_ca_file: Option<PathBuf>,
    /// Streams are called `<NAME>_0`, `<NAME>_1` and so on.
    #[arg(long, default_value = "BIRB_CACHE", value_parser = stream_name)]
    pub nats_stream_name: String,
    /// First token of every subject; nests that share an account need different ones.
    #[arg(long, default_value = "birb", value_parser = stream_name)]
    pub nats_subject_prefix: String,
    /// Name of the durable consumer on each stream; its `num_pending` + `num_ack_pending` is the lag.
    #[arg(long, default_value = "birb-worker", value_parser = stream_name)]
    pub nats_consumer_name: String,
    /// Name of the stream that keeps writes which PostgreSQL refused for good.
    #[arg(long, default_value = "BIRB_CACHE_DLQ", value_parser = stream_name)]
    pub nats_dlq_stream_name: String,
    /// Most bytes that stream may hold; reserved. While it is full, a shard with another such write waits.
    #[arg(long, default_value = "64MiB", value_parser = bytes)]
    pub nats_dlq_max_bytes: usize,
    /// How often storing such a write is tried again before it is parked until somebody replays it.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub nats_dlq_max_retries: u32,
    /// Name of the queue of keys that workers put into Redis.
    #[arg(long, default_value = "BIRB_REHYDRATE", value_parser = stream_name)]
    pub nats_rehydrate_stream_name: String,
    /// Shards of the log, 1 to 64, as the nest was set up; `birb-nest setup --reshard` changes it. Each is one stream that syncs one message after the
    /// other; docs/adr/0003-shards.md has measurements. More than 16 gain nothing on one disk.
    #[arg(long, default_value = "8")]
    pub nats_shards: ShardCount,
    /// Replicas of each stream, 1, 3 or 5; takes as many JetStream servers.
    #[arg(long, default_value_t = 1, value_parser = replicas)]
    pub nats_replicas: usize,
    /// Most bytes a shard's stream may hold. Reserved: shards times this must fit the server's file store. A full log
    /// refuses writes with 503 and loses none.
    #[arg(long, default_value = "512MiB", value_parser = bytes)]
    pub nats_stream_max_bytes: usize,
    /// How long a write waits for its acknowledgement before its outcome is reported as unknown; also the limit of
    /// every other request to NATS.
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub nats_publish_timeout: Duration,
    /// Most writes of a process that may await their acknowledgement at once; others queue.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub nats_max_inflight: u32,
}

fn stream_name(text: &str) -> Result<String, String> {
    let fits = (1..=64).contains(&text.len())
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    fits.then(|| text.to_owned())
        .ok_or_else(|| "1 to 64 letters, digits, `-` and `_` are expected".to_owned())
}

fn replicas(text: &str) -> Result<usize, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        "5" => Ok(5),
        _ => Err("1, 3 or 5 is expected".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations() {
        assert_eq!(bytes("64KiB"), Ok(65536));
        assert_eq!(bytes("17"), Ok(17));
        assert_eq!(bytes("1 GiB"), Ok(1 << 30));
        for text in [
            "",
            "0",
            "-1",
            "1MB",
            "MiB",
            "1.5MiB",
            "99999999999999999999",
            "9999999999GiB",
        ] {
            assert!(bytes(text).is_err(), "{text:?}");
        }
        assert_eq!(duration("250ms"), Ok(Duration::from_millis(250)));
        for text in ["", "0s", "10", "-1s", "ten"] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_secret_is_never_shown() {
        let secret: Secret = "hunter2".parse().expect("infallible");
        assert_eq!(format!("{secret:?}"), "***");
        assert_eq!(secret.expose(), "hunter2");
    }

    #[test]
    fn an_address_has_no_credentials() {
        for (url, address) in [
            (
                "postgres://birb:s@cret@db.example:5432/nest?sslmode=require",
                "db.example:5432/nest",
            ),
            ("redis://:secret@cache:6379/3", "cache:6379/3"),
            ("rediss://cache/0", "cache/0"),
        ] {
            assert_eq!(
                url.parse::<Secret>().expect("infallible").address(),
                address
            );
        }
    }

    #[test]
    fn names_that_would_break_a_subject_are_refused() {
        for text in ["a.b", "a b", "", "*", ">", "é"] {
            assert!(stream_name(text).is_err(), "{text:?}");
        }
        assert!(stream_name("BIRB_CACHE-2").is_ok());
    }
}
