//! The operator as a process of this machine, with the rights of its ServiceAccount and no others.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use birb_nest_cluster::Cluster;
use birb_nest_stack::{Port, Process, tethered, wait_http_ok, wrong_clock};
use serde_json::json;

use crate::{Installation, PATIENCE, Proxy, requests_with};

/// A running operator. Dropped, it is killed.
pub struct Operator {
    /// Its process.
    pub process: Process,
    /// Its admin port.
    pub url: String,
    _port: Port,
}

impl Operator {
    /// Starts one called `name`, whose files are in `dir`, and waits until it is ready: it leads, or stands by. Windows are
    /// seconds where production has minutes.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start(
        cluster: &Cluster,
        installation: &Installation,
        dir: &Path,
        name: &str,
    ) -> Result<Self> {
        Self::start_with(cluster, installation, dir, name, &[]).await
    }

    /// [`Operator::start`] with further flags.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start_with(
        cluster: &Cluster,
        installation: &Installation,
        dir: &Path,
        name: &str,
        flags: &[&str],
    ) -> Result<Self> {
        let operator = Self::spawn(cluster, installation, dir, name, flags).await?;
        operator.until_ready(name).await
    }

    /// [`Operator::start_with`], through `proxy`.
    ///
    /// # Errors
    /// It does not start.
    pub async fn start_through(
        proxy: &Proxy,
        cluster: &Cluster,
        installation: &Installation,
        dir: &Path,
        name: &str,
        flags: &[&str],
    ) -> Result<Self> {
        let kubeconfig = kubeconfig(cluster, &proxy.url, installation, dir, name).await?;
        let operator = Self::run(&kubeconfig, installation, dir, name, flags, &[])?;
        operator.until_ready(name).await
    }

    /// [`Operator::start_with`] with a wall clock that is wrong by `offset`, like `+1h`.
    ///
    /// # Errors
    /// libfaketime is not installed, or it does not start.
    pub async fn start_wrong(
        offset: &str,
        cluster: &Cluster,
        installation: &Installation,
        dir: &Path,
        name: &str,
        flags: &[&str],
    ) -> Result<Self> {
        let server = cluster.server_url();
        let kubeconfig = kubeconfig(cluster, server, installation, dir, name).await?;
        let clock = wrong_clock(offset)?;
        let operator = Self::run(&kubeconfig, installation, dir, name, flags, &clock)?;
        operator.until_ready(name).await
    }

    async fn until_ready(self, name: &str) -> Result<Self> {
        wait_http_ok(&format!("{}/readyz", self.url), PATIENCE)
            .await
            .with_context(|| format!("{name} is not ready"))?;
        Ok(self)
    }

    /// [`Operator::start_with`] without waiting for anything.
    ///
    /// # Errors
    /// It does not start.
    pub async fn spawn(
        cluster: &Cluster,
        installation: &Installation,
        dir: &Path,
        name: &str,
        flags: &[&str],
    ) -> Result<Self> {
        let server = cluster.server_url();
        let kubeconfig = kubeconfig(cluster, server, installation, dir, name).await?;
        Self::run(&kubeconfig, installation, dir, name, flags, &[])
    }

    fn run(
        kubeconfig: &Path,
        installation: &Installation,
        dir: &Path,
        name: &str,
        flags: &[&str],
        variables: &[(&str, String)],
    ) -> Result<Self> {
        let port = Port::reserve()?;
        let url = format!("http://127.0.0.1:{}", port.number());
        let mut command = tethered(&binary()?, &[])?;
        command.env_clear().env("KUBECONFIG", kubeconfig).args([
            "--admin-host=127.0.0.1",
            &format!("--admin-port={}", port.number()),
            &format!("--lease-namespace={}", installation.namespace),
            &format!("--lease-name={}", installation.name),
            &format!("--lease-holder={name}"),
        ]);
        let said = |default: &&str| {
            let name = default.split('=').next();
            flags.iter().any(|flag| flag.split('=').next() == name)
        };
        command.args(DEFAULTS.iter().filter(|default| !said(default)));
        command.args(flags);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        let process = Process::spawn(name, command, dir, &dir.join(format!("{name}.log")))?;
        Ok(Self {
            process,
            url,
            _port: port,
        })
    }

    /// Whether operators are those of a release, and not of a debug build.
    pub fn is_optimised() -> bool {
        std::env::var_os(OPTIMISED).is_some()
    }

    /// A value of its metrics.
    ///
    /// # Errors
    /// It does not answer, or has no such line.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let text = reqwest::get(format!("{}/metrics", self.url))
            .await?
            .text()
            .await?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("no {name}"))?;
        Ok(line.trim().parse()?)
    }
}

/// Names a release of the operator, to be run in place of the debug build.
const OPTIMISED: &str = "BIRBNEST_TEST_OPERATOR";

/// Flags, unless a test says otherwise.
const DEFAULTS: [&str; 5] = [
    "--resync=5m",
    "--retry=1s",
    "--setup-retry=1s",
    "--upgrade-pause=1s",
    "--log-level=info,birb_nest_operator=debug",
];

/// The one that `BIRBNEST_TEST_OPERATOR` names, or the one that cargo built beside this test.
fn binary() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(OPTIMISED) {
        return Ok(named.into());
    }
    let test = std::env::current_exe()?;
    let built = test
        .ancestors()
        .nth(2)
        .context("tests lie in target/debug/deps")?;
    let binary = built.join("birb-nest-operator");
    ensure!(
        binary.is_file(),
        "{} is missing: cargo build --workspace",
        binary.display()
    );
    Ok(binary)
}

async fn kubeconfig(
    cluster: &Cluster,
    server: &str,
    installation: &Installation,
    dir: &Path,
    name: &str,
) -> Result<PathBuf> {
    let namespace = format!("--namespace={}", installation.namespace);
    let token = cluster
        .kubectl(
            &[
                "create",
                "token",
                &installation.name,
                &namespace,
                "--duration=2h",
            ],
            "",
        )
        .await?;
    let authority = dir.join("ca.crt");
    fs::write(&authority, cluster.ca_certificate())?;
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "it", "cluster": { "server": server, "certificate-authority": authority } }],
        "users": [{ "name": "operator", "user": { "token": token.trim() } }],
        "contexts": [{ "name": "it", "context": { "cluster": "it", "user": "operator" } }],
        "current-context": "it",
    });
    let path = dir.join(format!("{name}.kubeconfig.json"));
    fs::write(&path, config.to_string())?;
    Ok(path)
}

/// Requests of the operator that it has no right to; none where the audit log is not known.
///
/// # Errors
/// The log cannot be read.
pub fn forbidden(cluster: &Cluster, installation: &Installation) -> Result<BTreeSet<String>> {
    let requests = requests_with(cluster, installation, "\"forbid\"")?.into_iter();
    Ok(requests
        .filter(|request| request.is_forbidden)
        .map(|request| format!("{} {}", request.verb, request.uri))
        .collect())
}

/// What every test of an operator ends with: it asked for nothing that it has no right to.
///
/// # Errors
/// It did, or the log cannot be read.
pub fn nothing_forbidden(cluster: &Cluster, installation: &Installation) -> Result<()> {
    let forbidden = forbidden(cluster, installation)?;
    ensure!(
        forbidden.is_empty(),
        "the operator lacks rights: {forbidden:#?}"
    );
    Ok(())
}
