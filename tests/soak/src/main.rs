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

impl Cli {
    fn plan(self) -> Plan {
        let seed = self
            .seed
            .unwrap_or_else(|| u64::from(rand::random::<u32>()));
        let mut again = format!("make soak MINUTES={} SOAK_SEED={seed}", self.minutes);
        if !self.only.is_empty() {
            let names: Vec<String> = self.only.iter().map(|it| format!("{it:?}")).collect();
            again += &format!(" FAULTS={}", names.join(","));
        }
        let short = Plan::short(seed, self.dir);
        Plan {
            faults: if self.only.is_empty() {
                short.faults.clone()
            } else {
                self.only
            },
            max_rounds: usize::MAX,
            time: Duration::from_secs(self.minutes * 60),
            phase: Duration::from_secs(2),
            again,
            ..short
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let plan = Cli::parse().plan();
    println!("soak: `{}` makes these rounds again", plan.again);
    let report = run(&plan).await?;
    print!("{report}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use anyhow::ensure;

    use super::*;

    /// What `make` would run is parsed again.
    #[test]
    fn the_printed_command_makes_the_same_rounds() -> Result<()> {
        for arguments in [
            &["soak", "--minutes", "7"][..],
            &[
                "soak",
                "--seed",
                "5",
                "--only",
                "LostTail,KillNats,PauseApi",
            ],
        ] {
            let plan = Cli::try_parse_from(arguments)?.plan();
            let printed = Command::new("make")
                .args(["--no-print-directory", "--dry-run"])
                .args(plan.again.split(' ').skip(1))
                .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
                .env_remove("MAKEFLAGS")
                .output()?;
            let printed = String::from_utf8(printed.stdout)?;
            let command = printed
                .lines()
                .find(|line| line.contains("birb-nest-soak"))
                .unwrap_or_default();
            let again = Cli::try_parse_from(command.split_whitespace())?.plan();
            ensure!(again.time == plan.time, "{command}");
            let (rounds, repeated) = (plan.rounds().take(50), again.rounds().take(50));
            ensure!(rounds.eq(repeated), "{command}: {}", plan.again);
        }
        Ok(())
    }
}
