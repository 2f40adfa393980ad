//! What bodies look like, for the OpenAPI document. They are parsed and rendered by hand, byte for byte; nothing here is ever
//! made.
#![expect(dead_code, reason = "descriptions")]

use serde::Serialize;
use utoipa::ToSchema;

use crate::error::Code;

/// An entry, as reads and writes answer with it.
#[derive(Serialize, ToSchema)]
pub struct Entry {
    key: String,
    /// Any JSON, byte for byte as it was written; base64 if `encoding` says so.
    #[schema(value_type = serde_json::Value)]
    value: (),
    /// An integer below 2^53.
    #[schema(minimum = 1)]
    version: u64,
    #[schema(value_type = Object)]
    metadata: (),
    #[schema(format = DateTime)]
    created_at: String,
    #[schema(format = DateTime)]
    updated_at: String,
    /// Absent if it never expires.
    #[schema(format = DateTime, required = false)]
    expires_at: String,
    /// Whole seconds left; absent if it never expires.
    #[schema(required = false)]
    ttl: u64,
    /// `base64` for a value that is not JSON.
    #[schema(required = false)]
    encoding: String,
    /// The media type of a value that is not JSON.
    #[schema(required = false)]
    content_type: String,
}

/// What a write takes.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewEntry {
    /// Any JSON; `null` is a value.
    #[schema(value_type = serde_json::Value)]
    value: (),
    /// Whole seconds; without it the entry lives until it is deleted.
    #[schema(minimum = 1, maximum = 3153600000i64, required = false)]
    ttl: u64,
    /// At most 4 KiB.
    #[schema(value_type = Object, required = false)]
    metadata: (),
}

/// What a touch takes.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Touch {
    /// Whole seconds from now on; `null` for an entry that lives until it is deleted.
    #[schema(minimum = 1, maximum = 3153600000i64, required = true)]
    ttl: Option<u64>,
}

/// Some keys.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Keys {
    #[schema(max_items = 100)]
    keys: Vec<String>,
}

/// Keys, or what they begin with.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum Wanted {
    Keys(Keys),
    Prefix(Prefix),
}

/// What keys begin with.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Prefix {
    #[schema(max_length = 512)]
    prefix: String,
}

/// Some writes.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    #[schema(max_items = 100)]
    entries: Vec<BatchEntry>,
}

/// One of them.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BatchEntry {
    key: String,
    #[schema(value_type = serde_json::Value)]
    value: (),
    #[schema(minimum = 1, maximum = 3153600000i64, required = false)]
    ttl: u64,
    #[schema(value_type = Object, required = false)]
    metadata: (),
    /// A version, or a string as in the header `If-Match`.
    #[schema(value_type = serde_json::Value, required = false)]
    if_match: (),
}

/// What a batch of reads found: each key is in exactly one of the three.
#[derive(Serialize, ToSchema)]
pub struct BatchFound {
    #[schema(value_type = std::collections::HashMap<String, Entry>)]
    entries: (),
    missing: Vec<String>,
    #[schema(value_type = Object)]
    errors: (),
}

/// Every error.
#[derive(Serialize, ToSchema)]
pub struct Error {
    /// A sentence for people; it may change.
    error: String,
    code: Code,
    #[schema(required = false)]
    details: String,
    /// What was wrong.
    #[schema(required = false)]
    field: String,
    request_id: String,
}
