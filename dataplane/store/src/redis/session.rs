//! Dialling Redis and making sure that what it holds can be believed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use birb_nest_core::Timestamp;
use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo,
    RedisError, Script, TlsCertificates, aio::MultiplexedConnection, io::tcp::TcpSettings,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::{self, Clock},
    config::RedisConfig,
    metrics::METRICS,
    refusal::{OpenError, chain},
    sabotage::script,
};

/// Everything birb-nest keeps begins with this.
pub(super) const PREFIX: &str = "birb:";
/// Holds the `run_id` of the server that filled the database.
pub(super) const MARKER: &str = "birb:run";

/// Connections to one run of the server, whose database was claimed.
pub(super) struct Session {
    connections: Vec<MultiplexedConnection>,
    next: AtomicUsize,
    claim: Script,
    emptied: Emptied,
    pub closed: CancellationToken,
}

impl Session {
    /// Connects, and claims the database.
    pub async fn open(
        config: &RedisConfig,
        clock: &Clock,
        emptied: &Emptied,
    ) -> Result<Self, OpenError> {
        let server = server_name(config);
        let refused = |error: RedisError| OpenError::refused(&server, chain(&error));
        let client = client(config).map_err(refused)?;
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(Duration::from_secs(2)))
            .set_response_timeout(Some(config.redis_timeout))
            .set_pipeline_buffer_size(1024);
        let mut connections = Vec::with_capacity(usize::from(config.redis_connections));
        for _ in 0..config.redis_connections {
            let connection = client
                .get_multiplexed_async_connection_with_config(&settings)
                .await
                .map_err(|error| OpenError::unreachable(&server, chain(&error)))?;
            connections.push(connection);
        }
        let session = Self {
            connections,
            next: AtomicUsize::new(0),
            claim: Script::new(&script(include_str!("lua/claim.lua"))),
            emptied: emptied.clone(),
            closed: CancellationToken::new(),
        };
        // Each connection is checked: a restart may fall between two of them.
        for connection in &session.connections {
            session.claim(connection.clone(), &server, clock).await?;
        }
        Ok(session)
    }

    /// The connection whose turn it is.
    pub fn connection(&self) -> MultiplexedConnection {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        self.connections[n % self.connections.len()].clone()
    }

    /// Checks again that the server answers and that its database is ours. Run every second, it also keeps the marker
    /// from being evicted and the clock from drifting.
    pub async fn check(&self, config: &RedisConfig, clock: &Clock) -> Result<(), OpenError> {
        self.claim(self.connection(), &server_name(config), clock)
            .await
    }

    async fn claim(
        &self,
        mut connection: MultiplexedConnection,
        server: &str,
        clock: &Clock,
    ) -> Result<(), OpenError> {
        let asked = Instant::now();
        let (done, seconds, micros): (String, i64, i64) = self
            .claim
            .key(MARKER)
            .arg(PREFIX)
            .invoke_async(&mut connection)
            .await
            .map_err(|error| OpenError::unreachable(server, chain(&error)))?;
        match done.as_str() {
            "kept" => {}
            "claimed" => {
                self.emptied.send_modify(|n| *n += 1);
                tracing::info!("claimed the empty database of {server}");
            }
            "flushed" => {
                METRICS.redis_flushed();
                self.emptied.send_modify(|n| *n += 1);
                tracing::warn!(
                    "emptied the database of {server}: it was not filled during this run of the server"
                );
            }
            "old" => {
                return Err(OpenError::refused(
                    server,
                    "it is older than Redis 7, which is needed",
                ));
            }
            "replica" => {
                return Err(OpenError::unreachable(
                    server,
                    "it is a replica; REDIS_HOST must name the primary",
                ));
            }
            _ => {
                return Err(OpenError::refused(
                    server,
                    "the database holds keys of something else; give birb-nest a REDIS_DB of its own",
                ));
            }
        }
        clock.learn(
            clock::Source::Redis,
            Timestamp::from_micros(seconds * 1_000_000 + micros),
            asked,
        );
        Ok(())
    }
}

/// The server as people know it, without credentials.
pub(super) fn server_name(config: &RedisConfig) -> String {
    match &config.redis_url {
        None => format!(
            "Redis at {}:{}/{}",
            config.redis_host, config.redis_port, config.redis_db
        ),
        Some(url) => format!("Redis at {}", url.address()),
    }
}

fn client(config: &RedisConfig) -> Result<Client, RedisError> {
    let info = match &config.redis_url {
        Some(url) => {
            let info = url.expose().into_connection_info()?;
            let is_safe = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
            if config.redis_tls && !is_safe {
                let what = "REDIS_TLS is true, and REDIS_URL does not begin with rediss://";
                return Err(RedisError::from((
                    redis::ErrorKind::InvalidClientConfig,
                    "configuration",
                    what.to_owned(),
                )));
            }
            info
        }
        None => {
            let (host, port) = (config.redis_host.clone(), config.redis_port);
            let address = if config.redis_tls {
                ConnectionAddr::TcpTls {
                    host,
                    port,
                    insecure: false,
                    tls_params: None,
                }
            } else {
                ConnectionAddr::Tcp(host, port)
            };
            let mut login = RedisConnectionInfo::default().set_db(config.redis_db);
            if let Some(password) = &config.redis_password {
                login = login.set_password(password.expose());
            }
            address.into_connection_info()?.set_redis_settings(login)
        }
    };
    let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
    let Some(path) = &config.redis_ca_file else {
        return Client::open(info);
    };
    let authority = std::fs::read(path).map_err(|error| {
        let what = format!("REDIS_CA_FILE {} cannot be read: {error}", path.display());
        RedisError::from((redis::ErrorKind::InvalidClientConfig, "configuration", what))
    })?;
    let certificates = TlsCertificates {
        client_tls: None,
        root_cert: Some(authority),
    };
    Client::build_with_tls(info, certificates)
}

/// Counts how often this process found or made the database empty.
pub(super) type Emptied = Arc<watch::Sender<u64>>;

/// A session shared by those who use it.
pub(super) type Shared = Option<Arc<Session>>;
