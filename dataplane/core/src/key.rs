//! Keys: what a client may name an entry.

use std::{fmt, sync::Arc};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

/// A key: 1 to 512 bytes of UTF-8 without control characters (docs/API.md). Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

/// Why a text is not a [`Key`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text has no bytes.
    #[error("a key has at least 1 byte")]
    Empty,
    /// The text has more than [`Key::MAX_BYTES`] bytes; the value says how many.
    #[error("a key has at most {max} bytes, this one has {0}", max = Key::MAX_BYTES)]
    TooLong(usize),
    /// The text has a control character (Unicode category Cc) at this byte.
    #[error("a key has no control characters, this one has one at byte {0}")]
    ControlCharacter(usize),
    /// A log subject's last token is not the base64url of a key.
    #[error("not the base64url of UTF-8 text")]
    Encoding,
}

impl Key {
    /// The longest key, in bytes of UTF-8.
    pub const MAX_BYTES: usize = 512;

    /// Checks `text` and makes it a key.
    ///
    /// # Errors
    /// A [`KeyError`] that says which rule the text breaks, [`KeyError::TooLong`] first.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        if text.is_empty() {
            return Err(KeyError::Empty);
        }
        if text.len() > Self::MAX_BYTES {
            return Err(KeyError::TooLong(text.len()));
        }
        if let Some((at, _)) = text.char_indices().find(|(_, c)| c.is_control()) {
            return Err(KeyError::ControlCharacter(at));
        }
        Ok(Self(text.into()))
    }

    /// The key as its client wrote it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key as one token of a NATS subject: base64url without padding, at most 683 characters.
    ///
    /// Subjects split at dots, end at spaces and know two wildcards, so a key cannot stand in one as it is.
    #[must_use]
    pub fn to_token(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.as_str())
    }

    /// The key that [`Key::to_token`] made `token` from.
    ///
    /// # Errors
    /// [`KeyError::Encoding`] when it is not base64url of UTF-8, else as [`Key::parse`].
    pub fn from_token(token: &str) -> Result<Self, KeyError> {
        let bytes = URL_SAFE_NO_PAD
            .decode(token)
            .map_err(|_| KeyError::Encoding)?;
        Self::parse(std::str::from_utf8(&bytes).map_err(|_| KeyError::Encoding)?)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_a_key() {
        let check = |text: &str, expected: Result<(), KeyError>| {
            assert_eq!(Key::parse(text).map(|_| ()), expected, "{text:?}");
        };
        check("user:1/näme 🐦", Ok(()));
        check("batch", Ok(()));
        check(&"x".repeat(512), Ok(()));
        check("", Err(KeyError::Empty));
        check(&"x".repeat(513), Err(KeyError::TooLong(513)));
        check("a\nb", Err(KeyError::ControlCharacter(1)));
        check("a\u{85}", Err(KeyError::ControlCharacter(1)));
        check("\u{0}", Err(KeyError::ControlCharacter(0)));
    }

    proptest::proptest! {
        #[test]
        fn a_token_is_one_subject_token_and_comes_back(text in "\\PC{1,120}") {
            let key = Key::parse(&text).expect("printable text is a key");
            let token = key.to_token();
            proptest::prop_assert!(token.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
            proptest::prop_assert_eq!(Key::from_token(&token), Ok(key));
        }

        #[test]
        fn no_token_panics(token in "\\PC{0,80}") {
            let _ = Key::from_token(&token);
        }
    }
}
