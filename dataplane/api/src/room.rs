//! Room for bodies: those of requests, bounded in bytes and in time, and the large answers; all of them together, too.

use std::{convert::Infallible, ops::Deref, sync::Arc, time::Duration};

use axum::{
    Extension,
    body::{Body, HttpBody, to_bytes},
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use birb_nest_http::Connection;
use bytes::{Bytes, BytesMut};
use futures::{StreamExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc},
    time::timeout,
};

use crate::{
    config::ApiConfig,
    error::{ApiError, Code},
    state::AppState,
};

/// An answer is handed on in parts of this size, so that a client that is slow to take them keeps its share of the room.
const PART: usize = 64 << 10;

/// What a body may have around its value: member names, metadata, blanks.
const ROOM_AROUND_VALUE: usize = 64 << 10;

/// A body, and its share of what all bodies together may take.
pub struct Held<'a> {
    bytes: Bytes,
    _room: SemaphorePermit<'a>,
}

impl Deref for Held<'_> {
    type Target = Bytes;

    fn deref(&self) -> &Bytes {
        &self.bytes
    }
}

/// The bytes that all bodies together may take: `API_MAX_BODIES_BYTES`, and at least one body of the largest kind.
pub fn of_all(config: &ApiConfig) -> Semaphore {
    let bytes = config
        .api_max_bodies_bytes
        .max(write_limit(config))
        .max(config.api_max_batch_bytes);
    Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))
}

/// Reads at most `limit` bytes within `API_BODY_TIMEOUT`.
///
/// # Errors
/// 413 beyond the limit, 408 beyond the time, 400 when the client broke off, 503 when all bodies together have no room
/// for this one.
pub async fn read<'a>(
    state: &'a AppState,
    headers: &HeaderMap,
    body: Body,
    limit: usize,
) -> Result<Held<'a>, ApiError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(too_large(limit));
    }
    let patience = state.config.api_body_timeout;
    timeout(patience, collect(&state.room, body, limit))
        .await
        .unwrap_or_else(|_| {
            Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                Code::Timeout,
                format!(
                    "the body did not arrive within {}",
                    humantime::format_duration(patience)
                ),
            ))
        })
}

async fn collect(all: &Semaphore, body: Body, limit: usize) -> Result<Held<'_>, ApiError> {
    let mut room = all.try_acquire_many(0).map_err(|_| no_room())?;
    let mut bytes = BytesMut::new();
    let mut chunks = body.into_data_stream();
    // Room is taken for what has arrived: a client that announces much and sends little keeps none from others.
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| ApiError::malformed("the body ended early", None))?;
        if bytes.len() + chunk.len() > limit {
            return Err(too_large(limit));
        }
        let n = u32::try_from(chunk.len()).map_err(|_| too_large(limit))?;
        room.merge(all.try_acquire_many(n).map_err(|_| no_room())?);
        bytes.extend_from_slice(&chunk);
    }
    Ok(Held {
        bytes: bytes.freeze(),
        _room: room,
    })
}

fn no_room() -> ApiError {
    ApiError::unavailable(
        "other requests take all the room there is; this request changed nothing",
        Duration::from_secs(1),
    )
}

/// The body of an answer to a read of one entry. One that its connection may not take at once has a share of the room of all
/// answers; smaller ones are bounded by how many requests a connection, and how many connections, there may be.
///
/// # Errors
/// 503 when there is no room.
pub fn answer(state: &AppState, bytes: Bytes, connection: Connection) -> Result<Body, ApiError> {
    if bytes.len() <= PART {
        return Ok(bytes.into());
    }
    let mut share = state.answers.share();
    share.grow_to(bytes.len())?;
    Ok(share.send(bytes, state.config.api_answer_timeout, connection))
}

