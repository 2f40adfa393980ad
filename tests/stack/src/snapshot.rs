//! Copies of a server's data directory.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A copy of one server's data directory, removed when dropped. It can be restored any number of times, to its
/// own server or to another one of that kind.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) path: PathBuf,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // It lies below the stack's root, which is removed in the end.
        let _ = remove(&self.path);
    }
}

/// Copies the directory `from`, with owners, to the new directory `to`; without copying blocks where the disk can do that.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .output()
        .context("failed to run cp")?;
    if !output.status.success() {
        bail!(
            "failed to copy {} to {}: {}",
            from.display(),
            to.display(),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(())
}

/// Removes a directory with all it holds; it may be missing.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}
