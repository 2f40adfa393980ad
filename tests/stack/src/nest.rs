//! The program under test, and its roles.

use std::env;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// What a `birb-nest` process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs migrations and makes the streams, then ends.
    Setup,
    /// Serves HTTP.
    Api,
    /// Writes the log to PostgreSQL.
    Worker,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Setup => "setup",
            Self::Api => "api",
            Self::Worker => "worker",
        })
    }
}

/// Finds `birb-nest`: `BIRB_NEST_BIN`, else where cargo put the program that is running now.
///
/// # Errors
/// It is not there.
pub fn nest_binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("BIRB_NEST_BIN")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
    {
        if !path.is_file() {
            bail!("BIRB_NEST_BIN names {}, which is no file", path.display());
        }
        return Ok(path);
    }
    let here = env::current_exe().context("failed to find the running program")?;
    // target/debug/birb-nest-stack, or target/debug/deps/some_test-0123456789abcdef
    let found = here
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join("birb-nest"))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("birb-nest not found near {}: run `cargo build --workspace`, or set BIRB_NEST_BIN to its path", here.display())
    })
}
