//! `birb-nest api | worker | setup`: the data plane of a birb-nest in one binary.

mod cli;
mod docs;
mod settings;
mod shutdown;
mod telemetry;

use std::process::ExitCode;

use birb_nest_store::{OpenError, reshard, setup};
use clap::Parser;

use crate::cli::{Cli, Role};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Exit codes, after sysexits.h: 0 done, 75 try again (a server cannot be used now), 78 a person must change
/// something (configuration, or a server that is refused), 1 anything else.
const TRY_AGAIN: u8 = 75;
const REFUSED: u8 = 78;

fn main() -> ExitCode {
    let args = match settings::arguments(
        &<Cli as clap::CommandFactory>::command(),
        std::env::args_os(),
        std::env::vars_os(),
    ) {
        Ok(args) => args,
        Err(problems) => {
            eprintln!("{problems}");
            return ExitCode::from(REFUSED);
        }
    };
    // Whatever is still wrong is about the command line itself: clap says so and exits.
    let cli = Cli::parse_from(args);
    if let Role::DocsConfig = cli.role {
        print!("{}", docs::configuration());
        return ExitCode::SUCCESS;
    }
    rustls::crypto::aws_lc_rs::default_provider()
        .install_default()
        .expect("nobody installed another provider");
    match run(cli.role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            match error.downcast_ref::<OpenError>() {
                Some(refusal) if refusal.is_refusal() => ExitCode::from(REFUSED),
                Some(_) => ExitCode::from(TRY_AGAIN),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn run(role: Role) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let registry = telemetry::init(role.log())?;
    let result = runtime.block_on(async {
        let shutdown = shutdown::on_signal()?;
        match role {
            Role::Api(api) => {
                let s = api.servers;
                birb_nest_api::run(api.config, s.postgres, s.redis, s.log, registry, shutdown).await
            }
            Role::Worker(worker) => {
                let s = worker.servers;
                birb_nest_worker::run(worker.config, s.postgres, s.redis, s.log, registry, shutdown).await
            }
            Role::Setup(role) => {
                let s = role.servers;
                let work = async {
                    match role.reshard {
                        Some(target) => reshard::run(&s.postgres, s.log, target).await,
                        None => setup::run(&s.postgres, &s.redis, s.log).await,
                    }
                };
                tokio::select! {
                    done = work => Ok(done?),
                    () = shutdown.cancelled() => anyhow::bail!("stopped before it was done; run it again"),
                }
            }
            Role::DocsConfig => unreachable!("answered before"),
        }
    });
    // Anything still running has had its time.
    runtime.shutdown_background();
    result
}
