//! The System V memory segment that a killed PostgreSQL leaves behind.
//!
//! Linux keeps at most 4096 of them by default, so hundreds of killed servers would one day stop new ones from starting.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::identity;
use crate::spawner;

/// Removes the segment named in the text of a `postmaster.pid`, if it is still there and nothing is attached to it.
pub(super) fn release(postmaster_pid: &str) -> Result<()> {
    // Line 7 holds the key and the id, both as unsigned numbers.
    let Some((key, id)) = postmaster_pid
        .lines()
        .nth(6)
        .and_then(|line| line.trim().split_once(' '))
    else {
        return Ok(());
    };
    let (key, id): (u32, u32) = (key.parse()?, id.trim().parse()?);
    let table = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let orphaned = table.lines().skip(1).any(|line| {
        let columns: Vec<i64> = line
            .split_whitespace()
            .map_while(|column| column.parse().ok())
            .collect();
        // key, shmid, perms, size, cpid, lpid, nattch
        matches!(columns[..], [found_key, found_id, _, _, _, _, 0, ..]
            if found_key == i64::from(key.cast_signed()) && found_id == i64::from(id))
    });
    if orphaned {
        // Only its owner may remove it.
        let mut ipcrm = spawner::tethered(Path::new("ipcrm"), &identity::privileges()?)?;
        ipcrm.args(["--shmem-id", &id.to_string()]);
        let output = ipcrm.output().context("failed to run ipcrm")?;
        if !output.status.success() {
            bail!(
                "failed to remove memory segment {id}: {}",
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
    }
    Ok(())
}
