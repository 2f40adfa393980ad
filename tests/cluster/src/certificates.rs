//! The cluster's certificate authority, and what it signs.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};

use crate::node;

/// What clients on the host, inside the node and in pods call the API server.
const API_SERVER_NAMES: [&str; 5] = [
    "localhost",
    "127.0.0.1",
    node::ADDRESS,
    // The first service address is that of `kubernetes`.
    "10.96.0.1",
    "kubernetes.default.svc",
];

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// All of a cluster's keys, in one directory.
#[derive(Debug)]
pub(crate) struct Certificates {
    pub authority: PathBuf,
    pub api_server: Identity,
    /// In `system:masters`: may do anything.
    pub admin: Identity,
    pub kubelet: Identity,
    /// Signs the tokens of service accounts.
    pub token_key: PathBuf,
    /// Its public half.
    pub token_public_key: PathBuf,
}

impl Certificates {
    /// Makes new ones in `dir`.
    pub fn make(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let mut params = CertificateParams::new([])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::KeyCertSign,
            KeyUsagePurpose::CrlSign,
            KeyUsagePurpose::DigitalSignature,
        ];
        params.distinguished_name = subject("birb-nest-cluster", None);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;

        let sign = |file: &str, name: &str, group: Option<&str>, names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            let mut params = CertificateParams::new(names)?;
            params.distinguished_name = subject(name, group);
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            // The API server is a client too, of the kubelet.
            params.extended_key_usages = vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
            params.use_authority_key_identifier_extension = true;
            let key = KeyPair::generate()?;
            let certificate = params.signed_by(&key, &authority)?;
            Ok::<_, anyhow::Error>(Identity {
                certificate: write(dir, &format!("{file}.crt"), &certificate.pem())?,
                key: write(dir, &format!("{file}.key"), &key.serialize_pem())?,
            })
        };
        let token_key = KeyPair::generate()?;
        Ok(Self {
            authority: write(dir, "ca.crt", &authority.pem())?,
            api_server: sign("kube-apiserver", "kube-apiserver", None, &API_SERVER_NAMES)?,
            admin: sign("admin", "admin", Some("system:masters"), &[])?,
            kubelet: sign(
                "kubelet",
                &format!("system:node:{}", node::NAME),
                Some("system:nodes"),
                &[],
            )?,
            token_key: write(dir, "tokens.key", &token_key.serialize_pem())?,
            token_public_key: write(dir, "tokens.pub", &token_key.public_key_pem())?,
        })
    }
}

/// Kubernetes reads the user's name and group from a certificate's subject.
fn subject(name: &str, group: Option<&str>) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    if let Some(group) = group {
        subject.push(DnType::OrganizationName, group);
    }
    subject.push(DnType::CommonName, name);
    subject
}

fn write(dir: &Path, name: &str, content: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    write_private(&path, content)?;
    Ok(path)
}

/// Readable by its owner alone.
pub(crate) fn write_private(path: &Path, content: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut options = File::options();
        options.create(true).write(true).truncate(true).mode(0o600);
        options.open(path)?.write_all(content.as_bytes())
    };
    write().with_context(|| format!("failed to write {}", path.display()))
}