/// Around all routes: other large answers need no room, since a write that happened is no error for lack of it; but their
/// clients, too, may leave them untaken for `API_ANSWER_TIMEOUT` only.
pub async fn patiently(
    State(state): State<AppState>,
    Extension(connection): Extension<Connection>,
    request: Request,
    next: Next,
) -> Response {
    let (mut head, body) = next.run(request).await.into_parts();
    // That of an answer that has its share is not known.
    let size = body.size_hint().exact();
    if size.is_none_or(|size| size <= PART as u64) {
        return Response::from_parts(head, body);
    }
    let Ok(bytes) = to_bytes(body, usize::MAX).await else {
        return ApiError::internal().into_response();
    };
    head.headers
        .insert(header::CONTENT_LENGTH, bytes.len().into());
    let body = send(bytes, None, state.config.api_answer_timeout, connection);
    Response::from_parts(head, body)
}

/// What large answers to reads may take together, as much as bodies may.
pub struct Answers {
    room: Arc<Semaphore>,
    capacity: usize,
}

impl Answers {
    /// Room of the size of [`of_all`].
    pub fn new(config: &ApiConfig) -> Self {
        let room = of_all(config);
        let capacity = room.available_permits();
        Self {
            room: Arc::new(room),
            capacity,
        }
    }

    /// The share of an answer that is empty yet.
    pub fn share(&self) -> Share<'_> {
        Share {
            all: self,
            permit: None,
        }
    }
}

/// The part of the room that one answer takes.
pub struct Share<'a> {
    all: &'a Answers,
    permit: Option<OwnedSemaphorePermit>,
}

impl Share<'_> {
    /// Takes room for an answer that has `n` bytes by now. One that is larger than all the room may have all of it.
    ///
    /// # Errors
    /// 503 when there is none.
    pub fn grow_to(&mut self, n: usize) -> Result<(), ApiError> {
        let has = self
            .permit
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits);
        let more = n.min(self.all.capacity).saturating_sub(has);
        let more = u32::try_from(more).map_err(|_| no_room())?;
        let more = Arc::clone(&self.all.room)
            .try_acquire_many_owned(more)
            .map_err(|_| no_room())?;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        Ok(())
    }

    /// A body that gives its room back once its client has taken all of it but the last part, or has taken none for
    /// `patience`: `connection` is closed then.
    pub fn send(self, bytes: Bytes, patience: Duration, connection: Connection) -> Body {
        send(bytes, self.permit, patience, connection)
    }
}

/// As [`Share::send`], with what there is of `room`.
fn send(
    bytes: Bytes,
    room: Option<OwnedSemaphorePermit>,
    patience: Duration,
    connection: Connection,
) -> Body {
    let (parts, taken) = mpsc::channel(1);
    // HTTP asks for no part while the client takes none; somebody else must look at the time.
    tokio::spawn(async move {
        for part in bytes.chunks(PART) {
            // A copy: a part of the whole would keep all of it alive.
            let part = Bytes::copy_from_slice(part);
            match timeout(patience, parts.send(part)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => break,
                Err(_) => {
                    tracing::debug!("closing a connection: its client takes no answer");
                    // Ending the body is not enough: an HTTP/2 client would keep what is on its way to it, and
                    // could have many more such answers.
                    connection.close();
                    break;
                }
            }
        }
        drop((bytes, room));
    });
    Body::from_stream(stream::unfold(taken, |mut taken| async move {
        let part = taken.recv().await?;
        Some((Ok::<_, Infallible>(part), taken))
    }))
}

fn too_large(limit: usize) -> ApiError {
    ApiError::too_large(format!("the body has more than {limit} bytes"))
}

/// Most bytes in the body of a single write.
pub fn write_limit(config: &ApiConfig) -> usize {
    config.api_max_value_bytes.saturating_add(ROOM_AROUND_VALUE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_grows_takes_what_it_has_come_to_and_no_more() {
        let room = Arc::new(Semaphore::new(1000));
        let answers = Answers {
            room: Arc::clone(&room),
            capacity: 1000,
        };
        let (mut one, mut other) = (answers.share(), answers.share());
        for n in [100, 250, 250, 600] {
            one.grow_to(n).expect("there is room");
            assert_eq!(room.available_permits(), 1000 - n);
        }
        assert!(other.grow_to(401).is_err());
        other.grow_to(400).expect("there is room for the rest");
        drop((one, other));
        assert_eq!(room.available_permits(), 1000);
        // One that is larger than all of it has all of it.
        answers.share().grow_to(5000).expect("there is room");
    }
}
