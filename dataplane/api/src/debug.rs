//! `GET /v1/debug/{key}`: what each store has of a key. It changes nothing.

use axum::{extract::State, http::StatusCode, response::Response};
use birb_nest_core::{Entry, State as Content, Timestamp};
use birb_nest_store::{
    nest::{Inspection, Logged, Message},
    postgres::Row,
    redis::Stored,
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::{entries::report, error::ApiError, extract::PathKey, state::AppState};

#[derive(Serialize, ToSchema)]
struct Report {
    key: String,
    shard: usize,
    now: String,
    redis: Found,
    log: Found,
    postgres: Found,
}

/// What one store has.
#[derive(Default, Serialize, ToSchema)]
struct Found {
    /// `entry`, `deleted` (a tombstone), `nothing`; in Redis also `absent` (a lookup found nothing) and `leased`; in the log
    /// also `pin` and `unreadable`; `unavailable` when it could not be asked.
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expired: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    written_at: Option<String>,
    /// Since it was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    age_seconds: Option<u64>,
    /// Bytes of the value; in Redis of the whole document.
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    /// Log: where the message is, and whether the shard takes writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fenced: Option<bool>,
    /// Log: PostgreSQL has not stored this message yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pending: Option<bool>,
    /// Log and PostgreSQL: the base of the shard's life.
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<u64>,
    /// PostgreSQL: everything up to this version of the shard is stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    applied_to: Option<u64>,
    /// PostgreSQL: the version of a newer write that it refused for good.
    #[serde(skip_serializing_if = "Option::is_none")]
    dead_version: Option<u64>,
    /// Why it is `unreadable` or `unavailable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// GET: 200, whatever can be asked.
#[utoipa::path(get, path = "/v1/debug/{key}", tag = "administration", params(("key" = String, Path, description = "1 to 512 bytes of UTF-8 without control characters, percent-encoded")), responses((status = 200, description = "what each store has", body = Report)))]
pub async fn get(
    State(state): State<AppState>,
    PathKey(key): PathKey,
) -> Result<Response, ApiError> {
    let Inspection {
        shard,
        redis,
        log,
        postgres,
    } = state.nest.inspect(&key).await;
    let now = state.nest.clock().now();
    let applied_to = postgres.as_ref().ok().map(|row| row.applied_to.get());
    let mut log = log.map_or_else(unavailable, |logged| in_log(logged, now));
    if let (Some(version), Some(applied_to)) = (log.version, applied_to) {
        log.pending = Some(version > applied_to);
    }
    Ok(report(
        StatusCode::OK,
        &Report {
            key: key.to_string(),
            shard: shard.index(),
            now: now.to_string(),
            redis: redis.map_or_else(unavailable, |stored| in_redis(stored, now)),
            log,
            postgres: postgres.map_or_else(unavailable, |row| in_postgres(row, now)),
        },
    ))
}

/// The error names servers, which only administrators are to see: it is theirs to mend.
fn unavailable(why: String) -> Found {
    Found {
        state: "unavailable",
        why: Some(why),
        ..Found::default()
    }
}

fn state(name: &'static str) -> Found {
    Found {
        state: name,
        ..Found::default()
    }
}

fn expiring(found: Found, expires_at: Option<Timestamp>, now: Timestamp) -> Found {
    Found {
        expires_at: expires_at.map(|at| at.to_string()),
        expired: expires_at.map(|at| at <= now),
        ..found
    }
}

fn entry(entry: &Entry, now: Timestamp) -> Found {
    let content = match &entry.state {
        Content::Present(content) => Some(content),
        Content::Deleted => None,
    };
    let found = Found {
        state: if content.is_some() {
            "entry"
        } else {
            "deleted"
        },
        version: Some(entry.version.get()),
        written_at: Some(entry.written_at.to_string()),
        age_seconds: Some(now.since(entry.written_at).as_secs()),
        size: content.map(|content| content.value.len()),
        content_type: content.map(|content| content.content_type.clone()),
        ..Found::default()
    };
    expiring(found, entry.expires_at, now)
}

fn in_redis(stored: Option<Stored>, now: Timestamp) -> Found {
    match stored {
        None => state("nothing"),
        Some(Stored::Absent) => state("absent"),
        Some(Stored::Leased) => state("leased"),
        Some(Stored::Document(document)) => {
            let found = Found {
                state: if document.body.is_some() {
                    "entry"
                } else {
                    "deleted"
                },
                version: Some(document.version.get()),
                size: document.body.as_ref().map(bytes::Bytes::len),
                ..Found::default()
            };
            expiring(found, document.expires_at, now)
        }
    }
}

fn in_log(logged: Logged, now: Timestamp) -> Found {
    let found = match &logged.message {
        Message::Nothing => state("nothing"),
        Message::Pin => state("pin"),
        Message::Entry(found) => entry(found, now),
        Message::Held(why) => Found {
            why: Some(why.clone()),
            ..state("unreadable")
        },
    };
    Found {
        subject: Some(logged.subject),
        sequence: (logged.sequence > 0).then_some(logged.sequence),
        fenced: Some(logged.is_fenced),
        base: Some(logged.base.get()),
        ..found
    }
}

fn in_postgres(row: Row, now: Timestamp) -> Found {
    let found = match &row.entry {
        None => state("nothing"),
        Some(found) => entry(found, now),
    };
    Found {
        base: Some(row.base.get()),
        applied_to: Some(row.applied_to.get()),
        dead_version: row.dead.map(|dead| dead.version.get()),
        ..found
    }
}
