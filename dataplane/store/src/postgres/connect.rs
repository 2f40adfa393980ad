//! How connections are made, the same for all roles.

use sqlx::{
    ConnectOptions, Connection, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};

use super::{schema::refuse_standby, within};
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

/// A connection of its own to the primary, called `application` in `pg_stat_activity`. A standby gives out advisory
/// locks, too: whoever is led to one would own what somebody else owns.
pub(super) async fn connect(
    config: &PostgresConfig,
    application: &str,
) -> Result<PgConnection, String> {
    let options = options(config, application).map_err(|error| error.to_string())?;
    let connecting = async {
        let mut connection = options.connect().await?;
        refuse_standby(&mut connection).await?;
        Ok(connection)
    };
    within(config.postgres_timeout, connecting).await
}

/// As [`connect`], holding the advisory lock `(class, object)`; `None` when another session has it.
pub(super) async fn connect_with_lock(
    config: &PostgresConfig,
    application: &str,
    lock: (i32, i32),
) -> Result<Option<PgConnection>, String> {
    let connection = connect(config, application).await?;
    lock_or_close(config, connection, lock).await
}

/// `connection` holding the advisory lock; `None`, and closed, when another session has it.
pub(super) async fn lock_or_close(
    config: &PostgresConfig,
    mut connection: PgConnection,
    (class, object): (i32, i32),
) -> Result<Option<PgConnection>, String> {
    let locking = sqlx::query_scalar("select pg_try_advisory_lock($1, $2)")
        .bind(class)
        .bind(object)
        .fetch_one(&mut connection);
    let taken: bool = within(config.postgres_timeout, locking).await?;
    if !taken {
        // At once instead of when the server notices.
        let _ = tokio::time::timeout(config.postgres_timeout, connection.close()).await;
        return Ok(None);
    }
    Ok(Some(connection))
}

/// The server as people know it, without credentials.
pub(super) fn server_name(config: &PostgresConfig) -> String {
    match &config.postgres_url {
        None => format!(
            "PostgreSQL at {}:{}/{}",
            config.postgres_host, config.postgres_port, config.postgres_db
        ),
        Some(url) => format!("PostgreSQL at {}", url.address()),
    }
}
