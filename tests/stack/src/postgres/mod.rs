//! PostgreSQL: how it is run and asked.

mod identity;
mod shared_memory;
mod template;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{binaries, snapshot, spawner};

/// The superuser.
pub(crate) const USER: &str = "birb";
/// Its password.
pub(crate) const PASSWORD: &str = "birb";
/// The database that every new data directory has.
pub(crate) const DATABASE: &str = "birb_nest";

/// The data directory is `dir`/data, made on first use from a template.
pub(crate) fn command(port: u16, dir: &Path) -> Result<Command> {
    let (bin_dir, version) = binaries::postgres_bin_dir()?;
    let data = dir.join("data");
    if data.exists() {
        clean_up(dir)?;
    } else {
        let unfinished = dir.join("data.unfinished");
        snapshot::remove(&unfinished)?;
        snapshot::copy(&template::data_directory(&bin_dir, &version)?, &unfinished)?;
        fs::rename(&unfinished, &data)?;
    }
    let settings = [
        format!("port={port}"),
        "listen_addresses=127.0.0.1".into(),
        "unix_socket_directories=".into(),
        "max_connections=200".into(),
        "shared_buffers=128MB".into(),
        // Durability is tested; these are the defaults, said aloud.
        "fsync=on".into(),
        "synchronous_commit=on".into(),
        // In the data directory, so that a killed server leaves nothing in /dev/shm.
        "dynamic_shared_memory_type=mmap".into(),
        "timezone=UTC".into(),
        "log_timezone=UTC".into(),
    ];
    let mut command = spawner::tethered(&bin_dir.join("postgres"), &identity::privileges()?)?;
    command.arg("-D").arg(&data).current_dir(&data);
    for setting in settings {
        command.args(["-c", &setting]);
    }
    Ok(command)
}

/// Removes what a killed server left behind: its memory segment and its lock on the data directory. It must not run.
pub(crate) fn clean_up(dir: &Path) -> Result<()> {
    let lock = dir.join("data/postmaster.pid");
    if let Ok(text) = fs::read_to_string(&lock) {
        shared_memory::release(&text)?;
        fs::remove_file(&lock).with_context(|| format!("failed to remove {}", lock.display()))?;
    }
    Ok(())
}

/// PostgreSQL accepts connections: it answers a startup message with a request to authenticate.
pub(crate) fn answers(port: u16) -> Result<()> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let parameters = format!("user\0{USER}\0database\0{DATABASE}\0\0");
    let length = u32::try_from(8 + parameters.len())?;
    let mut message = length.to_be_bytes().to_vec();
    message.extend(196_608_u32.to_be_bytes()); // Protocol version 3.0.
    message.extend(parameters.as_bytes());
    stream.write_all(&message)?;
    let mut kind = [0];
    stream
        .read_exact(&mut kind)
        .context("PostgreSQL sent no reply")?;
    if kind != *b"R" {
        let mut error = String::new();
        // The text is for the reader only; without it the kind has to do.
        let _ = stream.read_to_string(&mut error);
        bail!("PostgreSQL answered {:?} {error:?}", char::from(kind[0]));
    }
    // A connection that is closed in good order leaves no line in the log, and no backend.
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Runs `sql` through psql as one transaction per statement; returns rows as lines, columns separated by `|`.
pub(crate) fn psql(port: u16, database: &str, sql: &str) -> Result<String> {
    let (bin_dir, _) = binaries::postgres_bin_dir()?;
    // Distributions may package the client apart from the server.
    let psql = Some(bin_dir.join("psql"))
        .filter(|psql| psql.is_file())
        .or_else(|| binaries::in_path("psql"));
    let psql = psql.context("psql not found: install the PostgreSQL client")?;
    let output = Command::new(psql)
        .args([
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
            "-h",
            "127.0.0.1",
            "-U",
            USER,
            "-d",
            database,
        ])
        .args(["-p", &port.to_string(), "-c", sql])
        .env("PGPASSWORD", PASSWORD)
        .env("PGCONNECT_TIMEOUT", "10")
        .output()
        .context("failed to run psql")?;
    if !output.status.success() {
        bail!(
            "psql on {database} failed for `{sql}`: {}",
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}
