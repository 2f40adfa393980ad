//! The control groups that a cluster's pods run in: the one thing of a node that its first process does not take with it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use birb_nest_stack::until;

const MOUNT: &str = "/sys/fs/cgroup";

/// The kernel still ends a killed container's processes.
const LIMIT: Duration = Duration::from_secs(30);

/// The name of the group of the cluster in `root`, as unique as that path.
pub(crate) fn name(root: &Path) -> String {
    format!("birb-nest{}", root.display().to_string().replace('/', "-"))
}

/// Makes the group in every hierarchy.
pub(crate) fn make(root: &Path) -> Result<()> {
    for group in groups(root) {
        fs::create_dir_all(&group)
            .with_context(|| format!("failed to create {}", group.display()))?;
    }
    Ok(())
}

/// Removes it with all groups inside; nothing may run in them any more.
pub(crate) fn remove(root: &Path) -> Result<()> {
    groups(root).iter().try_for_each(|group| remove_tree(group))
}

/// Control groups v2 are one hierarchy; v1 are one for each controller.
fn groups(root: &Path) -> Vec<PathBuf> {
    let mount = Path::new(MOUNT);
    let name = name(root);
    if mount.join("cgroup.procs").is_file() {
        return vec![mount.join(name)];
    }
    let hierarchies = fs::read_dir(mount).into_iter().flatten().flatten();
    hierarchies
        .map(|hierarchy| hierarchy.path())
        .filter(|hierarchy| !hierarchy.is_symlink() && hierarchy.join("cgroup.procs").is_file())
        .map(|hierarchy| hierarchy.join(&name))
        .collect()
}

fn remove_tree(group: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(group) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    until(
        &format!("{} is empty", group.display()),
        LIMIT,
        || match fs::remove_dir(group) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
            Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("failed to remove {}", group.display()))
            }
        },
    )
}
