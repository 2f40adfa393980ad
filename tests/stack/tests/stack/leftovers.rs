//! What is left after a crash, and that it does not stay.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use birb_nest_stack::{Options, Ports, Stack};
use rustix::process::{Pid, Signal, kill_process};

use crate::clients::eventually;

/// The processes that work below `dir`.
fn working_in(dir: &Path) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
    })
    .collect()
}

/// Killed when dropped, also by a test that fails.
struct Parent(Child);

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

fn test_dir(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("birb-nest-{name}-{}", std::process::id()))
}

#[tokio::test]
async fn servers_die_with_a_killed_parent_and_paused_ones_by_the_next_start() -> Result<()> {
    let dir = test_dir("crash");
    let ports = Ports::reserve()?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_birb-nest-stack"));
    command
        .args(["dev", "--servers-only", "--data"])
        .arg(&dir)
        .env("REDIS_PORT", ports.redis.number().to_string())
        .env("NATS_PORT", ports.nats.number().to_string())
        .env("POSTGRES_PORT", ports.postgres.number().to_string())
        .stdout(Stdio::null());
    let mut parent = Parent(command.spawn()?);
    // It is written when all servers answer.
    eventually("the servers run", || {
        dir.join("env").exists() || parent.0.try_wait().is_ok_and(|end| end.is_some())
    });
    let running = working_in(&dir);
    assert!(
        running.len() >= 3,
        "saw only {running:?}: root needs CAP_SYS_PTRACE to see the servers (docker run --cap-add SYS_PTRACE)"
    );

    let refused = Stack::open(&dir, Ports::reserve, Options::default())
        .await
        .unwrap_err()
        .to_string();
    assert!(refused.contains("already running"), "{refused}");

    let backend = |pid: &&i32| {
        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with(b"postgres: "))
    };
    let backend = *running
        .iter()
        .find(backend)
        .context("PostgreSQL has no backend")?;
    kill_process(
        Pid::from_raw(backend).context("a process id")?,
        Signal::STOP,
    )?;
    drop(parent);
    eventually("all but the stopped backend are gone", || {
        working_in(&dir) == [backend]
    });

    let stack = Stack::open(&dir, move || Ok(ports), Options::default()).await?;
    assert_eq!(working_in(&dir), [0; 0]);
    stack.start().await?;
    assert_eq!(stack.psql("birb_nest", "select 1").await?, "1");
    drop(stack);
    assert_eq!(working_in(&dir), [0; 0]);
    fs::remove_dir_all(dir)?;
    Ok(())
}

#[tokio::test]
async fn temporary_directories_of_dead_processes_are_removed() -> Result<()> {
    let stack = Stack::fresh().await?;
    let root = stack.root().to_owned();
    let stale = root.with_file_name(format!("stale-{}", std::process::id()));
    let mut orphan = Command::new("sleep")
        .arg("1000")
        .env("BIRB_NEST_STACK_DIR", stale.join("redis"))
        .spawn()?;
    fs::create_dir(&stale)?;
    // Last: from here on any stack that starts, of this or another process, may clean up.
    fs::write(stale.with_extension("lock"), "")?;

    let other = Stack::fresh().await?;
    assert!(!orphan.wait()?.success());
    eventually("it is removed", || {
        !stale.exists() && !stale.with_extension("lock").exists()
    });
    assert!(root.exists(), "the directory of a living stack was removed");

    drop((stack, other));
    assert!(!root.exists() && !root.with_extension("lock").exists());
    assert_eq!(working_in(&root), [0; 0]);
    Ok(())
}
