//! What a cluster is made with, and its processes: on the host, or inside the node's namespaces.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use birb_nest_stack::{Process, tethered};

use crate::certificates::Certificates;
use crate::kubectl::Kubectl;
use crate::programs::Programs;

/// How often a condition is looked at again: an attempt may start a program of 140 MB.
const POLL: Duration = Duration::from_millis(100);

/// A machine that compiles beside it.
const LIMIT: Duration = Duration::from_secs(120);

/// One cluster. Dropped, its processes are killed, the first started first: a node's takes all of the node with it.
#[derive(Debug)]
pub(crate) struct Site {
    /// The directory that is the cluster's alone.
    pub root: PathBuf,
    pub programs: Programs,
    pub certificates: Certificates,
    /// As administrator, from the host.
    pub kubectl: Kubectl,
    /// The host's id of the node's first process; `None`: there is no node, all runs on the host.
    pub node: Option<u32>,
    running: Vec<(String, Process)>,
}

impl Site {
    pub fn new(
        root: &Path,
        programs: Programs,
        certificates: Certificates,
        kubectl: Kubectl,
    ) -> Self {
        Self {
            root: root.to_owned(),
            programs,
            certificates,
            kubectl,
            node: None,
            running: Vec::new(),
        }
    }

    /// A file of the cluster's.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Starts `program` inside the node if there is one, else on the host.
    pub fn start<A: AsRef<OsStr>>(
        &mut self,
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<()> {
        let Some(pid) = self.node else {
            return self.start_on_host(name, program, arguments);
        };
        let pid = pid.to_string();
        let enter = ["--target", &pid, "--net", "--pid", "--mount", "--"];
        let mut inside: Vec<OsString> = enter.map(Into::into).to_vec();
        inside.push(program.into());
        inside.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self.start_on_host(name, Path::new("nsenter"), inside)
    }

    /// Starts `program` on the host, whether there is a node or not.
    pub fn start_on_host<A: AsRef<OsStr>>(
        &mut self,
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<()> {
        let mut command = tethered(program, &[])?;
        command
            .args(arguments)
            .current_dir(&self.root)
            .env("PATH", search_path());
        let process = Process::spawn(name, command, &self.root, &self.log_file(name))?;
        self.running.push((name.to_owned(), process));
        Ok(())
    }

    /// What the process of that name wrote.
    pub fn log(&self, name: &str) -> Result<String> {
        let mut running = self.running.iter();
        let found = running.find(|(running, _)| running == name);
        found
            .with_context(|| format!("{name} was not started"))?
            .1
            .log()
    }

    /// Repeats `attempt` until it succeeds. Fails in the end, and at once when one of the processes has ended.
    pub async fn until<T>(&self, what: &str, attempt: impl AsyncFn() -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let error = match attempt().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            for (name, process) in &self.running {
                if let Some(status) = process.exited()? {
                    bail!(
                        "{name} ended by itself ({status}); its log ends with:\n{}",
                        process.last_lines(20)
                    );
                }
            }
            if Instant::now() >= deadline {
                return Err(error.context(format!(
                    "waited {LIMIT:?} in vain until {what}\n{}",
                    self.last_words()
                )));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Repeats kubectl until it succeeds, as [`Site::until`] does.
    pub async fn until_kubectl(&self, what: &str, arguments: &[&str]) -> Result<()> {
        self.until(what, async || self.kubectl.run(arguments).await.map(drop))
            .await
    }

    /// The end of every process' log, for messages.
    fn last_words(&self) -> String {
        let logs = self.running.iter().map(|(name, process)| {
            format!(
                "--- {} ends with:\n{}\n",
                self.log_file(name).display(),
                process.last_lines(8)
            )
        });
        logs.collect()
    }

    fn log_file(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }
}

/// PATH, and where Debian has what is root's: `su` and cron leave that out.
pub(crate) fn search_path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    path
}
