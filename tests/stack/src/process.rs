//! A child process: its signals, its end, its log.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::wait::{POLL, blocking};
use crate::{proc_fs, spawner};

/// A running or finished child process. Dropped, it is killed together with its descendants.
///
/// Signals never reach a stranger: none is sent once the process has been reaped.
#[derive(Debug)]
pub struct Process(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    pid: u32,
    child: Mutex<Child>,
    log: PathBuf,
    log_start: u64,
}

impl Process {
    /// Starts `command` marked as working in `dir`, its output appended to the file `log`, in a process group of its own
    /// (Ctrl-C in a terminal is for us, we stop our children in order).
    ///
    /// # Errors
    /// The program is not there, or the log cannot be written.
    pub fn spawn(name: &str, mut command: Command, dir: &Path, log: &Path) -> Result<Self> {
        let start = || -> Result<Self> {
            fs::create_dir_all(log.parent().unwrap_or(Path::new("/")))?;
            let output = File::options().create(true).append(true).open(log)?;
            let log_start = output.metadata()?.len();
            command
                .env(proc_fs::MARKER, dir)
                .stdin(Stdio::null())
                .process_group(0);
            command.stdout(output.try_clone()?).stderr(output);
            let child = spawner::spawn(command)?;
            Ok(Self(Arc::new(Inner {
                name: name.to_owned(),
                pid: child.id(),
                child: Mutex::new(child),
                log: log.to_owned(),
                log_start,
            })))
        };
        start().with_context(|| format!("failed to start {name}"))
    }

    /// Its process id; that of another process perhaps, once this one has ended.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// Everything it wrote to stdout and stderr so far.
    ///
    /// # Errors
    /// The log file is gone.
    pub fn log(&self) -> Result<String> {
        self.0.log()
    }

    /// `None` while it runs (or is paused), else how it ended.
    ///
    /// # Errors
    /// The system refused to say.
    pub fn exited(&self) -> Result<Option<ExitStatus>> {
        Ok(self.0.child().try_wait()?)
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// The system refused to say.
    /// # Cancel safety
    /// Dropping the future changes nothing.
    pub async fn wait(&self) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Kills it (SIGKILL) and its descendants, and returns when all are gone. Nothing to do if it ended already.
    ///
    /// # Errors
    /// Something survived for 10 s, as it does while it waits for a broken disk.
    pub async fn kill(&self) -> Result<()> {
        let inner = Arc::clone(&self.0);
        blocking(move || inner.kill()).await
    }

    /// Asks it to end (SIGTERM; a paused one is resumed first) and waits at most `limit` until it has.
    ///
    /// # Errors
    /// It still runs after `limit`; it is left running then.
    pub async fn terminate(&self, limit: Duration) -> Result<ExitStatus> {
        let inner = Arc::clone(&self.0);
        blocking(move || inner.end(Signal::TERM, limit)).await
    }

    /// Stops it and its descendants (SIGSTOP). When this returns none of them runs; connections stay open.
    ///
    /// # Errors
    /// It has ended.
    pub async fn pause(&self) -> Result<()> {
        let inner = Arc::clone(&self.0);
        blocking(move || inner.pause()).await
    }

    /// Lets it and its descendants go on after [`Process::pause`].
    ///
    /// # Errors
    /// It has ended.
    pub async fn resume(&self) -> Result<()> {
        let inner = Arc::clone(&self.0);
        blocking(move || inner.resume()).await
    }

    pub(crate) fn kill_now(&self) -> Result<()> {
        self.0.kill()
    }

    pub(crate) fn end_now(&self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        self.0.end(signal, limit)
    }

    pub(crate) fn pause_now(&self) -> Result<()> {
        self.0.pause()
    }

    pub(crate) fn resume_now(&self) -> Result<()> {
        self.0.resume()
    }

    /// The last `n` lines of its log, for messages; empty if there are none.
    pub fn last_lines(&self, n: usize) -> String {
        let log = self.0.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(n)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // What survives is found by the next start on this directory.
        let _ = self.0.kill();
    }
}

impl Inner {
    fn child(&self) -> MutexGuard<'_, Child> {
        self.child
            .lock()
            .expect("nothing panics while it holds the child")
    }

