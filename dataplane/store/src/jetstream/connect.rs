//! Dialling NATS: one client per session, which never reconnects.
//!
//! async-nats keeps what is queued while a connection is down and sends it once it is up again, before anybody could
//! check whether the log is still the same one. So a client is *sealed* once it is connected: should it try to connect
//! again, its own authentication callback refuses, the client ends, and its queue is never sent.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{Auth, AuthError, Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use tokio_util::sync::CancellationToken;

use crate::{
    config::LogConfig,
    refusal::{OpenError, chain},
};

/// How often a server is asked whether it is there: one that hangs costs each write its whole time until it is given up, after
/// the third question that got no answer.
const PING_EVERY: Duration = Duration::from_secs(1);

/// Older servers lose or mis-order messages in ways that break the promises (docs/adr/0005-nats-version.md).
const OLDEST_SERVER: semver::Version = semver::Version::new(2, 12, 5);

/// A connected client that will not reconnect.
#[derive(Clone)]
pub(super) struct Dialed {
    pub client: Client,
    /// Cancelled as soon as the connection is lost.
    pub closed: CancellationToken,
}

/// Connects once to the first of the servers that answers, and checks its version.
pub(super) async fn dial(config: &LogConfig) -> Result<Dialed, OpenError> {
    let server = server_name(config);
    let addresses: Vec<ServerAddr> = config
        .nats_url
        .split(',')
        .map(|url| url.trim().parse::<ServerAddr>())
        .collect::<Result<_, _>>()
        .map_err(|error| OpenError::refused(&server, format!("NATS_URL: {error}")))?;
    if config.nats_url.contains('@') {
        return Err(OpenError::refused(
            &server,
            "NATS_URL holds credentials; give them as NATS_USER and NATS_PASSWORD or NATS_CREDS_FILE",
        ));
    }
    let login = Login::read(config).map_err(|why| OpenError::refused(&server, why))?;

    let sealed = Arc::new(AtomicBool::new(false));
    let closed = CancellationToken::new();
    let mut options = ConnectOptions::with_auth_callback({
        let sealed = sealed.clone();
        let login = Arc::new(login);
        move |nonce| {
            let answer = if sealed.load(Ordering::Acquire) {
                Err(AuthError::new("a lost session is not resumed"))
            } else {
                login.answer(&nonce).map_err(AuthError::new)
            };
            async move { answer }
        }
    })
    .event_callback({
        let closed = closed.clone();
        move |event| {
            match event {
                Event::Disconnected | Event::Closed => closed.cancel(),
                Event::SlowConsumer(_) => {
                    tracing::warn!("NATS client dropped messages: a subscriber was too slow");
                }
                Event::ServerError(error) => {
                    tracing::warn!(%error, "NATS server reported an error")
                }
                other => tracing::debug!(event = %other, "NATS client event"),
            }
            async {}
        }
    })
    // A sealed client gives up after as many refused attempts as there are addresses.
    .max_reconnects(addresses.len())
    .ignore_discovered_servers()
    .name("birb-nest")
    .connection_timeout(Duration::from_secs(2))
    .request_timeout(Some(config.nats_publish_timeout))
    .ping_interval(PING_EVERY)
    .require_tls(config.nats_tls);
    if let Some(file) = &config.nats_ca_file {
        options = options.add_root_certificates(file.clone());
    }

    let client = options.connect(addresses).await.map_err(|error| {
        let why = chain(&error);
        match error.kind() {
            ConnectErrorKind::ServerParse => OpenError::refused(&server, why),
            _ => OpenError::unreachable(&server, why),
        }
    })?;
    sealed.store(true, Ordering::Release);

    let version = client.server_info().version;
    match semver::Version::parse(&version) {
        Ok(found) if found >= OLDEST_SERVER => {}
        _ => {
            return Err(OpenError::refused(
                &server,
                format!("it runs nats-server {version}; {OLDEST_SERVER} or newer is needed"),
            ));
        }
    }
    Ok(Dialed { client, closed })
}

/// The server as people know it, without credentials.
pub(super) fn server_name(config: &LogConfig) -> String {
    let addresses: Vec<_> = config
        .nats_url
        .split(',')
        .map(|url| match url.rsplit_once('@') {
            Some((_, address)) => address.trim(),
            None => url.trim(),
        })
        .collect();
    format!("NATS at {}", addresses.join(", "))
}

enum Login {
    None,
    User(String, String),
    Credentials {
        jwt: String,
        key: Box<nkeys::KeyPair>,
    },
}

impl Login {
    /// What the configuration says, file contents included.
    fn read(config: &LogConfig) -> Result<Self, String> {
        if let Some(file) = &config.nats_creds_file {
            let text = std::fs::read_to_string(file)
                .map_err(|error| format!("NATS_CREDS_FILE {}: {error}", file.display()))?;
            let section = |name: &str| {
                let begin = format!("-----BEGIN {name}-----");
                let rest = &text[text.find(&begin)? + begin.len()..];
                Some(rest[..rest.find("---")?].trim().to_owned())
            };
            let jwt = section("NATS USER JWT");
            let seed = section("USER NKEY SEED");
            return match (jwt, seed.map(|seed| nkeys::KeyPair::from_seed(&seed))) {
                (Some(jwt), Some(Ok(key))) => Ok(Self::Credentials {
                    jwt,
                    key: Box::new(key),
                }),
                _ => Err(format!(
                    "NATS_CREDS_FILE {} does not hold a user JWT and an NKey seed",
                    file.display()
                )),
            };
        }
        match (&config.nats_user, &config.nats_password) {
            (Some(user), Some(password)) => {
                Ok(Self::User(user.clone(), password.expose().to_owned()))
            }
            (None, None) => Ok(Self::None),
            _ => Err("NATS_USER and NATS_PASSWORD go together".to_owned()),
        }
    }

    fn answer(&self, nonce: &[u8]) -> Result<Auth, String> {
        let mut auth = Auth::new();
        match self {
            Self::None => {}
            Self::User(user, password) => {
                auth.username = Some(user.clone());
                auth.password = Some(password.clone());
            }
            Self::Credentials { jwt, key } => {
                auth.jwt = Some(jwt.clone());
                auth.signature = Some(key.sign(nonce).map_err(|error| error.to_string())?);
            }
        }
        Ok(auth)
    }
}
