//! `birb-nest-stack dev`: birb-nest with its servers on this machine, for `make dev`.

mod dev;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Runs the servers that birb-nest works with.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run birb-nest and its servers here until Ctrl-C; the data is kept.
    Dev(dev::Arguments),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Command::Dev(arguments) = Arguments::parse().command;
    match dev::run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("birb-nest-stack: {error:#}");
            ExitCode::FAILURE
        }
    }
}
