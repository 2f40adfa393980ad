//! Ranges of keys that begin alike.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::Key;

/// Keys that begin with `prefix`, from behind `after` on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Range {
    /// What they begin with; all keys do with nothing.
    pub prefix: String,
    /// Where the page before ended.
    pub after: Option<Place>,
}

/// Where a page ends: behind a key, or behind what somebody else put in the place of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place(String);

impl Place {
    /// Bytes of the longest: those of the longest key, and of the greatest character.
    const MAX_BYTES: usize = Key::MAX_BYTES + char::MAX.len_utf8();

    /// Behind `name`, and before every key that is greater.
    #[must_use]
    pub fn behind(name: &str) -> Self {
        let end = name.floor_char_boundary(Key::MAX_BYTES);
        if end == name.len() {
            return Self(name.to_owned());
        }
        // No key is longer: behind one that is, and begins like that, the next key is behind all that begin like that.
        Self(format!("{}{}", &name[..end], char::MAX))
    }

    /// What is not greater than this is before it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// As base64url without padding.
    #[must_use]
    pub fn to_token(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.as_str())
    }

    /// The place that [`Place::to_token`] made `token` from; `None` if it is of none.
    #[must_use]
    pub fn from_token(token: &str) -> Option<Self> {
        let name = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        // PostgreSQL has no text with a NUL.
        let is_one = (1..=Self::MAX_BYTES).contains(&name.len()) && !name.contains('\0');
        is_one.then_some(Self(name))
    }
}

impl From<&Key> for Place {
    fn from(key: &Key) -> Self {
        Self(key.as_str().to_owned())
    }
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
    fn places_are_behind_what_they_are_behind_and_before_the_next_key() {
        let long = "x".repeat(600);
        for name in ["k", "k\n", &"x".repeat(512), "\u{1}"] {
            assert_eq!(Place::behind(name).as_str(), name);
        }
        let greatest_before = "x".repeat(512);
        let least_behind = format!("{}y", "x".repeat(511));
        let place = Place::behind(&long);
        assert!(place.as_str() > long.as_str());
        assert!(place.as_str() > greatest_before.as_str());
        assert!(place.as_str() < least_behind.as_str());
        // A character that ends beyond the longest key.
        let name = format!("{}🐦", "x".repeat(510));
        let place = Place::behind(&name);
        assert!(place.as_str() > name.as_str());
        let before = format!("{}é", "x".repeat(510));
        assert!(before < name && before.as_str() < place.as_str());
        for name in ["k", "a\nb", &long, &name] {
            let place = Place::behind(name);
            assert_eq!(Place::from_token(&place.to_token()), Some(place));
        }
        for token in ["", "%", "AA", &URL_SAFE_NO_PAD.encode(&long)] {
            assert_eq!(Place::from_token(token), None, "{token}");
        }
    }

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
