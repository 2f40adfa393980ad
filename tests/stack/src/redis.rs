//! Redis: its configuration, and the few words of its protocol needed to know that it answers.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{binaries, spawner};

/// How many databases there are; one each for [`crate::Stack::isolated`], and number 0.
pub(crate) const DATABASES: u32 = 512;

/// How Redis is run. The default keeps nothing on disk and needs no password.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// Write a snapshot a second after a change and when stopped; a start loads it.
    pub snapshots: bool,
    /// Evict the least frequently used keys (`allkeys-lfu`) above this many bytes.
    pub maxmemory_bytes: Option<u64>,
    /// Without whitespace and quotes.
    pub password: Option<String>,
}

/// Writes `redis.conf` in `dir`; the data goes to `dir`/data.
pub(crate) fn command(options: &RedisOptions, port: u16, dir: &Path) -> Result<Command> {
    let data = dir.join("data");
    fs::create_dir_all(&data)?;
    let mut config = format!(
        "bind 127.0.0.1\nport {port}\ndir \"{}\"\ndatabases {DATABASES}\nappendonly no\n",
        data.display()
    );
    config += if options.snapshots {
        "save 1 1\n"
    } else {
        "save \"\"\n"
    };
    if let Some(bytes) = options.maxmemory_bytes {
        write!(config, "maxmemory {bytes}\nmaxmemory-policy allkeys-lfu\n")?;
    }
    if let Some(password) = &options.password {
        writeln!(config, "requirepass \"{password}\"")?;
    }
    let file = dir.join("redis.conf");
    fs::write(&file, config)?;
    let mut command = spawner::tethered(&binaries::redis_server()?, &[])?;
    command.arg(file);
    Ok(command)
}

/// Redis has loaded its data and answers PING.
pub(crate) fn answers(options: &RedisOptions, port: u16) -> Result<()> {
    call(options, port, "PING", Duration::from_secs(1))
}

/// Redis has written its data to `dump.rdb`.
///
/// While it writes by itself it refuses to do so on request (`Background save already in progress`); the file that it is
/// writing is older than the request.
pub(crate) fn save(options: &RedisOptions, port: u16) -> Result<()> {
    let limit = Duration::from_secs(60);
    let deadline = Instant::now() + limit;
    loop {
        match call(options, port, "SAVE", limit) {
            Err(error) if error.to_string().contains("in progress") => {
                if Instant::now() > deadline {
                    return Err(error);
                }
                thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

/// A command without arguments, whose answer is a status line.
fn call(options: &RedisOptions, port: u16, command: &str, limit: Duration) -> Result<()> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(limit))?;
    let mut replies = BufReader::new(&stream);
    let login = options
        .password
        .as_ref()
        .map(|password| format!("AUTH {password}"));
    for line in login.as_deref().into_iter().chain([command]) {
        (&stream).write_all(format!("{line}\r\n").as_bytes())?;
        let mut reply = String::new();
        replies
            .read_line(&mut reply)
            .context("Redis sent no reply")?;
        if !reply.starts_with('+') {
            bail!("Redis answered {:?}", reply.trim_end());
        }
    }
    Ok(())
}
