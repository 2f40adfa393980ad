//! `birb-nest-cluster`: the test cluster for people and scripts.

mod detached;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, ExitCode};

use anyhow::{Result, bail};
use birb_nest_cluster::{Programs, load_image};
use clap::{Parser, Subcommand};

/// Runs a real Kubernetes 1.34 on this machine, from Go modules and Debian packages.
#[derive(Parser)]
struct Arguments {
    /// Where the cluster keeps its files; a second one needs another directory.
    #[arg(long, global = true, env = "BIRB_NEST_CLUSTER_DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../.dev/cluster"))]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster that goes on when this command ends, unless one runs; prints its kubeconfig.
    Up {
        /// No node: nothing runs in it, and it needs no root.
        #[arg(long)]
        control_plane: bool,
    },
    /// Be the cluster that `up` starts, until SIGTERM.
    #[command(hide = true)]
    Serve {
        #[arg(long)]
        control_plane: bool,
    },
    /// Stop it and remove all it left.
    Down,
    /// Print the path of its kubeconfig.
    Kubeconfig,
    /// Give the node images, from archives as `docker save` and `buildah push` write them.
    LoadImage {
        /// The archives.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
    /// Build Kubernetes' programs, if that was not done before; prints the directory that holds them.
    Build,
    /// Run one of them, on this cluster if KUBECONFIG names no other.
    Tool {
        /// `kubectl` or `helm`.
        name: String,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("birb-nest-cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(Arguments { dir, command }: Arguments) -> Result<()> {
    match command {
        Command::Up { control_plane } => detached::up(&dir, control_plane).await,
        Command::Serve { control_plane } => detached::serve(&dir, control_plane).await,
        Command::Down => detached::down(&dir).await,
        Command::Kubeconfig => {
            println!("{}", running(&dir)?.display());
            Ok(())
        }
        Command::LoadImage { files } => {
            running(&dir)?;
            for file in &files {
                load_image(&dir, file).await?;
            }
            Ok(())
        }
        Command::Build => {
            println!("{}", Programs::build()?.dir().display());
            Ok(())
        }
        Command::Tool { name, arguments } => tool(&dir, &name, &arguments),
    }
}

/// The kubeconfig of the cluster in `dir`.
fn running(dir: &Path) -> Result<PathBuf> {
    if !detached::is_running(dir) {
        bail!(
            "no cluster runs in {}: start one with `birb-nest-cluster up`",
            dir.display()
        );
    }
    Ok(dir.join("kubeconfig"))
}

/// Becomes that program.
fn tool(dir: &Path, name: &str, arguments: &[String]) -> Result<()> {
    let mut program = Program::new(Programs::build()?.path(name)?);
    if std::env::var_os("KUBECONFIG").is_none_or(|path| path.is_empty()) {
        program.env("KUBECONFIG", running(dir)?);
    }
    Err(program.args(arguments).exec().into())
}
