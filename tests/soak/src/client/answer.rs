//! What an answer means, of whatever was asked.

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Response, StatusCode, header::HeaderMap};
use serde_json::Value;

use crate::history::{Kind, Label, Outcome};

/// What an answer says of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub outcome: Outcome,
    pub version: u64,
    pub found: i64,
    pub label: Option<Label>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answered {
    /// It happened, or may have.
    With(Answer),
    /// Nothing happened.
    Nothing(String),
}

impl Answered {
    /// There is no answer, and nobody knows. Of a read there is nothing to know.
    pub fn unknown(kind: Kind) -> Self {
        if kind.is_read() {
            return Self::Nothing("no answer in time".to_owned());
        }
        Self::With(Answer {
            outcome: Outcome::Unknown,
            version: 0,
            found: 0,
            label: None,
        })
    }
}

/// What came of a request of this kind.
///
/// # Errors
/// What came must never come: it is not in docs/API.md.
pub(super) async fn understand(kind: Kind, sent: reqwest::Result<Response>) -> Result<Answered> {
    let response = match sent {
        Ok(response) => response,
        Err(error) if error.is_connect() || kind.is_read() => {
            return Ok(Answered::Nothing(error.to_string()));
        }
        Err(_) => return Ok(Answered::unknown(kind)),
    };
    let (status, headers) = (response.status(), response.headers().clone());
    // Broken off in the middle: whatever it was, it happened.
    let Ok(body) = response.text().await else {
        return Ok(Answered::unknown(kind));
    };
    meaning(kind, status, &headers, &body)
        .with_context(|| format!("{kind:?} was answered {status}: {body}"))
}

fn meaning(kind: Kind, status: StatusCode, headers: &HeaderMap, body: &str) -> Result<Answered> {
    if let Some(refused) = refusal(kind, status, headers, body)? {
        return Ok(refused);
    }
    let label = label_of(kind, header(headers, "birb-cache"))?;
    let etag = header(headers, "etag").map(|it| it.trim_matches('"').parse());
    let version = etag
        .transpose()
        .context("versions are numbers")?
        .unwrap_or(0);
    let outcome = match status {
        StatusCode::OK if kind.is_read() => Outcome::Ok,
        StatusCode::CREATED if kind.is_write() => Outcome::Ok,
        StatusCode::NO_CONTENT if kind.takes_away() => Outcome::Ok,
        // What is not there is known for certain, or not said.
        StatusCode::NOT_FOUND if label == Some(Label::Unconfirmed) => bail!("it is not sure"),
        StatusCode::NOT_FOUND if kind.is_read() || kind.takes_away() => Outcome::Absent,
        StatusCode::PRECONDITION_FAILED if kind.is_conditional() => Outcome::Mismatch,
        _ => bail!("it must not come"),
    };
    let mut found = 0;
    if outcome == Outcome::Ok && kind.is_read() {
        let entry: Value = serde_json::from_str(body).context("an entry is JSON")?;
        found = entry["value"].as_i64().context("values are numbers")?;
        ensure!(
            entry["version"].as_u64() == Some(version),
            "it has two versions"
        );
    }
    Ok(Answered::With(Answer {
        outcome,
        version,
        found,
        label,
    }))
}

/// What it means if a server could not be asked, or not in time; `None` if it is another answer.
fn refusal(
    kind: Kind,
    status: StatusCode,
    headers: &HeaderMap,
    body: &str,
) -> Result<Option<Answered>> {
    let is_late = status == StatusCode::GATEWAY_TIMEOUT;
    if status != StatusCode::SERVICE_UNAVAILABLE && !is_late {
        return Ok(None);
    }
    let error: Value = serde_json::from_str(body).context("an error is JSON")?;
    let code = error["code"].as_str().context("an error has a code")?;
    if !is_late {
        let wait: u64 = header(headers, "retry-after")
            .context("a 503 says when to try again")?
            .parse()?;
        ensure!(wait > 0, "to try again at once is of no use");
    }
    let meant = match code {
        "UNAVAILABLE" if !is_late => Answered::Nothing(body.to_owned()),
        "UNKNOWN_OUTCOME" if !is_late && !kind.is_read() => Answered::unknown(kind),
        "TIMEOUT" if is_late && kind.is_read() => Answered::unknown(kind),
        _ => bail!("{code} must not come"),
    };
    Ok(Some(meant))
}

