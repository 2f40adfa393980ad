//! Just enough of the servers' protocols to see what they hold.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Sends one inline command to Redis and returns the reply, a value without its length.
pub fn redis(port: u16, command: &str) -> Result<String> {
    let mut connection = RedisConnection::open(port)?;
    connection.send(command)?;
    connection.reply()
}

/// A connection on which a reply may be awaited later than its command.
pub struct RedisConnection(BufReader<TcpStream>);

impl RedisConnection {
    pub fn open(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self(BufReader::new(stream)))
    }

    pub fn send(&mut self, command: &str) -> Result<()> {
        Ok(self
            .0
            .get_mut()
            .write_all(format!("{command}\r\n").as_bytes())?)
    }

    pub fn reply(&mut self) -> Result<String> {
        let mut line = self.line()?;
        if line.starts_with('$') && line != "$-1" {
            line = self.line()?;
        }
        Ok(line)
    }

    /// Whether nothing arrives for a short while.
    pub fn is_silent(&mut self) -> Result<bool> {
        self.0
            .get_ref()
            .set_read_timeout(Some(Duration::from_millis(100)))?;
        let silent = self
            .0
            .fill_buf()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        self.0
            .get_ref()
            .set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(silent)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            bail!("Redis closed the connection");
        }
        Ok(line.trim_end().to_owned())
    }
}

/// Sends one request to NATS and returns the answer's payload.
pub fn nats(port: u16, subject: &str, payload: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let n_bytes = payload.len();
    write!(
        stream,
        "CONNECT {{\"verbose\":false}}\r\nSUB test.reply 1\r\nPUB {subject} test.reply {n_bytes}\r\n{payload}\r\n"
    )?;
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next().transpose()? {
        if line.starts_with("MSG test.reply") {
            return lines
                .next()
                .context("the answer has no payload")?
                .map_err(Into::into);
        }
    }
    bail!("NATS closed the connection")
}

/// Waits until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
