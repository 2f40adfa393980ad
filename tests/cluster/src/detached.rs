//! A cluster that outlives the command that started it: a process of its own keeps it, until it is told to end.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use birb_nest_cluster::{Cluster, Extent, remove};
use birb_nest_stack::{blocking, until};
use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

/// What the keeping process writes; tells that the directory is a cluster's, too.
const LOG: &str = "cluster.log";
/// Its process id.
const KEEPER: &str = "pid";
/// Exists once the cluster can be used.
const READY: &str = "ready";

const STOP_LIMIT: Duration = Duration::from_secs(60);

pub async fn up(dir: &Path, control_plane: bool) -> Result<()> {
    if is_running(dir) {
        println!("{}", dir.join("kubeconfig").display());
        return Ok(());
    }
    extent(control_plane).require()?;
    clear(dir).await?;
    fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let log_path = dir.join(LOG);
    let log = File::create(&log_path)
        .with_context(|| format!("failed to create {}", log_path.display()))?;
    // Here, because here its progress is seen.
    blocking(birb_nest_cluster::Programs::build).await?;
    let mut keeper = Command::new(std::env::current_exe()?);
    keeper.arg("serve").arg("--dir").arg(dir);
    if control_plane {
        keeper.arg("--control-plane");
    }
    // Ctrl-C in this terminal is not for it.
    let mut keeper = keeper
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("failed to start the process that keeps the cluster")?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    loop {
        if dir.join(READY).exists() {
            println!("{}", dir.join("kubeconfig").display());
            return Ok(());
        }
        if keeper.try_wait()?.is_some() {
            let said = fs::read_to_string(&log_path)?;
            bail!(
                "{}",
                said.trim_start_matches("birb-nest-cluster: ").trim_end()
            );
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
            _ = interrupted.recv() => return down(dir).await,
        }
    }
}

/// Keeps a cluster until SIGTERM.
pub async fn serve(dir: &Path, control_plane: bool) -> Result<()> {
    let mut told_to_end = signal(SignalKind::terminate())?;
    fs::write(dir.join(KEEPER), std::process::id().to_string())?;
    let cluster = tokio::select! {
        cluster = Cluster::kept(dir, extent(control_plane)) => cluster?,
        _ = told_to_end.recv() => return Ok(()),
    };
    fs::write(dir.join(READY), "")?;
    told_to_end.recv().await;
    blocking(move || {
        drop(cluster);
        Ok(())
    })
    .await
}

pub async fn down(dir: &Path) -> Result<()> {
    if is_held(dir) {
        let keeper = fs::read_to_string(dir.join(KEEPER)).ok();
        let pid = keeper.and_then(|pid| Pid::from_raw(pid.parse().ok()?));
        let pid = pid.with_context(|| {
            format!(
                "{} is in use, but not by `birb-nest-cluster up`",
                dir.display()
            )
        })?;
        kill_process(pid, Signal::TERM)
            .context("failed to stop the process that keeps the cluster")?;
        let dir = dir.to_owned();
        blocking(move || until("the cluster has ended", STOP_LIMIT, || Ok(!is_held(&dir)))).await?;
    }
    clear(dir).await
}

fn extent(control_plane: bool) -> Extent {
    if control_plane {
        Extent::ControlPlane
    } else {
        Extent::Pods
    }
}

/// Whether a cluster can be used in `dir`.
pub fn is_running(dir: &Path) -> bool {
    is_held(dir) && dir.join(READY).exists()
}

/// Whether a process has the directory's lock.
fn is_held(dir: &Path) -> bool {
    File::open(dir.join("lock")).is_ok_and(|lock| lock.try_lock().is_err())
}

/// Removes the directory and what a killed cluster left; refuses one that is no cluster's.
async fn clear(dir: &Path) -> Result<()> {
    let Ok(mut entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    if entries.next().is_some() && !dir.join(LOG).is_file() {
        bail!(
            "{} holds something that is no cluster: choose another directory",
            dir.display()
        );
    }
    let dir = dir.to_owned();
    blocking(move || remove(&dir)).await
}
