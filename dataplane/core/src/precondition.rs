//! Preconditions: what `If-Match` and `If-None-Match` say of the version a key has (RFC 9110, section 13.1).

use crate::Version;

/// What one such header names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tags {
    /// `*`: whatever version there is.
    Any,
    /// These versions. A tag that is no version of ours is left out: no key ever has it.
    Versions(Vec<Version>),
}

/// Why a text is not [`Tags`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TagsError {
    /// Not a list of entity tags.
    #[error("`*` or entity tags in double quotes, separated by commas, are expected")]
    Malformed,
    /// A tag that begins with `W/` where only the very same bytes will do.
    #[error("a weak entity tag (`W/`) does not identify a version")]
    Weak,
}

/// Whether a tag with `W/` before it names the same version as without: for reads it does, for writes it is an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// For writes.
    Strong,
    /// For reads: a proxy that compresses an answer makes its tag weak.
    Weak,
}

/// When a write may happen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Precondition {
    /// The key must have one of these.
    pub if_match: Option<Tags>,
    /// The key must have none of these.
    pub if_none_match: Option<Tags>,
}

impl Tags {
    /// Parses the value of a header.
    ///
    /// # Errors
    /// [`TagsError`].
    pub fn parse(text: &str, comparison: Comparison) -> Result<Self, TagsError> {
        let blank = [' ', '\t'];
        let mut rest = text.trim_matches(blank);
        if rest == "*" {
            return Ok(Self::Any);
        }
        let (mut versions, mut any) = (Vec::new(), false);
        loop {
            // Empty members of a list are nothing (RFC 9110, section 5.6.1.2).
            rest = rest.trim_start_matches([' ', '\t', ',']);
            if rest.is_empty() {
                break;
            }
            if let Some(tag) = rest.strip_prefix("W/") {
                if comparison == Comparison::Strong {
                    return Err(TagsError::Weak);
                }
                rest = tag;
            }
            let quoted = rest.strip_prefix('"').ok_or(TagsError::Malformed)?;
            let (tag, behind) = quoted.split_once('"').ok_or(TagsError::Malformed)?;
            if tag.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
                return Err(TagsError::Malformed);
            }
            rest = behind.trim_start_matches(blank);
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err(TagsError::Malformed);
            }
            any = true;
            versions.extend(version(tag));
        }
        if any {
            Ok(Self::Versions(versions))
        } else {
            Err(TagsError::Malformed)
        }
    }

    /// Whether a key whose version is `current` has one of these; `None` for a key without a value.
    #[must_use]
    pub fn name(&self, current: Option<Version>) -> bool {
        current.is_some_and(|current| match self {
            Self::Any => true,
            Self::Versions(versions) => versions.contains(&current),
        })
    }
}

/// The version whose tag this is, byte by byte.
fn version(tag: &str) -> Option<Version> {
    let version = Version::new(tag.parse().ok()?)?;
    (version.to_string() == tag).then_some(version)
}

impl Precondition {
    /// Whether every write may happen.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.if_match.is_none() && self.if_none_match.is_none()
    }

    /// Whether a key whose version is `current` may be written; `None` for a key without a value: never written, deleted
    /// or expired. Both headers must agree.
    #[must_use]
    pub fn holds(&self, current: Option<Version>) -> bool {
        self.if_match.as_ref().is_none_or(|tags| tags.name(current))
            && !self
                .if_none_match
                .as_ref()
                .is_some_and(|tags| tags.name(current))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(numbers: &[u64]) -> Tags {
        Tags::Versions(
            numbers
                .iter()
                .map(|number| Version::new(*number).expect("small"))
                .collect(),
        )
    }

    #[test]
    fn tags_are_read_as_rfc_9110_writes_them() {
        let check = |text: &str, strong: Result<Tags, TagsError>, weak: Result<Tags, TagsError>| {
            assert_eq!(Tags::parse(text, Comparison::Strong), strong, "{text:?}");
            assert_eq!(Tags::parse(text, Comparison::Weak), weak, "{text:?}");
        };
        let same = |text: &str, expected: Tags| check(text, Ok(expected.clone()), Ok(expected));
        same("*", Tags::Any);
        same(" * ", Tags::Any);
        same("\"17\"", versions(&[17]));
        same(" \"1\" ,\"2\",, \"3\"\t", versions(&[1, 2, 3]));
        // Well formed, and no version of ours.
        for foreign in [
            "\"\"",
            "\"abc\"",
            "\"017\"",
            "\"+1\"",
            "\"1,2\"",
            "\"9007199254740992\"",
        ] {
            same(foreign, versions(&[]));
        }
        check("W/\"17\"", Err(TagsError::Weak), Ok(versions(&[17])));
        check(
            "\"1\", W/\"2\"",
            Err(TagsError::Weak),
            Ok(versions(&[1, 2])),
        );
        for nonsense in [
            "",
            " ",
            ",",
            "17",
            "\"17",
            "17\"",
            "\"1\" \"2\"",
            "*, \"1\"",
            "\"1\", *",
            "\"1 2\"",
            "w/\"1\"",
            "'1'",
        ] {
            let error = Err(TagsError::Malformed);
            check(nonsense, error.clone(), error);
        }
    }

    #[test]
    fn both_headers_must_agree_with_the_present_version() {
        let check = |if_match: Option<Tags>,
                     if_none_match: Option<Tags>,
                     current: Option<u64>,
                     expected| {
            let condition = Precondition {
                if_match,
                if_none_match,
            };
            let version = current.map(|number| Version::new(number).expect("small"));
            assert_eq!(
                condition.holds(version),
                expected,
                "{condition:?} {current:?}"
            );
        };
        check(None, None, None, true);
        check(None, None, Some(1), true);
        check(Some(Tags::Any), None, None, false);
        check(Some(Tags::Any), None, Some(1), true);
        check(Some(versions(&[1, 2])), None, Some(2), true);
        check(Some(versions(&[1, 2])), None, Some(3), false);
        check(Some(versions(&[1])), None, None, false);
        check(Some(versions(&[])), None, Some(1), false);
        check(None, Some(Tags::Any), None, true);
        check(None, Some(Tags::Any), Some(1), false);
        check(None, Some(versions(&[1])), Some(1), false);
        check(None, Some(versions(&[1])), Some(2), true);
        check(Some(versions(&[1])), Some(versions(&[2])), Some(1), true);
        check(Some(Tags::Any), Some(Tags::Any), Some(1), false);
        check(Some(Tags::Any), Some(Tags::Any), None, false);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics_and_every_own_tag_is_read(text in "\\PC{0,40}", number in 0..=Version::MAX.get()) {
            let _ = Tags::parse(&text, Comparison::Weak);
            let tag = format!("\"{number}\"");
            proptest::prop_assert_eq!(Tags::parse(&tag, Comparison::Strong), Ok(versions(&[number])));
        }
    }
}
