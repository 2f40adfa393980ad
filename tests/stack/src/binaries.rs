//! Finds the servers' programs, and refuses versions that are too old.

use std::cmp::Reverse;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Older ones lack functions that the data plane uses.
const REDIS_AT_LEAST: [u32; 3] = [7, 0, 0];
/// Older ones lose or mis-order messages in ways listed in the architecture document.
const NATS_AT_LEAST: [u32; 3] = [2, 12, 5];
const POSTGRES_AT_LEAST: [u32; 3] = [15, 0, 0];

/// `redis-server`: `REDIS_SERVER`, else on the PATH.
pub(crate) fn redis_server() -> Result<PathBuf> {
    let found = named_by("REDIS_SERVER").or_else(|| in_path("redis-server"));
    let program = found.context(
        "redis-server not found: install Redis 7 or newer, or set REDIS_SERVER to its path",
    )?;
    require("Redis", &program, REDIS_AT_LEAST)?;
    Ok(program)
}

/// `nats-server`: `NATS_SERVER`, else on the PATH, in `~/go/bin`, in `.dev/bin` of the repository.
pub(crate) fn nats_server() -> Result<PathBuf> {
    let home = env::var_os("HOME").map(|home| Path::new(&home).join("go/bin/nats-server"));
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.dev/bin/nats-server");
    let found = named_by("NATS_SERVER")
        .or_else(|| in_path("nats-server"))
        .or_else(|| {
            home.into_iter()
                .chain([repository])
                .find(|path| path.is_file())
        });
    let program =
        found.context("nats-server not found: run `make init`, or set NATS_SERVER to its path")?;
    require("NATS", &program, NATS_AT_LEAST)?;
    Ok(program)
}

/// The directory of `postgres`, `initdb` and `psql`, and the version: `POSTGRES_BIN_DIR`, else where `postgres` on the PATH
/// really is (it may be a link to one of them), else the newest below `/usr/lib/postgresql`.
pub(crate) fn postgres_bin_dir() -> Result<(PathBuf, String)> {
    let on_path = || {
        Some(
            in_path("postgres")?
                .canonicalize()
                .ok()?
                .parent()?
                .to_owned(),
        )
    };
    let found = named_by("POSTGRES_BIN_DIR")
        .or_else(|| on_path().filter(|dir| dir.join("initdb").is_file()))
        .or_else(newest_debian_postgres);
    let dir = found.context(
        "PostgreSQL not found: install PostgreSQL 15 or newer, or set POSTGRES_BIN_DIR to the directory of `postgres`",
    )?;
    let version = require("PostgreSQL", &dir.join("postgres"), POSTGRES_AT_LEAST)?;
    Ok((dir, version))
}

/// The first executable of that name on the PATH.
pub(crate) fn in_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|program| program.is_file())
}

fn named_by(variable: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

fn newest_debian_postgres() -> Option<PathBuf> {
    let installed = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let mut versions: Vec<u32> = installed
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    versions.sort_by_key(|version| Reverse(*version));
    let dirs = versions
        .iter()
        .map(|version| PathBuf::from(format!("/usr/lib/postgresql/{version}/bin")));
    dirs.into_iter().find(|dir| dir.join("postgres").is_file())
}

/// Asks `program --version`; returns the version as printed, such as `7.0.15`.
fn require(product: &str, program: &Path, at_least: [u32; 3]) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("failed to run {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (version, numbers) = version_in(&text).with_context(|| {
        format!(
            "{} --version printed no version but {text:?}",
            program.display()
        )
    })?;
    if numbers < at_least {
        let [major, minor, patch] = at_least;
        bail!(
            "{product} {version} ({}) is too old: install {major}.{minor}.{patch} or newer",
            program.display()
        );
    }
    Ok(version)
}

/// The first word that is a version: `15.20`, `v2.15.2`, `v=7.0.15`.
fn version_in(text: &str) -> Option<(String, [u32; 3])> {
    text.split_whitespace().find_map(|word| {
        let version = word.trim_start_matches(['v', '=']);
        let mut numbers = version.split('.').map(|part| {
            let digits = part
                .find(|c: char| !c.is_ascii_digit())
                .unwrap_or(part.len());
            part[..digits].parse().ok()
        });
        let major = numbers.next()??;
        let mut next = || numbers.next().flatten().unwrap_or(0);
        Some((version.to_owned(), [major, next(), next()]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_each_server_prints_them() {
        let check =
            |text, expected| assert_eq!(version_in(text).map(|found| found.1), expected, "{text}");
        check(
            "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0",
            Some([7, 0, 15]),
        );
        check("nats-server: v2.15.2", Some([2, 15, 2]));
        check(
            "postgres (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)",
            Some([15, 20, 0]),
        );
        check("postgres (PostgreSQL) 18beta1", Some([18, 0, 0]));
        check("command not found", None);
    }
}
