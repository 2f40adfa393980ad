//! Every error a client can get.

use std::{borrow::Cow, time::Duration};

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use birb_nest_core::{KeyError, Version};
use birb_nest_store::nest::NestError;
use serde::Serialize;
use utoipa::ToSchema;

/// The stable codes of docs/API.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    InvalidRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    NotAcceptable,
    UnsupportedMediaType,
    VersionMismatch,
    TooLarge,
    RateLimited,
    Timeout,
    InternalError,
    Unavailable,
    UnknownOutcome,
}

/// An error on its way to a client. The envelope turns it into the body, with the request's id.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    pub code: Code,
    pub message: Cow<'static, str>,
    pub details: Option<Box<str>>,
    pub field: Option<String>,
    pub retry_after: Option<Duration>,
    /// The version the key has, where that is what went wrong.
    pub version: Option<Version>,
    /// What really happened: for the log, never for clients.
    pub cause: Option<Box<str>>,
}

/// The body of docs/API.md.
#[derive(Serialize)]
struct Body<'a> {
    error: &'a str,
    code: Code,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
    request_id: &'a str,
}

impl ApiError {
    pub fn new(status: StatusCode, code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            details: None,
            field: None,
            retry_after: None,
            version: None,
            cause: None,
        }
    }

    /// 400: what the client sent breaks a rule; `field` names where.
    pub fn invalid(field: impl Into<String>, message: impl Into<Cow<'static, str>>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, Code::InvalidRequest, message);
        error.field = Some(field.into());
        error
    }

    /// 400: the body as a whole is not what it should be.
    pub fn malformed(
        message: impl Into<Cow<'static, str>>,
        details: impl Into<Option<String>>,
    ) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, Code::InvalidRequest, message);
        error.details = details.into().map(String::into_boxed_str);
        error
    }

    /// 413.
    pub fn too_large(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, Code::TooLarge, message)
    }

    /// 404: the key has no value.
    pub fn no_entry() -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            Code::NotFound,
            "the key has no value",
        )
    }

    /// 412: the condition does not hold; `current` is what the key has, if it has a value.
    pub fn mismatch(current: Option<Version>) -> Self {
        let message = match current {
            Some(_) => "the condition does not hold: `ETag` has the key's version",
            None => "the condition does not hold: the key has no value",
        };
        let mut error = Self::new(
            StatusCode::PRECONDITION_FAILED,
            Code::VersionMismatch,
            message,
        );
        error.version = current;
        error
    }

    /// 503: certainly nothing happened.
    pub fn unavailable(message: impl Into<Cow<'static, str>>, retry_after: Duration) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable, message);
        error.retry_after = Some(retry_after);
        error
    }

    /// 503: a write may or may not have happened.
    pub fn unknown_outcome() -> Self {
        let mut error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            Code::UnknownOutcome,
            "the write may or may not have happened",
        );
        error.retry_after = Some(Duration::from_secs(1));
        error
    }

    /// 500: a defect of ours.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            Code::InternalError,
            "this is a defect of the service; its log has the details under the request id",
        )
    }

    /// The error of a key that breaks a rule; `field` is where it stood.
    pub fn key(field: impl Into<String>, error: KeyError) -> Self {
        let mut invalid = Self::invalid(field, error.to_string());
        if matches!(error, KeyError::TooLong(_)) {
            invalid.status = StatusCode::URI_TOO_LONG;
        }
        invalid
    }

    /// The response with the body for the request called `request_id`.
    pub fn render(&self, request_id: &str) -> Response {
        let body = serde_json::to_vec(&Body {
            error: &self.message,
            code: self.code,
            details: self.details.as_deref(),
            field: self.field.as_deref(),
            request_id,
        })
        .expect("strings become JSON");
        let mut response = (self.status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(version) = self.version {
            headers.insert(header::ETAG, etag(version));
        }
        if let Some(wait) = self.retry_after {
            headers.insert(
                header::RETRY_AFTER,
                HeaderValue::from(wait.as_secs().max(1)),
            );
        }
        response
    }
}

impl From<NestError> for ApiError {
    fn from(error: NestError) -> Self {
        // Clients get neither hosts nor other servers' words.
        let cause = error.to_string();
        let mut error = match error {
            NestError::Unavailable(_) | NestError::Gone(_) => Self::unavailable(
                "a server this needs cannot be reached now; the request changed nothing",
                Duration::from_secs(1),
            ),
            NestError::Full => Self::unavailable(
                "the log is full until workers have stored what is in it; the request changed nothing",
                Duration::from_secs(5),
            ),
            NestError::Mismatch(current) => Self::mismatch(current),
            NestError::UnknownOutcome(_) => Self::unknown_outcome(),
        };
        error.cause = Some(cause.into());
        error
    }
}

/// The entity tag of a version.
pub fn etag(version: Version) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).expect("digits in quotes are a header value")
}

/// Hands the error to the envelope, which knows the request's id.
impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}
