//! Several keys in one request: an operation for each, all in the same time.

use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail, ensure};
use reqwest::StatusCode;
use serde_json::{Value, json};

use super::{
    ATTEMPTS, Client, SHOCK,
    answer::{Answered, Said, understand_each},
};
use crate::{
    cold::BATCH,
    history::{Kind, Operation, Outcome},
};

impl Client {
    /// Sets, deletes or reads all of `keys`, which must differ; tells whether there was an answer for each.
    ///
    /// # Errors
    /// As [`Client::work`].
    pub async fn ask_together(&mut self, kind: Kind, keys: &[String], api: usize) -> Result<bool> {
        let asked = self.request_together(kind, keys, api).await?;
        let is_answered =
            |it: &Option<Operation>| it.as_ref().is_some_and(|it| it.outcome != Outcome::Unknown);
        Ok(asked.iter().all(is_answered))
    }

    /// Asks for all of `keys` at once, as [`Client::make_sure`].
    ///
    /// # Errors
    /// Of any of them there is no answer that is sure of itself.
    pub async fn make_sure_of_many(&mut self, keys: &[String], api: usize) -> Result<()> {
        for keys in keys.chunks(BATCH) {
            let mut open = keys.to_vec();
            for n in 0..ATTEMPTS {
                if n > 0 {
                    tokio::time::sleep(SHOCK).await;
                }
                let asked = self.request_together(Kind::Plain, &open, api).await?;
                let is_sure =
                    |it: &Option<Operation>| it.as_ref().is_some_and(|it| it.label.is_none());
                let mut sure = asked.iter().map(is_sure);
                open.retain(|_| sure.next() == Some(false));
                if open.is_empty() {
                    break;
                }
            }
            ensure!(
                open.is_empty(),
                "{open:?} cannot be read in the end, or not for sure"
            );
        }
        Ok(())
    }

    /// What came of each, which is written down; `None` for what failed.
    async fn request_together(
        &mut self,
        kind: Kind,
        keys: &[String],
        api: usize,
    ) -> Result<Vec<Option<Operation>>> {
        let first = self.values.fetch_add(keys.len() as i64, Ordering::Relaxed);
        let values = first..;
        let (route, body) = match kind {
            Kind::Set => {
                let entry = |(key, value): (&String, i64)| json!({ "key": key, "value": value });
                let entries: Vec<Value> = keys.iter().zip(values.clone()).map(entry).collect();
                ("set", json!({ "entries": entries }))
            }
            Kind::Delete => ("delete", json!({ "keys": keys })),
            Kind::Plain => ("get", json!({ "keys": keys })),
            kind => bail!("there is no {kind:?} of many"),
        };
        let request = self
            .http
            .post(format!("{}/v1/cache/batch/{route}", self.urls[api]))
            .header("content-type", "application/json")
            .body(body.to_string());
        let call = self.history.now();
        let answers = understand_each(kind, keys, request.send().await).await;
        let end = self.history.now();
        let answers = answers.with_context(|| format!("of {keys:?}"))?;
        let mut done = Vec::new();
        for ((key, value), answer) in keys.iter().zip(values).zip(answers) {
            let asked = Operation {
                client: self.id,
                api,
                key: key.clone(),
                kind,
                value,
                ttl: 0,
                expected: 0,
                call,
                end,
                outcome: Outcome::Unknown,
                version: 0,
                found: 0,
                label: None,
                is_batched: true,
            };
            let operation = self.conclude(asked, answer);
            if let Some(operation) = &operation {
                self.learn(operation);
                self.history.add(operation.clone());
            }
            done.push(operation);
        }
        Ok(done)
    }
}

/// What an answer for many says of each of `keys`.
pub(super) fn each(
    kind: Kind,
    keys: &[String],
    label: Option<&str>,
    body: &Value,
) -> Result<Vec<Answered>> {
    if kind == Kind::Plain {
        return keys.iter().map(|key| read(key, label, body)).collect();
    }
    let results = body["results"].as_array().context("it has results")?;
    ensure!(results.len() == keys.len(), "there is no result for each");
    let is_any_pending = results.iter().any(|it| it["cache"] == "pending");
    ensure!(
        is_any_pending == (label == Some("pending")),
        "its header says something else than its results"
    );
    let of = |(key, result): (&String, &Value)| {
        ensure!(result["key"] == **key, "they are in another order");
        let status = result["status"].as_u64().context("it has a status")?;
        let said = Said {
            status: status.try_into()?,
            code: result["code"].as_str(),
            label: result["cache"].as_str(),
            version: result["version"].as_u64(),
            entry: &Value::Null,
        };
        said.meaning(kind)
    };
    keys.iter().zip(results).map(of).collect()
}

