//! What the JSON of requests says: values come back byte for byte.

use std::{borrow::Cow, fmt, time::Duration};

use axum::http::StatusCode;
use birb_nest_core::{
    Content, Key, KeyError, Precondition, Version,
    precondition::{Comparison, Tags},
};
use birb_nest_store::nest::{NewEntry, Put};
use bytes::Bytes;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;

use crate::{
    config::{ApiConfig, MAX_METADATA_BYTES},
    error::ApiError,
    list::check_prefix,
};

/// The members of a JSON object in their order, each value as the text that was sent.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;
        impl<'de> Visitor<'de> for Visit {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(name) = map.next_key::<Name<'de>>()? {
                    members.push((name.0, map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Visit)
    }
}

/// A member's name, borrowed unless it has escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

/// Parses an object whose members are all among `known`, each at most once; the values come in `known`'s order.
fn members<'a, const N: usize>(
    bytes: &'a [u8],
    known: [&str; N],
) -> Result<[Option<&'a RawValue>; N], ApiError> {
    let Members(found) = serde_json::from_slice(bytes)
        .map_err(|error| ApiError::malformed("this is not a JSON object", error.to_string()))?;
    let mut values = [None; N];
    for (name, value) in found {
        let Some(place) = known.iter().position(|known| *known == name) else {
            return Err(ApiError::invalid(
                name.clone().into_owned(),
                format!("unknown member `{name}`; known are {}", known.join(", ")),
            ));
        };
        if values[place].replace(value).is_some() {
            return Err(ApiError::invalid(
                name.into_owned(),
                "the member is there twice",
            ));
        }
    }
    Ok(values)
}

/// Parses `{"value": .., "ttl": .., "metadata": {..}}`.
///
/// # Errors
/// 400 with the field that is wrong, 413 for a value that is too large.
pub fn parse_entry(body: &Bytes, config: &ApiConfig) -> Result<NewEntry, ApiError> {
    let [value, ttl, metadata] = members(body, ["value", "ttl", "metadata"])?;
    entry(body, config, value, ttl, metadata)
}

/// An entry of these members, which lie in `body`.
fn entry(
    body: &Bytes,
    config: &ApiConfig,
    value: Option<&RawValue>,
    ttl: Option<&RawValue>,
    metadata: Option<&RawValue>,
) -> Result<NewEntry, ApiError> {
    let value = value
        .ok_or_else(|| ApiError::invalid("value", "the member `value` is missing"))?
        .get();
    if value.len() > config.api_max_value_bytes {
        return Err(ApiError::too_large(format!(
            "the value has {} bytes, {} are allowed",
            value.len(),
            config.api_max_value_bytes
        )));
    }
    let ttl = ttl
        .map(|ttl| parse_ttl("ttl", ttl.get(), config))
        .transpose()?;
    let metadata = metadata
        .map(|metadata| check_metadata(metadata.get()).map(|()| metadata.get()))
        .transpose()?;
    Ok(NewEntry {
        content: Content {
            content_type: Content::JSON.to_owned(),
            metadata: metadata.map_or_else(Bytes::new, |text| body.slice_ref(text.as_bytes())),
            value: body.slice_ref(value.as_bytes()),
        },
        ttl,
    })
}

/// A time to live in whole seconds that stood in `field`.
///
/// # Errors
/// 400.
pub fn parse_ttl(field: &str, text: &str, config: &ApiConfig) -> Result<Duration, ApiError> {
    let longest = config.longest_ttl().as_secs();
    match text.parse::<u64>() {
        Ok(seconds) if (1..=longest).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        Ok(0) => Err(ApiError::invalid(
            field,
            "a time to live is at least 1 second",
        )),
        Ok(_) => Err(ApiError::invalid(
            field,
            format!("a time to live is at most {longest} seconds"),
        )),
        Err(_) => Err(ApiError::invalid(
            field,
            "a time to live is a whole number of seconds above 0",
        )),
    }
}

/// Parses `{"ttl": ..}` of a touch; `None` for `null`, which takes the end away.
///
/// # Errors
/// 400.
pub fn parse_touch(body: &[u8], config: &ApiConfig) -> Result<Option<Duration>, ApiError> {
    let [ttl] = members(body, ["ttl"])?;
    let ttl = ttl.ok_or_else(|| {
        ApiError::invalid(
            "ttl",
            "the member `ttl` is missing; `null` means without end",
        )
    })?;
    match ttl.get() {
        "null" => Ok(None),
        ttl => parse_ttl("ttl", ttl, config).map(Some),
    }
}

/// An item of a batch of writes: its key, if that could be read, and what is to be written or what is wrong with it.
pub struct Item {
    pub key: Option<String>,
    pub put: Result<Put, ApiError>,
}

/// Parses `{"entries": [{"key": .., "value": .., "ttl": .., "metadata": {..}, "if_match": ..}, ..]}`. What breaks a rule
/// inside an entry is that entry's error alone.
///
/// # Errors
/// 400 when it is no list of at most `API_MAX_BATCH` entries.
pub fn parse_puts(body: &Bytes, config: &ApiConfig) -> Result<Vec<Item>, ApiError> {
    let [entries] = members(body, ["entries"])?;
    let entries =
        entries.ok_or_else(|| ApiError::invalid("entries", "the member `entries` is missing"))?;
    let entries: Vec<&RawValue> = serde_json::from_str(entries.get())
        .map_err(|_| ApiError::invalid("entries", "entries are a list of objects"))?;
    check_count("entries", entries.len(), config)?;
    Ok(entries
        .into_iter()
        .enumerate()
        .map(|(place, text)| {
            let mut item = item(body, text, config);
            if let Err(error) = &mut item.put {
                let member = error.field.take();
                let member = member.map_or_else(String::new, |member| format!(".{member}"));
                error.field = Some(format!("entries[{place}]{member}"));
            }
            item
        })
        .collect())
}

