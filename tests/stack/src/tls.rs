//! Servers that speak TLS, with certificates by an authority of our own.

use std::{
    fs::Permissions,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::PathBuf,
    time::Duration,
};

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use crate::{Process, Stack, blocking, postgres::psql, tethered, until};

/// How long a server may take to be ready.
const PATIENCE: Duration = Duration::from_secs(30);

/// An authority, the last certificate by it, and the servers that show it.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new one, with its certificate as `ca.pem` in `dir`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn new(dir: PathBuf) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "authority");
        std::fs::write(dir.join("ca.pem"), params.self_signed(&key)?.pem())?;
        Ok(Self {
            dir,
            issuer: Issuer::new(params, key),
        })
    }

    /// Where the file of that name is.
    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Writes `cert.pem` and `key.pem` for a host name or an IP address, a new pair each time.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn issue(&self, host: &str) -> Result<()> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![host.to_owned()])?;
        // Whoever has the name of its issuer passes for self-signed.
        params.distinguished_name.push(DnType::CommonName, host);
        let certificate = params.signed_by(&key, &self.issuer)?;
        std::fs::write(self.dir.join("cert.pem"), certificate.pem())?;
        Ok(std::fs::write(
            self.dir.join("key.pem"),
            key.serialize_pem(),
        )?)
    }

    /// A Redis at `port` of 127.0.0.1 that speaks TLS alone.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn redis(&self, port: u16) -> Result<Process> {
        let mut command = tethered("redis-server".as_ref(), &[])?;
        command
            .args(["--port", "0", "--tls-port", &port.to_string()])
            .args(["--tls-cert-file", &self.path("cert.pem")])
            .args(["--tls-key-file", &self.path("key.pem")])
            .args(["--tls-ca-cert-file", &self.path("ca.pem")])
            .args(["--tls-auth-clients", "no", "--save", ""]);
        Process::spawn(
            "redis by tls",
            command,
            &self.dir,
            &self.dir.join("redis.log"),
        )
    }

    /// A NATS at `port` of 127.0.0.1 that speaks TLS alone, once it is ready.
    ///
    /// # Errors
    /// It does not start.
    pub async fn nats(&self, port: u16) -> Result<Process> {
        let config = format!(
            "host: 127.0.0.1\nport: {port}\nmax_payload: 4MB\n\
             jetstream {{ store_dir: \"{}\", sync_interval: always }}\n\
             tls {{ cert_file: \"{}\", key_file: \"{}\" }}\n",
            self.path("jetstream"),
            self.path("cert.pem"),
            self.path("key.pem"),
        );
        std::fs::write(self.path("nats.conf"), config)?;
        let mut command = tethered("nats-server".as_ref(), &[])?;
        command.args(["--config", &self.path("nats.conf")]);
        let log = self.dir.join("nats.log");
        let nats = Process::spawn("NATS by TLS", command, &self.dir, &log)?;
        blocking(move || {
            let is_ready = || Ok(nats.log()?.contains("Server is ready"));
            until("NATS by TLS is ready", PATIENCE, is_ready)?;
            Ok(nats)
        })
        .await
    }

    /// The PostgreSQL of `stack` shows the certificate to whoever asks for TLS.
    ///
    /// # Errors
    /// It refuses the certificate.
    pub async fn postgres(&self, stack: &Stack) -> Result<()> {
        let port = stack.postgres.port();
        let ask = move |sql: &str| psql(port, "postgres", sql);
        let pair = [
            (self.path("cert.pem"), "server.crt"),
            (self.path("key.pem"), "server.key"),
        ];
        blocking(move || {
            let data = PathBuf::from(ask("show data_directory")?.trim());
            let owner = std::fs::metadata(&data)?;
            for (from, to) in pair {
                let file = data.join(to);
                std::fs::copy(from, &file)?;
                // It refuses a key that others may read.
                std::fs::set_permissions(&file, Permissions::from_mode(0o600))?;
                chown(&file, Some(owner.uid()), Some(owner.gid()))?;
            }
            ask("alter system set ssl = on")?;
            ask("select pg_reload_conf()")?;
            let is_on = || Ok(ask("show ssl")?.trim() == "on");
            until("PostgreSQL offers TLS", PATIENCE, is_on)
        })
        .await
    }
}
