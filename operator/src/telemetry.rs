//! Logs and metrics of the process.

use std::io::IsTerminal;

use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::Registry;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

use crate::config::{LogFormat, LogOutput};

/// Installs the log and the meter provider; the registry is what `/metrics` shows.
///
/// # Errors
/// If the filter of log lines is none.
pub fn init(output: &LogOutput) -> anyhow::Result<Registry> {
    // kube and async-nats log what they hand to us as errors, and we log what we handle.
    let filter = EnvFilter::try_new(&output.log_level)?
        .add_directive("kube_client=off".parse()?)
        .add_directive("kube_runtime=off".parse()?)
        .add_directive("async_nats=off".parse()?)
        .add_directive("opentelemetry=warn".parse()?);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match output.log_format {
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    let registry = Registry::new();
    let reader = opentelemetry_prometheus::exporter()
        .with_registry(registry.clone())
        .scope_info_enabled(false)
        .without_target_info()
        .build()?;
    opentelemetry::global::set_meter_provider(
        SdkMeterProvider::builder().with_reader(reader).build(),
    );
    Ok(registry)
}