/// What an answer for many says of one that was read.
fn read(key: &str, label: Option<&str>, body: &Value) -> Result<Answered> {
    let (entry, error) = (&body["entries"][key], &body["errors"][key]);
    let missing = body["missing"]
        .as_array()
        .context("it says what is missing")?;
    let is_missing = missing.iter().any(|it| *it == *key);
    let n = [entry.is_object(), is_missing, error.is_object()];
    ensure!(
        n.iter().filter(|it| **it).count() == 1,
        "a key is in exactly one of the three"
    );
    let said = Said {
        status: match n {
            [true, ..] => StatusCode::OK,
            [_, true, _] => StatusCode::NOT_FOUND,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        }
        .as_u16(),
        code: error["code"].as_str(),
        // That of any of the entries, it does not say which.
        label: label.filter(|_| !is_missing),
        version: entry["version"].as_u64(),
        entry,
    };
    said.meaning(Kind::Plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes(kind: Kind, label: Option<&str>, body: &Value) -> Option<Vec<Option<Outcome>>> {
        let keys = ["a", "b"].map(str::to_owned);
        let each = each(kind, &keys, label, body).ok()?;
        let outcome = |it| match it {
            Answered::With(answer) => Some(answer.outcome),
            Answered::Nothing(_) => None,
        };
        Some(each.into_iter().map(outcome).collect())
    }

    #[test]
    fn each_key_is_read_as_it_is_said() {
        let entry = json!({ "value": 7, "version": 5 });
        let body = json!({ "entries": { "a": entry }, "missing": ["b"], "errors": {} });
        let right = Some(vec![Some(Outcome::Ok), Some(Outcome::Absent)]);
        assert_eq!(outcomes(Kind::Plain, None, &body), right);
        assert_eq!(outcomes(Kind::Plain, Some("unconfirmed"), &body), right);
        assert_eq!(outcomes(Kind::Plain, Some("pending"), &body), None);
        let error = json!({ "code": "UNAVAILABLE" });
        let body = json!({ "entries": { "a": entry }, "missing": [], "errors": { "b": error } });
        let right = Some(vec![Some(Outcome::Ok), None]);
        assert_eq!(outcomes(Kind::Plain, None, &body), right);
        for missing in [json!([]), json!(["a", "b"])] {
            let body = json!({ "entries": { "a": entry }, "missing": missing, "errors": {} });
            assert_eq!(outcomes(Kind::Plain, None, &body), None, "{body}");
        }
        let body = json!({ "entries": { "a": entry }, "missing": [], "errors": { "b": { "code": "INTERNAL_ERROR" } } });
        assert_eq!(outcomes(Kind::Plain, None, &body), None);
    }

    #[test]
    fn each_write_is_done_as_it_is_said() {
        let result = |key: &str, status: u16| json!({ "key": key, "status": status, "version": 5 });
        let pending = json!({ "key": "b", "status": 201, "version": 6, "cache": "pending" });
        let refused = json!({ "key": "b", "status": 503, "code": "UNAVAILABLE" });
        let open = json!({ "key": "b", "status": 503, "code": "UNKNOWN_OUTCOME" });
        let gone = json!({ "key": "b", "status": 404, "code": "NOT_FOUND" });
        let judged = |kind, label, results: [&Value; 2]| {
            outcomes(kind, label, &json!({ "results": results }))
        };
        let (set, ok) = (result("a", 201), Some(Outcome::Ok));
        let after = |outcome| Some(vec![ok, outcome]);
        assert_eq!(
            judged(Kind::Set, Some("pending"), [&set, &pending]),
            after(ok)
        );
        assert_eq!(
            judged(Kind::Set, None, [&set, &pending]),
            None,
            "it does not say so"
        );
        assert_eq!(judged(Kind::Set, None, [&set, &refused]), after(None));
        assert_eq!(
            judged(Kind::Set, None, [&set, &open]),
            after(Some(Outcome::Unknown))
        );
        assert_eq!(judged(Kind::Set, None, [&set, &gone]), None);
        assert_eq!(judged(Kind::Set, None, [&set, &set]), None, "another key");
        let deleted = result("a", 204);
        assert_eq!(
            judged(Kind::Delete, None, [&deleted, &gone]),
            after(Some(Outcome::Absent))
        );
        assert_eq!(judged(Kind::Delete, None, [&set, &gone]), None);
    }
}
