//! Hashes that tell when pods must be replaced.

use std::{collections::BTreeMap, fmt::Write};

use sha2::{Digest, Sha256};

use crate::api::SecretKey;

/// What a nest depends on beside its spec: bytes of the Secrets' keys that it uses, and which volumes its servers have.
#[derive(Clone, Default)]
pub struct Inputs {
    secrets: BTreeMap<SecretKey, Vec<u8>>,
    volumes: Vec<String>,
}

impl Inputs {
    /// Notes what `key` holds.
    pub fn insert(&mut self, key: SecretKey, bytes: Vec<u8>) {
        self.secrets.insert(key, bytes);
    }

    /// Notes the uid of a managed server's volume: a new one is empty, so setup has to run again.
    pub fn insert_volume(&mut self, uid: String) {
        self.volumes.push(uid);
    }

    /// Uids of the managed servers' volumes.
    pub(super) fn volumes(&self) -> impl Iterator<Item = &[u8]> {
        self.volumes.iter().map(String::as_bytes)
    }

    /// What `key` holds; nothing if it is not there.
    pub(super) fn bytes(&self, key: &SecretKey) -> &[u8] {
        self.secrets.get(key).map_or(&[], Vec::as_slice)
    }
}

impl std::fmt::Debug for Inputs {
    /// Names only: the values are secrets.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.secrets.keys()).finish()
    }
}

/// A hash of `parts` in order, as hexadecimal digits; salted, so that a short password cannot be told by comparing nests.
pub(super) fn hash<'a>(salt: &str, parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = Sha256::new();
    let mut add = |part: &[u8]| {
        hasher.update((part.len() as u64).to_be_bytes());
        hasher.update(part);
    };
    add(salt.as_bytes());
    parts.into_iter().for_each(add);
    hasher
        .finalize()
        .iter()
        .take(16)
        .fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").expect("a String takes all");
            text
        })
}
