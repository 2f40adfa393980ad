//! Reads how far the workers are behind. Only a consumer's leader answers, so nothing that is read is stale.

use std::{
    collections::{HashMap, HashSet},
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{
    Client, ConnectErrorKind, ConnectOptions, ServerAddr,
    connection::State,
    jetstream::{self, ErrorCode, response::Response},
    rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, pem::PemObject},
    },
};
use futures::future::join_all;
use serde::Deserialize;
use serde_json::json;
use tokio::sync::OnceCell;

use super::rate::Reading;
use crate::{
    metrics::METRICS,
    render::{CONSUMER, LogAccess},
};

/// Longest time in which all of a log's consumers must have answered, a new connection included.
const DEADLINE: Duration = Duration::from_secs(5);
/// Longest time that a connection may take.
const DIAL_LIMIT: Duration = Duration::from_secs(2);

/// Why the lag is not known. It does not change while its cause stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// Address, credentials or authority are none.
    Unusable(&'static str),
    /// No server takes a connection.
    Unreachable,
    /// It does not let us in.
    Refused,
    /// It does not answer, or has no `JetStream`.
    Silent,
    /// A stream of the log is not there.
    NoStream(String),
    /// A stream has no consumer: no worker has owned its shard yet.
    NoConsumer(String),
    /// Another refusal, with the server's number for it.
    Odd(u64),
}

impl Trouble {
    /// For the metric: a closed set.
    fn label(&self) -> &'static str {
        match self {
            Self::Unusable(_) => "unusable",
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::Silent => "silent",
            Self::NoStream(_) => "no_stream",
            Self::NoConsumer(_) => "no_consumer",
            Self::Odd(_) => "odd",
        }
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable(what) => write!(formatter, "the NATS {what} cannot be used"),
            Self::Unreachable => write!(formatter, "NATS cannot be reached from the operator"),
            Self::Refused => write!(formatter, "NATS refuses the credentials"),
            Self::Silent => write!(formatter, "JetStream does not answer"),
            Self::NoStream(stream) => write!(formatter, "stream {stream} is not there"),
            Self::NoConsumer(stream) => write!(
                formatter,
                "stream {stream} has no consumer {CONSUMER}; the worker that takes the shard makes it"
            ),
            Self::Odd(code) => write!(formatter, "JetStream refuses with error {code}"),
        }
    }
}

/// Connections that nests share: one per address and credentials.
#[derive(Default)]
pub struct Pool(Mutex<HashMap<String, Arc<OnceCell<Client>>>>);

impl Pool {
    /// Closes the connections that no nest uses any more.
    pub fn keep(&self, keys: &HashSet<String>) {
        self.lock().retain(|key, _| keys.contains(key));
    }

    /// The place of a connection, empty if it is to be made.
    fn place(&self, key: &str) -> Arc<OnceCell<Client>> {
        let mut places = self.lock();
        let is_lost = |place: &Arc<OnceCell<Client>>| {
            let client = place.get();
            client.is_some_and(|client| client.connection_state() != State::Connected)
        };
        if places.get(key).is_some_and(is_lost) {
            places.remove(key);
        }
        places.entry(key.to_owned()).or_default().clone()
    }

    fn remove(&self, key: &str, place: &Arc<OnceCell<Client>>) {
        let mut places = self.lock();
        if places
            .get(key)
            .is_some_and(|other| Arc::ptr_eq(other, place))
        {
            places.remove(key);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<OnceCell<Client>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks the consumers of all shards.
///
/// # Errors
/// One of them is not known; then nothing is.
pub async fn read(pool: &Pool, key: &str, access: &LogAccess) -> Result<Reading, Trouble> {
    let place = pool.place(key);
    let asked = async {
        let client = place.get_or_try_init(|| dial(access)).await?;
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(DEADLINE);
        let shards = (0..access.shards).map(|shard| ask(&jetstream, access.stream(shard)));
        // Of several troubles the first shard's is told, whichever came first: who reads it sees no change.
        let answers = join_all(shards).await.into_iter();
        answers.collect::<Result<Vec<Consumer>, Trouble>>()
    };
    let answer = tokio::time::timeout(DEADLINE, asked)
        .await
        .unwrap_or(Err(Trouble::Silent));
    METRICS.nats_asked(answer.as_ref().map_or_else(Trouble::label, |_| "ok"));
    if answer == Err(Trouble::Silent) {
        pool.remove(key, &place);
    }
    let consumers = answer?;
    Ok(Reading {
        backlog: consumers
            .iter()
            .map(|consumer| consumer.num_pending + consumer.num_ack_pending)
            .sum(),
        stored: consumers
            .iter()
            .map(|consumer| consumer.ack_floor.consumer_seq)
            .collect(),
    })
}

/// What a consumer's leader says of it.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Consumer {
    num_pending: u64,
    num_ack_pending: u64,
    ack_floor: AckFloor,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct AckFloor {
    consumer_seq: u64,
}

async fn ask(jetstream: &jetstream::Context, stream: String) -> Result<Consumer, Trouble> {
    let subject = format!("CONSUMER.INFO.{stream}.{CONSUMER}");
    // The server takes an empty object for an empty request, and refuses `null`.
    match jetstream.request(subject, &json!({})).await {
        Ok(Response::Ok(consumer)) => Ok(consumer),
        Ok(Response::Err { error }) => Err(match error.error_code() {
            ErrorCode::STREAM_NOT_FOUND => Trouble::NoStream(stream),
            ErrorCode::CONSUMER_NOT_FOUND => Trouble::NoConsumer(stream),
            ErrorCode(code) => Trouble::Odd(code),
        }),
        Err(error) => {
            tracing::debug!(
                error = &error as &dyn std::error::Error,
                "no answer about {stream}"
            );
            Err(Trouble::Silent)
        }
    }
}

async fn dial(access: &LogAccess) -> Result<Client, Trouble> {
    let addresses = access.url.split(',').map(str::parse::<ServerAddr>);
    let addresses: Vec<ServerAddr> = addresses
        .collect::<Result<_, _>>()
        .map_err(|_| Trouble::Unusable("address"))?;
    let mut options = ConnectOptions::new()
        .name("birb-nest-operator")
        .connection_timeout(DIAL_LIMIT)
        .require_tls(access.tls)
        .ignore_discovered_servers()
        // One that is lost is not mended: the next reading dials anew, with the credentials of then.
        .max_reconnects(1);
    if let (Some(user), Some(password)) = (&access.user, &access.password) {
        options = options.user_and_password(user.clone(), password.clone());
    }
    if let Some(credentials) = &access.credentials {
        options = options
            .credentials(credentials)
            .map_err(|_| Trouble::Unusable("credentials file"))?;
    }
    if let Some(authority) = &access.authority {
        let config = trusting(authority).map_err(|_| Trouble::Unusable("authority"))?;
        options = options.tls_client_config(config);
    }
    options.connect(addresses).await.map_err(|error| {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "no connection to {}",
            access.url
        );
        match error.kind() {
            ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                Trouble::Refused
            }
            _ => Trouble::Unreachable,
        }
    })
}

/// TLS that trusts this authority alone, as the data plane does.
fn trusting(authority: &[u8]) -> io::Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority) {
        let certificate = certificate.map_err(io::Error::other)?;
        roots.add(certificate).map_err(io::Error::other)?;
    }
    if roots.is_empty() {
        return Err(io::Error::other("it holds no certificate"));
    }
    Ok(ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth())
}
