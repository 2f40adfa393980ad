//! Keys that begin alike, by ranges of the primary key.

use birb_nest_core::{Key, Timestamp, Version};
use sqlx::{PgPool, Row as _, postgres::PgRow};

use super::database_error;

/// The primary key compares byte by byte, so what begins alike lies together.
const LIST: &str = "\
select key, version, deleted, octet_length(value) as size,
       (extract(epoch from expires_at) * 1000000)::bigint as expires_at
from cache_entries
where key >= $1 and key > $2 and ($3::text is null or key < $3)
order by key limit $4";

/// Keys that begin with `prefix`, from behind `after` on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Range {
    /// What they begin with; all keys do with nothing.
    pub prefix: String,
    /// The last key of the page before.
    pub after: Option<Key>,
}

/// A stored key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The key.
    pub key: Key,
    /// Its version.
    pub version: Version,
    /// Whether that is a tombstone.
    pub deleted: bool,
    /// Bytes of its value.
    pub size: u64,
    /// When it expires.
    pub expires_at: Option<Timestamp>,
}

impl Range {
    /// The least text that is greater than all that begin with the prefix; `None` when there is none.
    fn end(&self) -> Option<String> {
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

pub(super) async fn page(pool: &PgPool, range: &Range, limit: u32) -> Result<Vec<Listed>, String> {
    let rows = sqlx::query(LIST)
        .bind(&range.prefix)
        .bind(range.after.as_ref().map_or("", Key::as_str))
        .bind(range.end())
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await
        .map_err(|error| database_error(&error))?;
    rows.iter().map(row).collect()
}

fn row(row: &PgRow) -> Result<Listed, String> {
    let read = |error: sqlx::Error| database_error(&error);
    let key = row.try_get("key").map_err(read)?;
    let version: i64 = row.try_get("version").map_err(read)?;
    let size: i32 = row.try_get("size").map_err(read)?;
    let expires_at: Option<i64> = row.try_get("expires_at").map_err(read)?;
    Ok(Listed {
        key: Key::parse(key).map_err(|error| error.to_string())?,
        version: u64::try_from(version)
            .ok()
            .and_then(Version::new)
            .ok_or("a version is out of range")?,
        deleted: row.try_get("deleted").map_err(read)?,
        size: u64::from(size.unsigned_abs()),
        expires_at: expires_at.map(Timestamp::from_micros),
    })
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
