//! NATS with `JetStream`: its configuration, and a request that shows that `JetStream` answers.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{Port, binaries, spawner, wait::until};

/// How NATS is run. The default syncs every message to disk before it acknowledges it, and lets everyone in.
#[derive(Clone, Debug)]
pub struct NatsOptions {
    /// Sync every two minutes only (the server's own default): faster, and a machine crash loses acknowledged messages.
    pub relaxed_sync: bool,
    /// What all streams together may reserve (their `max_bytes`), in bytes.
    pub max_file_bytes: u64,
    /// User and password, without quotes.
    pub login: Option<(String, String)>,
    /// Port on which it tells over HTTP who is connected; of one that is alone.
    pub monitoring: Option<u16>,
}

/// A server's place among those that it replicates streams with.
#[derive(Clone, Debug)]
pub(crate) struct Cluster {
    /// 0 for the first.
    pub place: usize,
    /// Where each listens for the others.
    pub routes: Arc<[Port]>,
}

impl Default for NatsOptions {
    fn default() -> Self {
        Self {
            relaxed_sync: false,
            max_file_bytes: 16 << 30,
            login: None,
            monitoring: None,
        }
    }
}

/// Writes `nats.conf` in `dir`; the streams go to `dir`/data. Without a cluster it is alone.
pub(crate) fn command(
    options: &NatsOptions,
    cluster: Option<&Cluster>,
    port: u16,
    dir: &Path,
) -> Result<Command> {
    let data = dir.join("data");
    fs::create_dir_all(&data)?;
    let sync = if options.relaxed_sync {
        ""
    } else {
        "  sync_interval: always\n"
    };
    let mut config = format!(
        "host: 127.0.0.1\nport: {port}\nserver_name: birb-nest-{port}\nmax_payload: 4MB\n\
         jetstream {{\n  store_dir: \"{}\"\n  max_file_store: {}\n{sync}}}\n",
        data.display(),
        options.max_file_bytes
    );
    if let Some((user, password)) = &options.login {
        writeln!(
            config,
            "authorization {{ user: \"{user}\", password: \"{password}\" }}"
        )?;
    }
    if let Some(port) = options.monitoring {
        writeln!(config, "http: 127.0.0.1:{port}")?;
    }
    if let Some(cluster) = cluster {
        let routes: Vec<String> = cluster
            .routes
            .iter()
            .map(|port| format!("nats://127.0.0.1:{}", port.number()))
            .collect();
        writeln!(
            config,
            "cluster {{\n  name: birb-nest\n  listen: 127.0.0.1:{}\n  routes: [{}]\n}}",
            cluster.routes[cluster.place].number(),
            routes.join(", ")
        )?;
    }
    let file = dir.join("nats.conf");
    fs::write(&file, config)?;
    let mut command = spawner::tethered(&binaries::nats_server()?, &[])?;
    command.arg("--config").arg(file);
    Ok(command)
}

/// NATS accepts us, and `JetStream` answers a request for its account.
pub(crate) fn answers(options: &NatsOptions, port: u16) -> Result<()> {
    ask(options, port, "INFO", "").map(drop)
}

/// Blocks until `n_servers` have found each other and chosen who leads: a stream is made on all of them, and removed.
pub(crate) fn until_replicated(options: &NatsOptions, port: u16, n_servers: usize) -> Result<()> {
    let config = format!(
        r#"{{"name":"{TRIAL}","subjects":["{TRIAL}"],"storage":"memory","num_replicas":{n_servers}}}"#
    );
    let mut refusal = None;
    let waited = until("all NATS servers replicate", TRIAL_LIMIT, || {
        let made = ask(options, port, &format!("STREAM.CREATE.{TRIAL}"), &config);
        refusal = made.err();
        Ok(refusal.is_none())
    });
    match refusal {
        Some(refusal) => waited.context(refusal),
        None => ask(options, port, &format!("STREAM.DELETE.{TRIAL}"), "").map(drop),
    }
}

/// A stream that is there for a moment.
const TRIAL: &str = "birb-trial";
/// How long it may take to make it.
const TRIAL_LIMIT: Duration = Duration::from_secs(60);

/// What `JetStream` answers to a request; an error if it refuses, or says nothing within a second.
fn ask(options: &NatsOptions, port: u16, subject: &str, body: &str) -> Result<String> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let login = match &options.login {
        Some((user, password)) => format!(r#","user":"{user}","pass":"{password}""#),
        None => String::new(),
    };
    let request = format!(
        "CONNECT {{\"verbose\":false{login}}}\r\nSUB birb.ready 1\r\n\
         PUB $JS.API.{subject} birb.ready {}\r\n{body}\r\n",
        body.len()
    );
    (&stream).write_all(request.as_bytes())?;
    for line in BufReader::new(&stream).lines() {
        let line = line.context("NATS sent no reply")?;
        if line.starts_with("-ERR") {
            bail!("NATS answered {line:?}");
        }
        if line.contains("_response\"") {
            if line.contains("\"error\"") {
                bail!("JetStream answered {line}");
            }
            return Ok(line);
        }
    }
    bail!("NATS closed the connection")
}