fn item(body: &Bytes, text: &RawValue, config: &ApiConfig) -> Item {
    let known = ["key", "value", "ttl", "metadata", "if_match"];
    let [key, value, ttl, metadata, if_match] = match members(text.get().as_bytes(), known) {
        Ok(members) => members,
        Err(error) => {
            return Item {
                key: None,
                put: Err(error),
            };
        }
    };
    let name = key.and_then(|key| serde_json::from_str::<Cow<'_, str>>(key.get()).ok());
    let put = || {
        let name = name
            .as_deref()
            .ok_or_else(|| ApiError::invalid("key", "the member `key` is a string"))?;
        Ok(Put {
            key: Key::parse(name).map_err(|error| key_in_body("key", error))?,
            condition: if_match
                .map(parse_if_match)
                .transpose()?
                .unwrap_or_default(),
            new: entry(body, config, value, ttl, metadata)?,
        })
    };
    Item {
        put: put(),
        key: name.map(Cow::into_owned),
    }
}

/// `if_match` of a batch: a version as entries have it, or what the header of that name says.
fn parse_if_match(text: &RawValue) -> Result<Precondition, ApiError> {
    let wrong = || {
        ApiError::invalid(
            "if_match",
            "`if_match` is a version, or a string as in the header: `\"*\"`, `\"\\\"<version>\\\"\"`",
        )
    };
    let tags = match serde_json::from_str::<Cow<'_, str>>(text.get()) {
        Ok(header) => Tags::parse(&header, Comparison::Strong).map_err(|_| wrong())?,
        Err(_) => {
            let version = text.get().parse().ok().and_then(Version::new);
            Tags::Versions(vec![version.ok_or_else(wrong)?])
        }
    };
    Ok(Precondition {
        if_match: Some(tags),
        if_none_match: None,
    })
}

fn check_count(field: &str, n: usize, config: &ApiConfig) -> Result<(), ApiError> {
    if n > config.api_max_batch as usize {
        return Err(ApiError::invalid(
            field,
            format!(
                "at most {} {field} are allowed, these are {n}",
                config.api_max_batch
            ),
        ));
    }
    Ok(())
}

/// A key in a body is never too long for a path.
fn key_in_body(field: impl Into<String>, error: KeyError) -> ApiError {
    let mut error = ApiError::key(field, error);
    error.status = StatusCode::BAD_REQUEST;
    error
}

fn check_metadata(text: &str) -> Result<(), ApiError> {
    if text.len() > MAX_METADATA_BYTES {
        return Err(ApiError::invalid(
            "metadata",
            format!(
                "metadata has at most {MAX_METADATA_BYTES} bytes, this has {}",
                text.len()
            ),
        ));
    }
    serde_json::from_str::<std::collections::BTreeMap<Cow<'_, str>, IgnoredAny>>(text)
        .map(|_| ())
        .map_err(|_| ApiError::invalid("metadata", "metadata is a JSON object"))
}

/// A key of a list: as it was sent, and what it is or what is wrong with it.
type Named = (String, Result<Key, ApiError>);

/// Parses `{"keys": [..]}`.
///
/// # Errors
/// 400 when it is no list of at most `API_MAX_BATCH` strings.
pub fn parse_keys(body: &[u8], config: &ApiConfig) -> Result<Vec<Named>, ApiError> {
    let [keys] = members(body, ["keys"])?;
    let keys = keys.ok_or_else(|| ApiError::invalid("keys", "the member `keys` is missing"))?;
    let names: Vec<String> = serde_json::from_str(keys.get())
        .map_err(|_| ApiError::invalid("keys", "keys are a list of strings"))?;
    check_count("keys", names.len(), config)?;
    Ok(names
        .into_iter()
        .enumerate()
        .map(|(place, name)| {
            let key =
                Key::parse(&name).map_err(|error| key_in_body(format!("keys[{place}]"), error));
            (name, key)
        })
        .collect())
}

/// What somebody wants to have in Redis.
pub enum Wanted {
    Keys(Vec<Key>),
    Prefix(String),
}

/// Parses `{"keys": [..]}` or `{"prefix": ".."}`.
///
/// # Errors
/// 400.
pub fn parse_wanted(body: &[u8], config: &ApiConfig) -> Result<Wanted, ApiError> {
    match members(body, ["keys", "prefix"])? {
        [Some(_), None] => parse_keys(body, config)?
            .into_iter()
            .map(|(_, key)| key)
            .collect::<Result<_, _>>()
            .map(Wanted::Keys),
        [None, Some(prefix)] => {
            let prefix: String = serde_json::from_str(prefix.get())
                .map_err(|_| ApiError::invalid("prefix", "a prefix is a string"))?;
            check_prefix(&prefix)?;
            Ok(Wanted::Prefix(prefix))
        }
        [None, None] => Err(ApiError::malformed(
            "one of the members `keys` and `prefix` is needed",
            None,
        )),
        [Some(_), Some(_)] => Err(ApiError::invalid(
            "prefix",
            "either `keys` or `prefix`, not both",
        )),
    }
}

#[cfg(test)]
mod tests;
