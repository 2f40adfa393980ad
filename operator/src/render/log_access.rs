//! How the operator reaches the log of a nest: with what the data plane is told.

use super::{Inputs, Names, checksum::hash, data_plane::Settings};
use crate::resolve::{Nest, Server};

/// Streams of the log, where `NATS_STREAM_NAME` says nothing else.
const STREAM: &str = "BIRB_CACHE";
/// The durable consumer on each of them.
pub const CONSUMER: &str = "birb-worker";

/// Address and credentials of a log. Not `Debug`: it holds secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct LogAccess {
    /// Addresses as the operator sees them, separated by commas.
    pub url: String,
    /// User name.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<String>,
    /// A credentials file, in place of both.
    pub credentials: Option<String>,
    /// Whether TLS is required.
    pub tls: bool,
    /// The authority that signed the server's certificate, PEM; public ones are known.
    pub authority: Option<Vec<u8>>,
    stream: String,
    /// Shards of the log.
    pub shards: i32,
}

impl LogAccess {
    /// The stream of a shard.
    pub fn stream(&self, shard: i32) -> String {
        format!("{}_{shard}", self.stream)
    }

    /// The same for all logs that one connection can serve; tells nothing of the secrets in it.
    pub fn pool_key(&self) -> String {
        let text = |text: &Option<String>| text.clone().unwrap_or_default().into_bytes();
        let parts = [
            text(&self.user),
            text(&self.password),
            text(&self.credentials),
            vec![u8::from(self.tls)],
            self.authority.clone().unwrap_or_default(),
        ];
        hash(&self.url, parts.iter().map(Vec::as_slice))
    }
}

/// How to reach the log of `nest`, whose Secrets hold `inputs`.
pub fn log_access(nest: &Nest, inputs: &Inputs) -> LogAccess {
    let settings = Settings::new(nest);
    let value = |variable| settings.value(variable).map(str::to_owned);
    let secret = |variable| settings.secret(variable, inputs);
    // As the data plane does: what an editor leaves at the end is not part of it.
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes)
            .trim_end_matches(['\r', '\n'])
            .to_owned()
    };
    let url = match &nest.nats {
        Server::Managed(_) => format!("nats://{}:4222", Names(&nest.name).nats()),
        Server::External(external) => external.url.clone(),
    };
    LogAccess {
        url: from_elsewhere(&url, &nest.namespace),
        user: value("NATS_USER"),
        password: secret("NATS_PASSWORD_FILE").map(text),
        credentials: secret("NATS_CREDS_FILE").map(text),
        tls: value("NATS_TLS").is_some(),
        authority: secret("NATS_CA_FILE").map(<[u8]>::to_vec),
        stream: value("NATS_STREAM_NAME").unwrap_or_else(|| STREAM.to_owned()),
        shards: nest.shards,
    }
}

/// Pods find a Service of their own namespace by its name alone; the operator is in another one.
fn from_elsewhere(urls: &str, namespace: &str) -> String {
    let qualify = |url: &str| {
        let (scheme, rest) = url.split_once("://")?;
        let (host, port) = rest.split_once(':').unwrap_or((rest, "4222"));
        let is_short = !host.contains(['.', '[']) && host != "localhost";
        is_short.then(|| format!("{scheme}://{host}.{namespace}.svc:{port}"))
    };
    let urls = urls.split(',').map(str::trim);
    let qualified: Vec<String> = urls
        .map(|url| qualify(url).unwrap_or_else(|| url.to_owned()))
        .collect();
    qualified.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_nests_own_namespace_are_found_from_another() {
        for (given, expected) in [
            ("nats://nats:4222", "nats://nats.shop.svc:4222"),
            ("tls://nats", "tls://nats.shop.svc:4222"),
            ("nats://nats.infra:4222", "nats://nats.infra:4222"),
            ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
            ("nats://[::1]:4222", "nats://[::1]:4222"),
            ("nats://localhost:4222", "nats://localhost:4222"),
            (
                "nats://a:1, nats://b.c:2",
                "nats://a.shop.svc:1,nats://b.c:2",
            ),
        ] {
            assert_eq!(from_elsewhere(given, "shop"), expected);
        }
    }
}
