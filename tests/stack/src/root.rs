//! The directory that a stack, or a cluster, lives in.
//!
//! A temporary root is `TMP/birb-nest-KIND-UID/NAME` with a locked file `NAME.lock` beside it. The kernel unlocks the
//! file when its owner dies, however it dies; whoever starts next and gets the lock removes what is left.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail};
use rustix::process::getuid;

use crate::{proc_fs, snapshot};

static N_ROOTS: AtomicU64 = AtomicU64::new(0);

/// Removes what processes that were killed left outside the directory; none of them runs when it is called. It is called
/// again where it was interrupted.
pub type CleanUp = fn(&Path) -> Result<()>;

/// A directory that is ours alone for as long as this lives.
#[derive(Debug)]
pub struct Root {
    path: PathBuf,
    clean_up: CleanUp,
    /// Removed with the directory, if that is temporary.
    lock_path: Option<PathBuf>,
    /// Locked (`flock`) for as long as the directory is ours.
    _lock: File,
}

impl Root {
    /// A new directory, removed when dropped; removes those of the same `kind` that dead processes left first.
    ///
    /// # Errors
    /// The directory cannot be made, or what is left over cannot be removed.
    pub fn temporary(kind: &str, clean_up: CleanUp) -> Result<Self> {
        let base = std::env::temp_dir().join(format!("birb-nest-{kind}-{}", getuid().as_raw()));
        let make = || -> Result<Self> {
            fs::create_dir_all(&base)?;
            // As `/proc` will name it.
            let base = base.canonicalize()?;
            remove_stale(&base, clean_up)?;
            loop {
                let name = format!(
                    "{}-{}",
                    process::id(),
                    N_ROOTS.fetch_add(1, Ordering::Relaxed)
                );
                let lock_path = base.join(name.clone() + ".lock");
                let lock = File::create(&lock_path)?;
                // Someone who removes stale directories may have been faster: then the next name.
                if lock.try_lock().is_ok() && lock_path.exists() {
                    let path = base.join(name);
                    fs::create_dir(&path)?;
                    return Ok(Self {
                        path,
                        clean_up,
                        lock_path: Some(lock_path),
                        _lock: lock,
                    });
                }
            }
        };
        make()
            .with_context(|| format!("failed to make a temporary directory in {}", base.display()))
    }

    /// The given directory, made if missing and kept when dropped; kills what a crashed run left behind in it.
    ///
    /// # Errors
    /// Another process has it, or it cannot be made.
    pub fn kept(path: &Path, clean_up: CleanUp) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("failed to create {}", path.display()))?;
        let path = path.canonicalize()?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path)
            .with_context(|| format!("failed to create {}", lock_path.display()))?;
        if lock.try_lock().is_err() {
            bail!(
                "something is already running in {}: stop it first, or choose another directory",
                path.display()
            );
        }
        proc_fs::kill_leftovers(&path)?;
        clean_up(&path)?;
        Ok(Self {
            path,
            clean_up,
            lock_path: None,
            _lock: lock,
        })
    }

    /// The directory, as `/proc` names it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // What cannot be removed now is stale for the next one.
        let cleaned = (self.clean_up)(&self.path);
        if let (Ok(()), Some(lock_path)) = (cleaned, &self.lock_path) {
            let _ = remove(&self.path, lock_path);
        }
    }
}

/// Removes the directories in `base` that nobody holds the lock of.
fn remove_stale(base: &Path, clean_up: CleanUp) -> Result<()> {
    for entry in fs::read_dir(base)? {
        let lock_path = entry?.path();
        if lock_path
            .extension()
            .is_none_or(|extension| extension != "lock")
        {
            continue;
        }
        // It may have been removed by another one in the meantime.
        let Ok(lock) = File::open(&lock_path) else {
            continue;
        };
        if lock.try_lock().is_ok() {
            let path = lock_path.with_extension("");
            proc_fs::kill_leftovers(&path)?;
            clean_up(&path)?;
            remove(&path, &lock_path)?;
        }
    }
    Ok(())
}

fn remove(path: &Path, lock_path: &Path) -> Result<()> {
    snapshot::remove(path)?;
    match fs::remove_file(lock_path) {
        // Another one that cleans up had opened the lock before we removed it, or we had before it did.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => Ok(removed?),
    }
}