    fn log(&self) -> Result<String> {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut bytes = Vec::new();
            let mut file = File::open(&self.log)?;
            file.seek(SeekFrom::Start(self.log_start))?;
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let bytes = read().with_context(|| format!("failed to read {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn kill(&self) -> Result<()> {
        let mut child = self.child();
        if child.try_wait()?.is_some() {
            return Ok(());
        }
        let tree = proc_fs::stop_tree(self.pid)?;
        tree.iter()
            .try_for_each(|pid| proc_fs::send(*pid, Signal::KILL))?;
        child.wait()?;
        proc_fs::wait_gone(&tree[1..])
    }

    fn end(&self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        if self.child().try_wait()?.is_none() {
            self.resume()?;
            self.if_running(|pid| proc_fs::send(pid, signal))?;
        }
        loop {
            if let Some(status) = self.child().try_wait()? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} still runs {limit:?} after {signal:?}; its log is {}",
                    self.name,
                    self.log.display()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    fn pause(&self) -> Result<()> {
        self.if_running(|pid| proc_fs::stop_tree(pid).map(drop))
    }

    fn resume(&self) -> Result<()> {
        self.if_running(proc_fs::resume_tree)
    }

    fn if_running(&self, act: impl FnOnce(u32) -> Result<()>) -> Result<()> {
        let mut child = self.child();
        match child.try_wait()? {
            None => act(self.pid),
            Some(status) => bail!("{} does not run any more ({status})", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::root::Root;

    /// The root is removed when it is dropped, after the process.
    fn shell(script: &str) -> Result<(Root, Process)> {
        let root = Root::temporary("processes", |_| Ok(()))?;
        let mut command = spawner::tethered(Path::new("/bin/sh"), &[])?;
        command.args(["-c", script]);
        let process = Process::spawn("shell", command, root.path(), &root.path().join("log"))?;
        Ok((root, process))
    }

    async fn logged(process: &Process, text: &str) {
        while !process.log().is_ok_and(|log| log.contains(text)) {
            tokio::time::sleep(POLL).await;
        }
    }

    #[tokio::test]
    async fn end_and_output_are_seen() -> Result<()> {
        let (_root, process) = shell("echo out; echo err >&2; exit 3")?;
        assert_eq!(process.wait().await?.code(), Some(3));
        assert_eq!(process.log()?, "out\nerr\n");
        assert!(process.pause().await.is_err());
        process.kill().await?;
        assert_eq!(process.terminate(Duration::ZERO).await?.code(), Some(3));
        Ok(())
    }

    #[tokio::test]
    async fn kill_takes_the_descendants_with_it() -> Result<()> {
        let (_root, process) = shell("sleep 1000 & echo child $!.; wait")?;
        logged(&process, ".").await;
        let log = process.log()?;
        let child = log
            .trim()
            .trim_start_matches("child ")
            .trim_end_matches('.')
            .parse()?;
        process.kill().await?;
        proc_fs::wait_gone(&[child])?;
        assert!(process.exited()?.is_some());
        Ok(())
    }

    #[tokio::test]
    async fn terminate_reaches_a_paused_process_and_gives_up_on_a_deaf_one() -> Result<()> {
        let (_root, polite) =
            shell("trap 'exit 7' TERM; echo ready; while :; do sleep 0.01; done")?;
        logged(&polite, "ready").await;
        polite.pause().await?;
        assert_eq!(
            polite.terminate(Duration::from_secs(10)).await?.code(),
            Some(7)
        );

        let (_root, deaf) = shell("trap '' TERM; echo ready; while :; do sleep 0.01; done")?;
        logged(&deaf, "ready").await;
        let refused = deaf
            .terminate(Duration::from_millis(50))
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("still runs"), "{refused}");
        assert_eq!(deaf.exited()?, None);
        Ok(())
    }
}
