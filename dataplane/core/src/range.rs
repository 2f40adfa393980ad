//! Ranges of keys that begin alike.

use crate::Key;

/// Keys that begin with `prefix`, from behind `after` on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Range {
    /// What they begin with; all keys do with nothing.
    pub prefix: String,
    /// The last key of the page before.
    pub after: Option<Key>,
}

impl Range {
    /// Where it ends: of the keys that are not less than the prefix, those less than this text begin with it.
    #[must_use]
    pub fn end(&self) -> String {
        let mut end = self.prefix.clone();
        // The order of UTF-8's bytes is that of its characters.
        while let Some(last) = end.pop() {
            let next = match last {
                '\u{d7ff}' => Some('\u{e000}'),
                last => char::from_u32(u32::from(last) + 1),
            };
            if let Some(next) = next {
                end.push(next);
                return end;
            }
        }
        // One greatest character more than a key has room for.
        char::MAX
            .to_string()
            .repeat(Key::MAX_BYTES / char::MAX.len_utf8() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_right_behind_its_prefix() {
        let end = |prefix: &str| {
            let range = Range {
                prefix: prefix.to_owned(),
                after: None,
            };
            range.end()
        };
        assert_eq!(end("a"), "b");
        assert_eq!(end("user:"), "user;");
        assert_eq!(end("a\u{10ffff}"), "b");
        assert_eq!(end("\u{d7ff}"), "\u{e000}");
        let greatest = "\u{10ffff}".repeat(128);
        Key::parse(&greatest).expect("a key");
        for prefix in ["", "\u{10ffff}\u{10ffff}"] {
            assert!(greatest < end(prefix), "{prefix:?}");
        }
        for prefix in ["a", "é", "🐦", "a\u{7f}", "\u{ffff}"] {
            let end = end(prefix);
            assert!(
                format!("{prefix}\u{10ffff}").as_bytes() < end.as_bytes(),
                "{prefix:?}"
            );
        }
    }
}
