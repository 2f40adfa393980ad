//! `make soak`: the long form.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use birb_nest_soak::{Fault, Plan, run};
use clap::Parser;

/// Works on a nest while things break, and judges what clients saw.
#[derive(Parser)]
struct Cli {
    /// How long, in minutes.
    #[arg(long, default_value_t = 30)]
    minutes: u64,
    /// Which run; without it one that was not yet.
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults, such as `LostTail,KillNats`; without it all.
    #[arg(long, value_delimiter = ',', value_parser = fault)]
    only: Vec<Fault>,
    /// Where histories are kept.
    #[arg(long, default_value = "target/soak")]
    dir: PathBuf,
}

fn fault(name: &str) -> std::result::Result<Fault, String> {
    let named = |fault: &Fault| format!("{fault:?}") == name;
    let found = Fault::ALL.into_iter().find(named);
    found.ok_or_else(|| format!("the faults are {:?}", Fault::ALL))
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let seed = cli.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    println!("soak: SOAK_SEED={seed} makes this run again");
    let short = Plan::short(seed, cli.dir);
    let plan = Plan {
        faults: if cli.only.is_empty() {
            short.faults.clone()
        } else {
            cli.only
        },
        max_rounds: usize::MAX,
        time: Duration::from_secs(cli.minutes * 60),
        phase: Duration::from_secs(2),
        ..short
    };
    let report = run(&plan).await?;
    print!("{report}");
    Ok(())
}
