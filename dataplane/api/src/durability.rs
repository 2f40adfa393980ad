//! `Birb-Durability`: where a write has to be before it is answered.

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode},
    response::Response,
};
use birb_nest_core::{Key, Version};
use birb_nest_store::nest::Progress;

use crate::{error::ApiError, state::AppState};

/// In a request what is asked for, in its response what was reached.
const BIRB_DURABILITY: HeaderName = HeaderName::from_static("birb-durability");

/// Where a write is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Durability {
    /// In the log, where every acknowledged write is.
    Log,
    /// In PostgreSQL.
    Database,
}

impl Durability {
    /// What a request asks for, if it does.
    pub fn asked(headers: &HeaderMap) -> Result<Option<Self>, ApiError> {
        let mut values = headers.get_all(BIRB_DURABILITY).iter();
        let (first, second) = (values.next(), values.next());
        match (first.map(HeaderValue::as_bytes), second) {
            (None, _) => Ok(None),
            (Some(b"log"), None) => Ok(Some(Self::Log)),
            (Some(b"database"), None) => Ok(Some(Self::Database)),
            _ => Err(ApiError::invalid(
                BIRB_DURABILITY.as_str(),
                "`log` or `database` is expected",
            )),
        }
    }

    /// Says in a response what was reached.
    pub fn say(self, response: &mut Response) {
        response
            .headers_mut()
            .insert(BIRB_DURABILITY, HeaderValue::from_static(self.as_str()));
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Log => "log",
            Self::Database => "database",
        }
    }
}

/// A write that perhaps waits for PostgreSQL.
pub struct Wait {
    asked: Option<Durability>,
    progress: Option<Progress>,
}

impl Wait {
    /// Call it before the write, lest its announcement comes first.
    pub async fn begin(state: &AppState, key: &Key, asked: Option<Durability>) -> Self {
        let progress = match asked {
            Some(Durability::Database) => Some(state.nest.progress(key).await),
            Some(Durability::Log) | None => None,
        };
        Self { asked, progress }
    }

    /// Waits until `version` is where it was asked to be, and says in the response how far it has come: 202 if the time
    /// was over before that.
    pub async fn end(self, state: &AppState, version: Version, response: &mut Response) {
        let Some(asked) = self.asked else { return };
        let reached = self.reach(state, version).await;
        if reached != asked {
            *response.status_mut() = StatusCode::ACCEPTED;
        }
        reached.say(response);
    }

    /// Waits until `version` is where it was asked to be, or the time is over, and tells where it is.
    pub async fn reach(self, state: &AppState, version: Version) -> Durability {
        let Some(progress) = self.progress else {
            return Durability::Log;
        };
        let limit = state.config.durability_timeout();
        if progress.reaches(version, limit).await {
            Durability::Database
        } else {
            Durability::Log
        }
    }
}
