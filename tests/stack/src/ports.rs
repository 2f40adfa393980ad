//! Ports that parallel test processes do not take from each other.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result, bail};
use rustix::process::getuid;

/// Below Linux's ephemeral range (32768-60999), so that no outgoing connection takes one.
const FIRST: u16 = 20_000;
const COUNT: u16 = 10_000;

/// A TCP port on 127.0.0.1, ours until dropped, whether or not something listens there.
#[derive(Debug)]
pub struct Port {
    number: u16,
    /// Locked (`flock`) for as long as the port is ours.
    _lock: Option<File>,
}

impl Port {
    /// Reserves a free port in 20000-29999: a lock file says no other stack has it, a bind says nothing else uses it.
    ///
    /// # Errors
    /// The lock files cannot be written, or all ports are taken.
    pub fn reserve() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("birb-nest-ports-{}", getuid().as_raw()));
        fs::create_dir_all(&dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let start = RandomState::new().build_hasher().finish() % u64::from(COUNT);
        let start = u16::try_from(start).expect("less than COUNT");
        for offset in 0..COUNT {
            let number = FIRST + (start + offset) % COUNT;
            let path = dir.join(number.to_string());
            let lock = File::create(&path)
                .with_context(|| format!("failed to create {}", path.display()))?;
            if lock.try_lock().is_ok() && is_free(number) {
                return Ok(Self {
                    number,
                    _lock: Some(lock),
                });
            }
        }
        bail!("no free port between {FIRST} and {}", FIRST + COUNT - 1)
    }

    /// The given port, whether it is free or not.
    pub fn at(number: u16) -> Self {
        Self {
            number,
            _lock: None,
        }
    }

    /// The same port, if it is free; `variable` is what the error tells the user to change.
    ///
    /// # Errors
    /// Something listens there already.
    pub fn require_free(self, variable: &str) -> Result<Self> {
        if !is_free(self.number) {
            bail!(
                "port {} on 127.0.0.1 is taken: set {variable} to a free one",
                self.number
            );
        }
        Ok(self)
    }

    /// 1..=65535.
    pub fn number(&self) -> u16 {
        self.number
    }
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}
