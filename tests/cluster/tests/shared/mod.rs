//! A harness that is killed, for both rings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use birb_nest_stack::{blocking, until};

/// A machine that compiles beside it.
const LIMIT: Duration = Duration::from_secs(180);

/// `birb-nest-cluster` in a process of its own.
pub struct Harness {
    pub dir: PathBuf,
    child: Child,
}

impl Harness {
    /// Starts a cluster in a new directory and waits until it can be used.
    pub async fn start(name: &str, arguments: &'static [&str]) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("birb-nest-{name}-{}", std::process::id()));
        blocking(move || {
            fs::create_dir(&dir)?;
            // As `up` does; tells that the directory is a cluster's.
            let log = fs::File::create(dir.join("cluster.log"))?;
            let mut child = program(&dir)
                .arg("serve")
                .args(arguments)
                .stderr(log)
                .spawn()?;
            until("the cluster is ready", LIMIT, || {
                if child.try_wait()?.is_some() {
                    bail!("it ended: {}", fs::read_to_string(dir.join("cluster.log"))?);
                }
                Ok(dir.join("ready").exists())
            })?;
            Ok(Self { dir, child })
        })
        .await
    }

    /// Kills it (SIGKILL), and it alone; waits until no process knows its directory any more.
    pub async fn kill(mut self) -> Result<PathBuf> {
        blocking(move || {
            self.child.kill()?;
            self.child.wait()?;
            until("its processes are gone", LIMIT, || {
                Ok(processes(&self.dir).is_empty())
            })?;
            Ok(self.dir)
        })
        .await
    }
}

/// Runs `birb-nest-cluster` in `dir` to its end.
pub async fn run(dir: &Path, arguments: &'static [&str]) -> Result<()> {
    let mut command = program(dir);
    blocking(move || {
        let output = command.args(arguments).output()?;
        if !output.status.success() {
            bail!(
                "{arguments:?} failed: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(())
    })
    .await
    .with_context(|| format!("in {}", dir.display()))
}

fn program(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_birb-nest-cluster"));
    command.arg("--dir").arg(dir);
    command
}

/// The command lines in which `dir` occurs, of processes that still run.
fn processes(dir: &Path) -> Vec<String> {
    let dir = dir.display().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        // A process that has ended has no command line.
        .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).into_owned())
        .filter(|line| line.contains(&dir))
        .collect()
}
