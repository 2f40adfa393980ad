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
    /// The least text that is greater than all that begin with the prefix; `None` when there is none.
    #[must_use]
    pub fn end(&self) -> Option<String> {
        let mut end = self.prefix.clone();
        // The order of UTF-8's bytes is that of its characters.
        while let Some(last) = end.pop() {
            let next = match last {
                '\u{d7ff}' => Some('\u{e000}'),
                last => char::from_u32(u32::from(last) + 1),
            };
            if let Some(next) = next {
                end.push(next);
                return Some(end);
            }
        }
        None
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
        assert_eq!(end(""), None);
        assert_eq!(end("a"), Some("b".to_owned()));
        assert_eq!(end("user:"), Some("user;".to_owned()));
        assert_eq!(end("a\u{10ffff}"), Some("b".to_owned()));
        assert_eq!(end("\u{10ffff}\u{10ffff}"), None);
        assert_eq!(end("\u{d7ff}"), Some("\u{e000}".to_owned()));
        for prefix in ["a", "é", "🐦", "a\u{7f}", "\u{ffff}"] {
            let end = end(prefix).expect("there is one");
            assert!(
                format!("{prefix}\u{10ffff}").as_bytes() < end.as_bytes(),
                "{prefix:?}"
            );
        }
    }
}
