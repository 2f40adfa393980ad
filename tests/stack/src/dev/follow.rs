//! Prints what is added to log files, line by line with a prefix.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use tokio::time::sleep;

const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How far one file `NAME.log` has been printed.
pub(crate) struct Follower {
    name: String,
    path: PathBuf,
    offset: u64,
}

impl Follower {
    pub(crate) fn new(logs: &Path, name: String) -> Self {
        Self {
            path: logs.join(format!("{name}.log")),
            name,
            offset: 0,
        }
    }

    /// Prints the whole lines that are new; a file that is not there yet has none.
    fn print_new(&mut self) {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut text = Vec::new();
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.offset))?;
            file.read_to_end(&mut text)?;
            Ok(text)
        };
        let Ok(text) = read() else { return };
        let n_whole = text
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |last| last + 1);
        for line in String::from_utf8_lossy(&text[..n_whole]).lines() {
            println!("{:<6} | {line}", self.name);
        }
        self.offset += n_whole as u64;
    }
}

/// Prints new lines until it is dropped.
pub(crate) async fn forever(followers: &mut [Follower]) -> Result<()> {
    loop {
        drain(followers);
        sleep(LOOK_EVERY).await;
    }
}

/// Prints what is new now.
pub(crate) fn drain(followers: &mut [Follower]) {
    followers.iter_mut().for_each(Follower::print_new);
}
