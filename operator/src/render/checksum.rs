//! Hashes that tell when pods must be replaced.

use std::{collections::BTreeMap, fmt::Write};

use sha2::{Digest, Sha256};

use crate::api::SecretKey;

/// Bytes of the Secrets' keys that a nest uses.
#[derive(Clone, Default)]
pub struct Inputs(BTreeMap<SecretKey, Vec<u8>>);

impl Inputs {
    /// Notes what `key` holds.
    pub fn insert(&mut self, key: SecretKey, bytes: Vec<u8>) {
        self.0.insert(key, bytes);
    }

    /// What `key` holds; nothing if it is not there.
    pub(super) fn bytes(&self, key: &SecretKey) -> &[u8] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }
}

impl std::fmt::Debug for Inputs {
    /// Names only: the values are secrets.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
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
