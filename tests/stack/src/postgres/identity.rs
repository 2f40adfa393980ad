//! Who PostgreSQL runs as: it refuses to be root.
//!
//! As root we run it as `postgres` (else `nobody`), with one capability added: to pass directories that this user may not
//! enter. A clone below /root (mode 0700) thus works like any other place. `setpriv` can do that in a plain container too,
//! where user namespaces are not to be had.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::process::geteuid;

/// Arguments for `setpriv`; none if we are not root.
pub(super) fn privileges() -> Result<Vec<String>> {
    let Some((uid, gid)) = other_user()? else {
        return Ok(Vec::new());
    };
    Ok(vec![
        format!("--reuid={uid}"),
        format!("--regid={gid}"),
        "--clear-groups".into(),
        "--inh-caps=-all,+dac_override".into(),
        "--ambient-caps=-all,+dac_override".into(),
    ])
}

/// Gives the directory to the user that PostgreSQL runs as.
pub(super) fn give(dir: &Path) -> Result<()> {
    if let Some((uid, gid)) = other_user()? {
        chown(dir, Some(uid), Some(gid))
            .with_context(|| format!("failed to give {} to user {uid}", dir.display()))?;
    }
    Ok(())
}

/// User and group for PostgreSQL; `None`: our own.
fn other_user() -> Result<Option<(u32, u32)>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let users = fs::read_to_string("/etc/passwd").context("failed to read /etc/passwd")?;
    let find = |name: &str| {
        let mut fields = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?
            .split(':')
            .skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    let found = find("postgres").or_else(|| find("nobody"));
    found.map(Some).context(
        "PostgreSQL refuses to run as root, and neither `postgres` nor `nobody` is in /etc/passwd",
    )
}
