//! What an answer means, of whatever was asked.

use anyhow::{Context, Result, bail, ensure};
use reqwest::{Response, StatusCode, header::HeaderMap};
use serde_json::Value;

use super::batch::each;
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
    alone(kind, status, &headers, &body)
        .with_context(|| format!("{kind:?} was answered {status}: {body}"))
}

/// What came of a request for many.
///
/// # Errors
/// What came must never come.
pub(super) async fn understand_each(
    kind: Kind,
    keys: &[String],
    sent: reqwest::Result<Response>,
) -> Result<Vec<Answered>> {
    let response = match sent {
        Ok(response) if response.status() == StatusCode::OK => response,
        // What is said of all is said of each.
        sent => return Ok(vec![understand(kind, sent).await?; keys.len()]),
    };
    let headers = response.headers().clone();
    let Ok(body) = response.text().await else {
        return Ok(vec![Answered::unknown(kind); keys.len()]);
    };
    let parsed = serde_json::from_str(&body).context("an answer is JSON")?;
    each(kind, keys, header(&headers, "birb-cache"), &parsed)
        .with_context(|| format!("{kind:?} of many was answered {body}"))
}

/// The meaning of a response.
fn alone(kind: Kind, status: StatusCode, headers: &HeaderMap, body: &str) -> Result<Answered> {
    if status == StatusCode::SERVICE_UNAVAILABLE {
        let wait = header(headers, "retry-after").context("a 503 says when to try again")?;
        ensure!(
            wait.parse::<u64>()? > 0,
            "to try again at once is of no use"
        );
    }
    let body = match body {
        "" => Value::Null,
        body => serde_json::from_str(body).context("an answer is JSON")?,
    };
    let etag = header(headers, "etag").map(|it| it.trim_matches('"').parse());
    let said = Said {
        status: status.as_u16(),
        code: body["code"].as_str(),
        label: header(headers, "birb-cache"),
        version: etag.transpose().context("versions are numbers")?,
        entry: &body,
    };
    said.meaning(kind)
}

/// What is said of one key, alone or among others.
#[derive(Debug)]
pub(super) struct Said<'a> {
    pub status: u16,
    pub code: Option<&'a str>,
    pub label: Option<&'a str>,
    pub version: Option<u64>,
    /// Of what was read or touched.
    pub entry: &'a Value,
}

impl Said<'_> {
    /// What it means to a request of this kind.
    ///
    /// # Errors
    /// It must never come.
    pub fn meaning(&self, kind: Kind) -> Result<Answered> {
        match (self.status, self.code) {
            (503, Some("UNAVAILABLE")) => {
                return Ok(Answered::Nothing("503 UNAVAILABLE".to_owned()));
            }
            (503, Some("UNKNOWN_OUTCOME")) if !kind.is_read() => {
                return Ok(Answered::unknown(kind));
            }
            (504, Some("TIMEOUT")) if kind.is_read() => return Ok(Answered::unknown(kind)),
            (503 | 504, code) => bail!("{code:?} must not come"),
            _ => {}
        }
        let label = match self.label {
            None => None,
            Some("unconfirmed") if kind == Kind::Plain => Some(Label::Unconfirmed),
            Some("pending") if kind != Kind::Plain => Some(Label::Pending),
            Some(label) => bail!("Birb-Cache: {label} must not come"),
        };
        let has_entry = kind.is_read() || kind == Kind::Touch;
        let outcome = match self.status {
            200 if has_entry => Outcome::Ok,
            201 if kind.is_write() => Outcome::Ok,
            204 if kind.takes_away() => Outcome::Ok,
            // What is not there is known for certain, or not said.
            404 if label == Some(Label::Unconfirmed) => bail!("it is not sure"),
            404 if has_entry || kind == Kind::Delete => Outcome::Absent,
            412 if kind.is_conditional() => Outcome::Mismatch,
            _ => bail!("it must not come"),
        };
        // A delete has none that anybody could ask for.
        let version = self
            .version
            .filter(|_| !(kind.takes_away() && outcome == Outcome::Ok));
        let mut found = 0;
        if outcome == Outcome::Ok && has_entry {
            found = self.entry["value"].as_i64().context("values are numbers")?;
            ensure!(
                self.entry["version"].as_u64() == version,
                "it has two versions"
            );
        }
        ensure!(
            version.is_some() || outcome != Outcome::Ok || kind.takes_away(),
            "it has no version"
        );
        Ok(Answered::With(Answer {
            outcome,
            version: version.unwrap_or(0),
            found,
            label,
        }))
    }
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
        alone(kind, status, &headers.collect(), body)
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
            assert!(matches!(refused, Ok(Answered::Nothing(_))));
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
        assert!(judged(Kind::Set, 201, &[], ENTRY).is_err(), "no version");
        assert_eq!(outcome(judged(Kind::Touch, 200, &tag, ENTRY)), ok);
        assert!(judged(Kind::Touch, 412, &tag, "").is_err());
        assert_eq!(outcome(judged(Kind::Remove, 204, &[], "")), ok);
        assert!(
            judged(Kind::Remove, 404, &[], "").is_err(),
            "nothing has a version"
        );
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
