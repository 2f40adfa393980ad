//! `make soak`: the long form.

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use birb_nest_soak::{Plan, run};
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
    /// Where histories are kept.
    #[arg(long, default_value = "target/soak")]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> Result<()> {
    let cli = Cli::parse();
    let seed = cli.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    println!("soak: SOAK_SEED={seed} makes this run again");
    let plan = Plan {
        max_rounds: usize::MAX,
        time: Duration::from_secs(cli.minutes * 60),
        phase: Duration::from_secs(2),
        ..Plan::short(seed, cli.dir)
    };
    let report = run(&plan).await?;
    print!("{report}");
    Ok(())
}
