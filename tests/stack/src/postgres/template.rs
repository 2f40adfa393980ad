//! A data directory made once and copied ever after: `initdb` takes most of a second, a copy a fraction of it.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::{DATABASE, PASSWORD, USER, identity};
use crate::{snapshot, spawner};

const INITDB_ARGUMENTS: [&str; 6] = [
    "--username=birb",
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    "--locale=C",
    "--no-sync",
    "--no-instructions",
];

/// The template for this version and these options, made if missing. It is not to be changed.
pub(super) fn data_directory(bin_dir: &Path, version: &str) -> Result<PathBuf> {
    let privileges = identity::privileges()?;
    let mut options = DefaultHasher::new();
    (bin_dir, INITDB_ARGUMENTS, &privileges, DATABASE, PASSWORD).hash(&mut options);
    let cache = cache_directory();
    let template = cache.join(format!("postgres-{version}-{:016x}", options.finish()));
    if !template.exists() {
        make(&cache, &template, bin_dir, &privileges).with_context(|| {
            format!(
                "failed to prepare a PostgreSQL data directory in {}",
                cache.display()
            )
        })?;
    }
    Ok(template)
}

fn cache_directory() -> PathBuf {
    let set = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
    cache.unwrap_or_else(env::temp_dir).join("birb-nest")
}

/// Makes it beside its final place, then moves it there: processes that do this at once do not disturb each other.
fn make(cache: &Path, template: &Path, bin_dir: &Path, privileges: &[String]) -> Result<()> {
    let unfinished = cache.join(format!("unfinished-{}", std::process::id()));
    snapshot::remove(&unfinished)?;
    fs::create_dir_all(&unfinished)?;
    identity::give(&unfinished)?;
    let password = unfinished.join("password");
    fs::write(&password, PASSWORD)?;
    let data = unfinished.join("data");

    let mut initdb = spawner::tethered(&bin_dir.join("initdb"), privileges)?;
    initdb
        .arg("-D")
        .arg(&data)
        .args(INITDB_ARGUMENTS)
        .arg("--pwfile")
        .arg(&password);
    run(initdb, "")?;
    let mut single = spawner::tethered(&bin_dir.join("postgres"), privileges)?;
    single.args(["--single", "-D"]).arg(&data).arg("postgres");
    run(
        single,
        &format!("create database {DATABASE} owner {USER}\n"),
    )?;

    match fs::rename(&data, template) {
        Err(error) if !template.exists() => Err(error.into()),
        // Ours or that of a process which was faster.
        _ => snapshot::remove(&unfinished),
    }
}

fn run(mut command: Command, input: &str) -> Result<()> {
    command
        .current_dir("/")
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child
        .stdin
        .take()
        .expect("stdin is piped")
        .write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "{command:?} failed ({}): {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
