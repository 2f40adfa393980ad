//! Settings of the API. Each field's comment is its manual.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use birb_nest_store::{
    config::{bytes, duration},
    jetstream::record,
};
use clap::Args;

/// The API process.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "API")]
pub struct ApiConfig {
    /// Address to listen on.
    #[arg(long, default_value = "0.0.0.0")]
    pub api_host: IpAddr,
    /// Port to listen on.
    #[arg(long, default_value_t = 8080)]
    pub api_port: u16,
    /// Another port that serves only /livez, /readyz and /metrics, so that the first can be exposed alone. Both serve
    /// them.
    #[arg(long)]
    pub api_admin_port: Option<u16>,
    /// File with the keys of clients, one per line: `ROLE NAME KEY`, with the role `read`, `write` or `admin`. Changes are taken
    /// over while the process runs. Without it everybody may do everything.
    #[arg(long)]
    pub api_keys_file: Option<PathBuf>,
    /// Requests under /v1 that one client may make within `API_RATE_LIMIT_DURATION`; 0 for no limit. A client is a key, or
    /// without one an address.
    #[arg(long, default_value_t = 0)]
    pub api_rate_limit_requests: u32,
    /// See `API_RATE_LIMIT_REQUESTS`. What was used up comes back evenly over this time.
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub api_rate_limit_duration: Duration,
    /// Origins whose pages may use the API from a browser, separated by commas, like `https://app.example.com`; `*` for all.
    /// Without it none may.
    #[arg(long, value_delimiter = ',', value_parser = origin)]
    pub api_cors_origins: Vec<String>,
    /// PEM files with the certificate chain and the key with which the API serves HTTPS in place of HTTP; both or none.
    /// Changes are taken over while the process runs. The admin port stays HTTP.
    #[arg(long, requires = "api_tls_key_file")]
    pub api_tls_cert_file: Option<PathBuf>,
    /// See `API_TLS_CERT_FILE`.
    #[arg(long, requires = "api_tls_cert_file")]
    pub api_tls_key_file: Option<PathBuf>,
    /// Largest value of one entry. NATS's `max_payload` must be at least this and 64 KiB more.
    #[arg(long, default_value = "1MiB", value_parser = bytes)]
    pub api_max_value_bytes: usize,
    /// Most keys or entries of one batch request.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub api_max_batch: u32,
    /// Largest body of a batch request, and largest answer to a batch read; what does not fit that is an error in it.
    #[arg(long, default_value = "8MiB", value_parser = bytes)]
    pub api_max_batch_bytes: usize,
    /// Most bytes that the bodies of all requests under way may take together, and as many again for answers of more than
    /// 64 KiB to reads; what is beyond is refused with 503 at once. One body of the largest size always fits.
    #[arg(long, default_value = "256MiB", value_parser = bytes)]
    pub api_max_bodies_bytes: usize,
    /// Longest time to live a client may ask for; longer ones are refused. Without it: 100 years.
    #[arg(long, value_parser = duration)]
    pub api_max_ttl: Option<Duration>,
    /// Requests under /v1 that are worked on at once; more are refused with 503 at once.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub api_max_concurrency: u32,
    /// Connections that may be open at once; more are closed as they come. The admin port has room of its own.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub api_max_connections: u32,
    /// How long a client may take nothing of an answer that it was sent; then its connection is closed.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub api_answer_timeout: Duration,
    /// How long a client may take to send the first request's head on a connection.
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub api_header_timeout: Duration,
    /// How long an idle connection is kept for another request, and that request's head may take.
    #[arg(long, default_value = "75s", value_parser = duration)]
    pub api_keepalive_timeout: Duration,
    /// How long a client may take to send a request's body.
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub api_body_timeout: Duration,
    /// How long a request may take in all, its body included.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub api_request_timeout: Duration,
    /// How long a write with `Birb-Durability: database` waits for PostgreSQL before it is answered with 202; at most half
    /// of `API_REQUEST_TIMEOUT`.
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub api_durability_timeout: Duration,
    /// How long requests are still taken after SIGTERM, while /readyz says 503 already: what a load balancer needs to
    /// notice. Zero (`0s`) where something else waits for that.
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    pub api_shutdown_delay: Duration,
    /// How long requests under way may go on after that before their connections are closed.
    #[arg(long, default_value = "20s", value_parser = duration)]
    pub api_shutdown_timeout: Duration,
}

/// `*`, or what browsers send as `Origin`.
fn origin(text: &str) -> Result<String, String> {
    let authority = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    if text == "*" || authority.is_some_and(|rest| !rest.is_empty() && !rest.contains(['/', '*'])) {
        return Ok(text.to_owned());
    }
    Err("`*` or an origin like `https://app.example.com` is expected".to_owned())
}

/// Largest metadata of one entry, in bytes of its JSON.
pub const MAX_METADATA_BYTES: usize = 4096;

/// The time to live nobody may exceed: 100 years of 365 days.
pub const LONGEST_TTL: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

impl ApiConfig {
    /// The largest message that a write can become: what NATS's `max_payload` must allow.
    #[must_use]
    pub const fn largest_message(&self) -> usize {
        const ROOM: usize = 64 << 10;
        const { assert!(record::OVERHEAD + MAX_METADATA_BYTES < ROOM) };
        self.api_max_value_bytes.saturating_add(ROOM)
    }

    /// How long a write may wait for PostgreSQL. Should the request end first, its outcome would seem unknown.
    #[must_use]
    pub fn durability_timeout(&self) -> Duration {
        self.api_durability_timeout
            .min(self.api_request_timeout / 2)
    }

    /// The longest time to live a client may ask for.
    #[must_use]
    pub fn longest_ttl(&self) -> Duration {
        self.api_max_ttl
            .map_or(LONGEST_TTL, |ttl| ttl.min(LONGEST_TTL))
    }
}
