//! kubectl as a client of ours, and the kubeconfigs that it and others need.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::certificates::{self, Identity};

/// A kubectl program that talks to one cluster.
#[derive(Clone, Debug)]
pub(crate) struct Kubectl {
    pub program: PathBuf,
    pub kubeconfig: PathBuf,
}

impl Kubectl {
    /// Runs it with `arguments` and returns what it printed.
    ///
    /// # Cancel safety
    /// Dropping the future kills it.
    pub async fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_with(arguments, "").await
    }

    /// The same, with `input` for its `-f -`.
    pub async fn run_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = Command::new(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("failed to run {}", self.program.display()))?;
        let mut stdin = child.stdin.take().expect("it was asked for");
        // One that reads nothing has ended already, and says why below.
        let _ = stdin.write_all(input.as_bytes()).await;
        drop(stdin);
        let output = child.wait_with_output().await?;
        if !output.status.success() {
            bail!(
                "kubectl {} failed: {}",
                arguments.join(" "),
                String::from_utf8_lossy(&output.stderr).trim_end()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The URL of the API server in the kubeconfig, and the certificate of its authority (empty if it names none).
    pub async fn server(&self) -> Result<(String, Vec<u8>)> {
        let view = [
            "config",
            "view",
            "--minify",
            "--flatten",
            "--raw",
            "--output=json",
        ];
        let config: Value = serde_json::from_str(&self.run(&view).await?)?;
        let cluster = &config["clusters"][0]["cluster"];
        let url = cluster["server"].as_str();
        let url = url.with_context(|| format!("{} names no cluster", self.kubeconfig.display()))?;
        let authority = cluster["certificate-authority-data"].as_str();
        Ok((
            url.to_owned(),
            BASE64_STANDARD.decode(authority.unwrap_or_default())?,
        ))
    }
}

/// Writes a kubeconfig (JSON is YAML too) that holds all it needs, readable by its owner alone.
pub(crate) fn write_kubeconfig(
    path: &Path,
    server: &str,
    authority: &Path,
    identity: &Identity,
) -> Result<()> {
    let data = |file: &Path| -> Result<String> {
        let pem =
            std::fs::read(file).with_context(|| format!("failed to read {}", file.display()))?;
        Ok(BASE64_STANDARD.encode(pem))
    };
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "test", "cluster": { "server": server, "certificate-authority-data": data(authority)? } }],
        "users": [{ "name": "test", "user": {
            "client-certificate-data": data(&identity.certificate)?,
            "client-key-data": data(&identity.key)?,
        } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
        "current-context": "test",
    });
    certificates::write_private(path, &config.to_string())
}
