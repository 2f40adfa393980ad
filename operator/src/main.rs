//! `birb-nest-operator`: waits to be the leader, then makes passes until a signal or until it may not lead any more.

use std::{process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context as _;
use birb_nest_operator::{
    admin::{self, Liveness, Readiness},
    config::Config,
    context::Context,
    controller,
    leader::Elector,
    metrics::METRICS,
    owned::Owned,
    telemetry,
};
use clap::Parser;
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Longest time that a connection to the API server may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let config = Config::parse();
    if let Err(problem) = config.validate() {
        eprintln!("birb-nest-operator: {problem}");
        return ExitCode::from(2);
    }
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("nobody installed another provider");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("the system has threads");
    let result = runtime.block_on(run(config));
    // Requests under way belong to a pass that has ended, or to a leader that is none any more.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let registry = telemetry::init(&config.log)?;
    let stopping = on_signal()?;
    let readiness = Readiness::default();
    let liveness = Liveness::default();
    let admin = admin::listen(&config, registry, readiness.clone(), liveness.clone()).await?;
    let mut admin = tokio::spawn(admin);

    let mut kubernetes = kube::Config::infer().await.context(
        "failed to find a cluster: neither a ServiceAccount's token nor a kubeconfig is here",
    )?;
    // What fails is tried again by the next pass, or the next renewal, later each time; not for minutes inside of one.
    kubernetes.default_retry = false;
    kubernetes.connect_timeout = Some(CONNECT_LIMIT);
    kubernetes.read_timeout = Some(config.silence_limit);
    kubernetes.reset_reader_on_write = true;
    let client =
        Client::try_from(kubernetes).context("failed to make a client of the API server")?;
    let holder = holder(&config);
    let elector = Elector::new(client.clone(), &config.election, &holder);

    METRICS.leader(false);
    tracing::info!("standing by as {holder}");
    let mut hold = tokio::select! {
        hold = elector.acquire(|| readiness.set(true)) => hold,
        () = stopping.cancelled() => return Ok(()),
        ended = &mut admin => return ended?,
    };
    METRICS.leader(true);
    readiness.set(true);
    tracing::info!("leading as {holder}");

    let (owned, writers) = Owned::new();
    let context = Context::new(client, config, &holder, elector.term(), owned);
    let controller = controller::run(Arc::new(context), writers, liveness, stopping.clone());
    tokio::select! {
        lost = elector.keep(&mut hold) => anyhow::bail!("this process may not lead any more: {lost}"),
        ended = &mut admin => return ended?,
        () = controller => {}
    }
    anyhow::ensure!(
        stopping.is_cancelled(),
        "the controller ended by itself; this is a defect"
    );
    readiness.set(false);
    METRICS.leader(false);
    elector.release(hold).await;
    Ok(())
}

/// Unique among operators, and the same for the life of the process.
fn holder(config: &Config) -> String {
    config.election.lease_holder.clone().unwrap_or_else(|| {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        format!("{}-{:08x}", host.trim(), rand::random::<u32>())
    })
}

/// A token that is cancelled by the first SIGTERM or SIGINT. A second one ends the process at once.
fn on_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopping = CancellationToken::new();
    let token = stopping.clone();
    tokio::spawn(async move {
        for attempt in 1.. {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if attempt > 1 {
                std::process::exit(1);
            }
            tracing::info!("{name}: finishing the passes under way");
            token.cancel();
        }
    });
    Ok(stopping)
}
