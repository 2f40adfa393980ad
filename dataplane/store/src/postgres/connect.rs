//! How connections are made, the same for all roles.

use sqlx::postgres::{PgConnectOptions, PgSslMode};

use crate::{
    config::{PostgresConfig, SslMode},
    refusal::{OpenError, chain},
};

/// Connection settings from the configuration.
///
/// `application` shows in `pg_stat_activity`. Commits are waited for whatever the role's default is: "stored" must
/// mean on disk. The server notices a dead client within half a minute, so that its advisory locks are given up.
pub(super) fn options(
    config: &PostgresConfig,
    application: &str,
) -> Result<PgConnectOptions, OpenError> {
    let mut options = match &config.postgres_url {
        Some(url) => url.expose().parse::<PgConnectOptions>().map_err(|error| {
            OpenError::refused(
                server_name(config),
                format!("POSTGRES_URL: {}", chain(&error)),
            )
        })?,
        None => {
            let mut options = PgConnectOptions::new_without_pgpass()
                .host(&config.postgres_host)
                .port(config.postgres_port)
                .username(&config.postgres_user)
                .database(&config.postgres_db)
                .ssl_mode(match config.postgres_sslmode {
                    SslMode::Disable => PgSslMode::Disable,
                    SslMode::Prefer => PgSslMode::Prefer,
                    SslMode::Require => PgSslMode::Require,
                    SslMode::VerifyCa => PgSslMode::VerifyCa,
                    SslMode::VerifyFull => PgSslMode::VerifyFull,
                });
            if let Some(password) = &config.postgres_password {
                options = options.password(password.expose());
            }
            options
        }
    };
    if let Some(file) = &config.postgres_ca_file {
        options = options.ssl_root_cert(file);
    }
    Ok(options.application_name(application).options([
        ("synchronous_commit", "on"),
        ("statement_timeout", "30s"),
        ("lock_timeout", "10s"),
        ("idle_in_transaction_session_timeout", "30s"),
        ("tcp_keepalives_idle", "10"),
        ("tcp_keepalives_interval", "5"),
        ("tcp_keepalives_count", "3"),
        ("tcp_user_timeout", "25s"),
    ]))
}

/// The server as people know it, without credentials.
pub(super) fn server_name(config: &PostgresConfig) -> String {
    match &config.postgres_url {
        None => format!(
            "PostgreSQL at {}:{}/{}",
            config.postgres_host, config.postgres_port, config.postgres_db
        ),
        Some(url) => {
            let url = url.expose();
            let address = url
                .rsplit_once('@')
                .or_else(|| url.split_once("://"))
                .map_or("?", |(_, rest)| rest);
            format!(
                "PostgreSQL at {}",
                address.split('?').next().unwrap_or(address)
            )
        }
    }
}
