//! Logs and metrics of the process.

use std::io::IsTerminal;

use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::Registry;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::cli::{LogFormat, LogOutput};

/// Installs the log and the meter provider; the registry is what `/metrics` shows.
pub fn init(output: &LogOutput) -> anyhow::Result<Registry> {
    // async-nats and sqlx log what we handle, and log ourselves.
    let filter = EnvFilter::try_new(&output.log_level)?
        .add_directive("async_nats=off".parse()?)
        .add_directive("opentelemetry=warn".parse()?)
        .add_directive("sqlx=off".parse()?)
        .add_directive("sqlx_core=off".parse()?)
        .add_directive("sqlx_postgres=off".parse()?);
    let registry = tracing_subscriber::registry().with(filter);
    match output.log_format {
        LogFormat::Json => registry
            .with(
                fmt::layer()
                    .json()
                    .flatten_event(true)
                    .with_writer(std::io::stderr),
            )
            .init(),
        LogFormat::Text => registry
            .with(
                fmt::layer()
                    .with_ansi(std::io::stderr().is_terminal())
                    .with_writer(std::io::stderr),
            )
            .init(),
    }
    let metrics = Registry::new();
    let reader = opentelemetry_prometheus::exporter()
        .with_registry(metrics.clone())
        .scope_info_enabled(false)
        .without_target_info()
        .build()?;
    opentelemetry::global::set_meter_provider(
        SdkMeterProvider::builder().with_reader(reader).build(),
    );
    Ok(metrics)
}
