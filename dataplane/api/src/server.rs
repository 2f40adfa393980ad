//! The API's life: open the stores, listen, serve, stop.

use std::{net::SocketAddr, pin::Pin, sync::Arc};

use anyhow::{Context, bail};
use axum::Router;
use axum_server::Handle;
use birb_nest_http::Patience;
use birb_nest_store::{
    Clock, LogConfig, Nest, PostgresConfig, RedisConfig, jetstream::Log, postgres::Database,
    redis::Cache,
};
use futures::{FutureExt, future::pending};
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use crate::{access, config::ApiConfig, router, state::AppState, tls::Acceptor};

/// Serves until `shutdown`, then finishes what is under way.
///
/// The stores may be down at start: the process then waits for them and is not ready.
///
/// # Errors
/// An [`birb_nest_store::OpenError`] when a store is refused; else what kept it from listening.
pub async fn run(
    config: ApiConfig,
    postgres: PostgresConfig,
    redis: RedisConfig,
    log: LogConfig,
    registry: Registry,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let (keys, following_keys) = match &config.api_keys_file {
        Some(path) => {
            let (keys, following) = access::follow(path).await?;
            (Some(keys), following)
        }
        None => (None, pending().boxed()),
    };
    let (acceptor, following_certificate) = Acceptor::of(&config).await?;
    let clock = Arc::new(Clock::new());
    let (cache, database) = tokio::try_join!(
        Cache::open(redis, clock.clone()),
        Database::open(&postgres, "api", clock.clone(), log.nats_shards),
    )?;
    let log = Log::open(
        log,
        config.largest_message(),
        database.progress(),
        clock.clone(),
    )
    .await?;
    let nest = Nest::new(log, cache, database, clock);
    let state = AppState::new(
        nest.clone(),
        config.clone(),
        keys,
        registry,
        shutdown.clone(),
    );

    let public = serve(
        config.api_port,
        acceptor,
        router::public(state.clone()),
        &config,
        &shutdown,
    );
    let rates = state.clone();
    let forgetting = async {
        match &rates.rate {
            Some(rate) => rate.forget().await,
            None => pending().await,
        }
    };
    let serving = async {
        match config.api_admin_port {
            None => public.await,
            Some(port) => {
                let router = router::admin(state);
                let admin = serve(port, Acceptor::admin(&config), router, &config, &shutdown);
                tokio::try_join!(public, admin).map(|_| ())
            }
        }
    };
    let serving = async {
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => served,
            error = nest.database().resharded() => {
                shutdown.cancel();
                serving.await?;
                Err(error.into())
            }
        }
    };
    tokio::select! {
        served = serving => served,
        task = nest.failed() => bail!("the {task} ended: this process cannot go on"),
        () = forgetting => bail!("nobody looks after rate limits any more: this process cannot go on"),
        () = following_keys => bail!("nobody follows API_KEYS_FILE any more: this process cannot go on"),
        () = following_certificate => bail!("nobody follows API_TLS_CERT_FILE any more: this process cannot go on"),
        () = nest.tend_redis() => bail!("nobody tends Redis any more: this process cannot go on"),
    }
}

async fn serve(
    port: u16,
    acceptor: Acceptor,
    router: Router,
    config: &ApiConfig,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let address = SocketAddr::new(config.api_host, port);
    let listener = std::net::TcpListener::bind(address).with_context(|| {
        format!(
            "failed to listen on {address}; API_HOST, API_PORT and API_ADMIN_PORT choose another"
        )
    })?;
    let local = listener
        .local_addr()
        .context("failed to read the listening address")?;
    let (handle, scheme) = (Handle::new(), acceptor.scheme());
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let server = axum_server::from_tcp(listener)
        .with_context(|| format!("failed to listen on {local}"))?
        .handle(handle.clone());
    let server = Patience {
        header: config.api_header_timeout,
        keepalive: config.api_keepalive_timeout,
    }
    .bound(server);
    let serving: Pin<Box<dyn Future<Output = std::io::Result<()>> + Send>> = match acceptor {
        Acceptor::Plain(plain) => Box::pin(server.acceptor(plain).serve(service)),
        Acceptor::Tls(tls) => Box::pin(server.acceptor(tls).serve(service)),
    };
    tracing::info!("listening on {scheme}://{local}");
    let stop = async {
        shutdown.cancelled().await;
        tokio::time::sleep(config.api_shutdown_delay).await;
        tracing::info!(
            "stopping: finishing {} connections on {local}",
            handle.connection_count()
        );
        handle.graceful_shutdown(Some(config.api_shutdown_timeout));
        pending::<()>().await;
    };
    tokio::select! {
        served = serving => served.with_context(|| format!("failed to serve {local}"))?,
        () = stop => {}
    }
    tracing::info!("closed {local}");
    Ok(())
}
