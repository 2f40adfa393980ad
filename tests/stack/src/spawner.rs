//! Starts child processes that die with us.
//!
//! `setpriv --pdeathsig KILL` asks the kernel to kill the child when the *thread* that forked it ends. A test's thread or a
//! tokio worker ends long before the process does, so one thread that lives as long as the process forks everything.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{LazyLock, OnceLock};
use std::thread;

use crate::binaries;

type Request = (Command, SyncSender<io::Result<Child>>);

static SPAWNER: OnceLock<Sender<Request>> = OnceLock::new();
static SETPRIV: LazyLock<Option<PathBuf>> = LazyLock::new(|| binaries::in_path("setpriv"));

/// A command for `program` whose process is killed when this one dies, if util-linux' `setpriv` is installed; `privileges`
/// are further arguments for `setpriv`, such as `--reuid`.
///
/// # Errors
/// `setpriv` is missing and `privileges` were asked for.
pub fn tethered(program: &Path, privileges: &[String]) -> io::Result<Command> {
    let Some(setpriv) = SETPRIV.as_ref() else {
        if privileges.is_empty() {
            return Ok(Command::new(program));
        }
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "setpriv not found: install util-linux, or run as another user than root",
        ));
    };
    let mut command = Command::new(setpriv);
    command
        .args(["--pdeathsig", "KILL"])
        .args(privileges)
        .arg("--")
        .arg(program);
    Ok(command)
}

/// Forks `command` from the long-lived thread.
pub(crate) fn spawn(command: Command) -> io::Result<Child> {
    let (reply, child) = sync_channel(1);
    SPAWNER
        .get_or_init(start)
        .send((command, reply))
        .expect("the spawner thread never ends");
    child
        .recv()
        .expect("the spawner thread answers every request")
}

fn start() -> Sender<Request> {
    let (sender, requests) = channel::<Request>();
    thread::Builder::new()
        .name("spawner".into())
        .spawn(move || {
            for (mut command, reply) in requests {
                // A caller that is gone drops the child's handle; nothing else is to be done about it.
                let _ = reply.send(command.spawn());
            }
        })
        .expect("a thread can be started");
    sender
}