/// What `Birb-Cache` says to such a request.
fn label_of(kind: Kind, label: Option<&str>) -> Result<Option<Label>> {
    Ok(match label {
        None => None,
        Some("unconfirmed") if kind == Kind::Plain => Some(Label::Unconfirmed),
        Some("pending") if kind != Kind::Plain => Some(Label::Pending),
        Some(label) => bail!("Birb-Cache: {label} must not come"),
    })
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNAVAILABLE: &str = r#"{"error":"no","code":"UNAVAILABLE"}"#;
    const UNKNOWN: &str = r#"{"error":"no","code":"UNKNOWN_OUTCOME"}"#;
    const TIMEOUT: &str = r#"{"error":"no","code":"TIMEOUT"}"#;
    const ENTRY: &str = r#"{"key":"k","value":7,"version":5}"#;

    fn judged(
        kind: Kind,
        status: u16,
        headers: &[(&'static str, &str)],
        body: &str,
    ) -> Result<Answered> {
        let headers = headers.iter().map(|(name, value)| {
            let name = reqwest::header::HeaderName::from_static(name);
            (name, value.parse().expect("a header"))
        });
        let status = StatusCode::from_u16(status).expect("a status");
        meaning(kind, status, &headers.collect(), body)
    }

    fn outcome(answered: Result<Answered>) -> Option<Outcome> {
        match answered {
            Ok(Answered::With(answer)) => Some(answer.outcome),
            Ok(Answered::Nothing(_)) | Err(_) => None,
        }
    }

    #[test]
    fn a_refusal_says_when_to_try_again_and_why() {
        let soon = [("retry-after", "1")];
        for kind in [Kind::Set, Kind::Delete, Kind::Read, Kind::Plain] {
            let refused = judged(kind, 503, &soon, UNAVAILABLE);
            assert_eq!(
                refused.ok(),
                Some(Answered::Nothing(UNAVAILABLE.to_owned()))
            );
            assert!(judged(kind, 503, &[], UNAVAILABLE).is_err(), "never again");
            assert!(judged(kind, 503, &[("retry-after", "0")], UNAVAILABLE).is_err());
            for body in ["", "{}", r#"{"code":"INTERNAL_ERROR"}"#, TIMEOUT] {
                assert!(judged(kind, 503, &soon, body).is_err(), "{body}");
            }
            assert!(judged(kind, 500, &soon, UNAVAILABLE).is_err());
            assert!(judged(kind, 429, &soon, UNAVAILABLE).is_err());
        }
        // Of a read there is nothing that nobody knows; a write is never just late.
        let unknown = judged(Kind::Set, 503, &soon, UNKNOWN);
        assert_eq!(outcome(unknown), Some(Outcome::Unknown));
        assert!(judged(Kind::Plain, 503, &soon, UNKNOWN).is_err());
        let late = judged(Kind::Plain, 504, &[], TIMEOUT);
        assert!(matches!(late, Ok(Answered::Nothing(_))));
        assert!(judged(Kind::Set, 504, &[], TIMEOUT).is_err());
    }

    #[test]
    fn an_answer_is_one_that_its_question_may_have() {
        let tag = [("etag", "\"5\"")];
        let ok = Some(Outcome::Ok);
        assert_eq!(outcome(judged(Kind::Read, 200, &tag, ENTRY)), ok);
        assert_eq!(outcome(judged(Kind::Set, 201, &tag, ENTRY)), ok);
        assert_eq!(outcome(judged(Kind::Delete, 204, &[], "")), ok);
        assert!(judged(Kind::Set, 200, &tag, ENTRY).is_err());
        assert!(judged(Kind::Set, 404, &[], "").is_err());
        assert!(judged(Kind::Set, 412, &tag, "").is_err());
        assert_eq!(
            outcome(judged(Kind::Swap, 412, &tag, "")),
            Some(Outcome::Mismatch)
        );
        assert_eq!(
            outcome(judged(Kind::Plain, 404, &[], "")),
            Some(Outcome::Absent)
        );
        let other = [("etag", "\"6\"")];
        assert!(
            judged(Kind::Read, 200, &other, ENTRY).is_err(),
            "two versions"
        );
    }

    #[test]
    fn a_label_is_one_that_its_question_may_have() {
        let labelled = |kind, status, label: &str| {
            let headers = [("etag", "\"5\""), ("birb-cache", label)];
            judged(kind, status, &headers, ENTRY).is_ok()
        };
        assert!(labelled(Kind::Plain, 200, "unconfirmed"));
        assert!(labelled(Kind::Set, 201, "pending"));
        assert!(labelled(Kind::Read, 200, "pending"));
        assert!(
            !labelled(Kind::Read, 200, "unconfirmed"),
            "no-cache is sure"
        );
        assert!(!labelled(Kind::Set, 201, "unconfirmed"));
        assert!(!labelled(Kind::Plain, 200, "pending"));
        assert!(!labelled(Kind::Plain, 200, "stale"));
        assert!(!labelled(Kind::Plain, 404, "unconfirmed"), "a false 404");
    }
}
