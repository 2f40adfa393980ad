//! Looks at processes through `/proc`, and stops, continues and kills whole trees of them.
//!
//! PostgreSQL's backends are sessions of their own, so a process group does not reach them; the tree of parents does.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// The variable that marks every child with the directory it works in.
pub(crate) const MARKER: &str = "BIRB_NEST_STACK_DIR";

/// A process that writes to a slow disk stops, or dies, only after the write.
const LIMIT: Duration = Duration::from_secs(10);

/// What `/proc/PID/stat` says first: the name of the program, the state letter, the parent.
struct Stat {
    name: String,
    state: char,
    parent: u32,
}

impl Stat {
    /// `None`: there is no such process.
    fn read(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (name, rest) = text.split_once('(')?.1.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        Some(Self {
            name: name.to_owned(),
            state: fields.next()?.chars().next()?,
            parent: fields.next()?.parse().ok()?,
        })
    }
}

/// Sends `signal`; a process that is gone already is fine.
pub(crate) fn send(pid: u32, signal: Signal) -> Result<()> {
    let target = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let target = target.with_context(|| format!("{pid} is no process id"))?;
    match kill_process(target, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => {
            Err(error).with_context(|| format!("failed to send {signal:?} to process {pid}"))
        }
    }
}

/// Stops `root` and all its descendants; returns them, `root` first. When it returns none of them runs.
pub(crate) fn stop_tree(root: u32) -> Result<Vec<u32>> {
    let mut stopped = Vec::new();
    loop {
        // A process that is stopped forks no more, so this ends.
        let found: Vec<u32> = tree(root)
            .into_iter()
            .filter(|pid| !stopped.contains(pid))
            .collect();
        if found.is_empty() {
            return Ok(stopped);
        }
        for pid in found {
            send(pid, Signal::STOP)?;
            wait::until(&format!("process {pid} stops"), LIMIT, || {
                Ok(Stat::read(pid).is_none_or(|stat| matches!(stat.state, 'T' | 't' | 'Z' | 'X')))
            })?;
            stopped.push(pid);
        }
    }
}

/// Lets `root` and all its descendants run again.
pub(crate) fn resume_tree(root: u32) -> Result<()> {
    tree(root)
        .into_iter()
        .try_for_each(|pid| send(pid, Signal::CONT))
}

/// Waits until none of `pids` runs any more (a zombie waits for its parent only).
pub(crate) fn wait_gone(pids: &[u32]) -> Result<()> {
    wait::until(&format!("processes {pids:?} are gone"), LIMIT, || {
        Ok(pids
            .iter()
            .all(|pid| Stat::read(*pid).is_none_or(|stat| matches!(stat.state, 'Z' | 'X'))))
    })
}

/// Kills what an earlier, crashed run left behind in `dir`, and waits until it is gone.
///
/// Those are processes that carry our marker with `dir` or a directory below it, and PostgreSQL's backends, which
/// overwrite their environment but work in the data directory. Root needs `CAP_SYS_PTRACE` to see those of PostgreSQL, which
/// plain containers lack; there only a backend that was paused while we were killed stays behind.
pub(crate) fn kill_leftovers(dir: &Path) -> Result<()> {
    let leftovers = || -> Vec<u32> {
        pids()
            .into_iter()
            .filter(|pid| works_in(*pid, dir))
            .collect()
    };
    wait::until(
        &format!("left-over processes in {} are gone", dir.display()),
        LIMIT,
        || {
            let found = leftovers();
            found.iter().try_for_each(|pid| send(*pid, Signal::KILL))?;
            Ok(found.is_empty())
        },
    )
}

fn works_in(pid: u32, dir: &Path) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let marked = environment
        .split(|byte| *byte == 0)
        .filter_map(|variable| variable.strip_prefix(MARKER.as_bytes())?.strip_prefix(b"="))
        .any(|value| Path::new(OsStr::from_bytes(value)).starts_with(dir));
    let backend = || {
        Stat::read(pid).is_some_and(|stat| stat.name == "postgres")
            && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
    };
    marked || backend()
}

/// `root` and its descendants, parents before children.
fn tree(root: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in pids() {
        if let Some(stat) = Stat::read(pid) {
            children.entry(stat.parent).or_default().push(pid);
        }
    }
    let mut tree = vec![root];
    let mut next = 0;
    while let Some(pid) = tree.get(next) {
        tree.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    tree
}

fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
