//! HTTPS, if it is asked for, with a certificate that may change while the process runs.

use std::{path::PathBuf, time::Duration};

use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use birb_nest_http::{ADMIN_CONNECTIONS, Bounded, Limit};
use birb_nest_store::OpenError;
use futures::{
    FutureExt,
    future::{BoxFuture, pending},
};

use crate::{config::ApiConfig, metrics};

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Takes connections, as they are or by TLS.
pub enum Acceptor {
    Plain(Bounded),
    Tls(RustlsAcceptor<Bounded>),
}

impl Acceptor {
    /// HTTP for the admin port.
    pub fn admin(config: &ApiConfig) -> Self {
        Self::Plain(Bounded::new(Limit {
            n: ADMIN_CONNECTIONS,
            setting: "all that API_ADMIN_PORT has room for",
            ..limit(config)
        }))
    }

    /// HTTPS if `config` says so, and the work of following the files, which never ends.
    ///
    /// # Errors
    /// The files cannot be read, or are no certificate and key.
    pub async fn of(config: &ApiConfig) -> Result<(Self, BoxFuture<'static, ()>), OpenError> {
        let Some((cert, key)) = config
            .api_tls_cert_file
            .clone()
            .zip(config.api_tls_key_file.clone())
        else {
            let plain = Self::Plain(Bounded::new(limit(config)));
            return Ok((plain, pending().boxed()));
        };
        let bounded = Bounded::new(limit(config));
        let config = RustlsConfig::from_pem_file(&cert, &key)
            .await
            .map_err(|error| {
                let what = format!(
                    "the pair of API_TLS_CERT_FILE {} and API_TLS_KEY_FILE {}",
                    cert.display(),
                    key.display()
                );
                OpenError::refused(what, error)
            })?;
        let following = follow(config.clone(), cert, key).boxed();
        let acceptor = RustlsAcceptor::new(config).acceptor(bounded);
        Ok((Self::Tls(acceptor), following))
    }

    /// `http` or `https`.
    pub const fn scheme(&self) -> &'static str {
        match self {
            Self::Plain(_) => "http",
            Self::Tls(_) => "https",
        }
    }
}

/// That of the public port.
fn limit(config: &ApiConfig) -> Limit {
    Limit {
        n: config.api_max_connections,
        setting: "API_MAX_CONNECTIONS",
        patience: config.api_answer_timeout,
        count_refused: metrics::connection_refused,
    }
}

/// Takes a new certificate over when the files have changed. Never ends.
async fn follow(config: RustlsConfig, cert: PathBuf, key: PathBuf) {
    let read = async || {
        (
            tokio::fs::read(&cert).await.ok(),
            tokio::fs::read(&key).await.ok(),
        )
    };
    let mut known = read().await;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let found = read().await;
        if found == known {
            continue;
        }
        let (Some(pem), Some(secret)) = found.clone() else {
            continue; // between two links: what is there then is looked at the next time
        };
        match config.reload_from_pem(pem, secret).await {
            Ok(()) => tracing::info!(
                "API_TLS_CERT_FILE has changed: new connections get the new certificate"
            ),
            Err(error) => tracing::error!(
                %error,
                "API_TLS_CERT_FILE and API_TLS_KEY_FILE cannot be used, the certificate from before stays"
            ),
        }
        known = found;
    }
}
