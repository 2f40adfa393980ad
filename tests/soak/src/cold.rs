//! Keys that are left alone after one change or two, so that what a fault does to them is still there when somebody looks.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rand::{Rng, rngs::StdRng};
use reqwest::{RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::{
    client::Client,
    history::Kind,
    stores::{Row, Rows},
};

/// Among how many the next one is that is changed a second time.
const N_WAITING: usize = 12;
/// `API_MAX_BATCH`.
const BATCH: usize = 100;

/// A version and a value.
pub type Found = Option<(u64, i64)>;

/// What earlier rounds left behind: nobody writes it again, so it is the same for ever.
#[derive(Default)]
pub struct Memory {
    /// What PostgreSQL has of each; nothing of what was never written, or deleted before it was stored.
    left: Vec<(String, Option<Row>)>,
}

impl Memory {
    /// Takes over what a round left behind.
    pub fn keep(&mut self, keys: impl IntoIterator<Item = String>, rows: &Rows) {
        let row = |key: String| {
            let row = rows.get(&key).cloned();
            (key, row)
        };
        self.left.extend(keys.into_iter().map(row));
    }

    /// Whether all of it is still what it was.
    ///
    /// # Errors
    /// What has changed.
    pub fn is_in(&self, rows: &Rows) -> Result<()> {
        for (key, was) in &self.left {
            let is = rows.get(key);
            let was_deleted = was.as_ref().is_none_or(|row| row.is_deleted);
            ensure!(
                is == was.as_ref() || (is.is_none() && was_deleted),
                "what an earlier round left behind has changed: {key} was {was:?} in PostgreSQL, and is {is:?}"
            );
        }
        Ok(())
    }

    /// Asks an API for a hundred of them at once.
    ///
    /// # Errors
    /// It has no answer, or another one than it must have.
    pub async fn is_served(&self, url: &str, random: &mut StdRng) -> Result<()> {
        let picked: HashMap<&str, &Option<Row>> = (0..BATCH.min(self.left.len()))
            .filter_map(|_| self.pick(random))
            .map(|(key, row)| (key.as_str(), row))
            .collect();
        let keys: Vec<String> = picked.keys().map(|&key| key.to_owned()).collect();
        let found = read_many(&reqwest::Client::new(), url, &keys).await?;
        for (key, found) in found {
            is_left(&key, picked[key.as_str()].as_ref(), found)?;
        }
        Ok(())
    }

    fn pick(&self, random: &mut StdRng) -> Option<&(String, Option<Row>)> {
        let n = self.left.len();
        (n > 0).then(|| &self.left[random.random_range(0..n)])
    }
}

/// Writes fresh keys, changes two of three once more a while later, and reads what earlier rounds left behind, until `stop`.
/// Returns the keys.
///
/// # Errors
/// As [`Client::work`]; or what was left behind has changed.
pub async fn leave_behind(
    client: &mut Client,
    (name, most): (&str, usize),
    urls: &[String; 2],
    memory: &Memory,
    random: &mut StdRng,
    stop: &AtomicBool,
) -> Result<Vec<String>> {
    let http = reqwest::Client::builder()
        .timeout(Duration::from_secs(1))
        .build()?;
    let (mut keys, mut waiting) = (Vec::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let api = random.random_range(0..2);
        let mut was_answered = true;
        if random.random_ratio(1, 4)
            && let Some((key, row)) = memory.pick(random)
        {
            let read = http.get(format!("{}/v1/cache/{key}", urls[api]));
            let past_redis = random.random();
            look(read, past_redis, key, row.as_ref()).await?;
        } else if keys.len() < most && waiting.len() < N_WAITING {
            let key = format!("{name}-{}", keys.len());
            let kind = if random.random() {
                Kind::Set
            } else {
                Kind::Create
            };
            was_answered = client.ask(kind, &key, api).await?;
            match random.random_range(0..3) {
                0 => {}
                1 => waiting.push((key.clone(), Kind::Set)),
                _ => waiting.push((key.clone(), Kind::Delete)),
            }
            keys.push(key);
        } else if !waiting.is_empty() {
            let (key, kind) = waiting.swap_remove(random.random_range(0..waiting.len()));
            was_answered = client.ask(kind, &key, api).await?;
        }
        let pause = random.random_range(if was_answered { 3..12 } else { 50..150 });
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    Ok(keys)
}

/// Reads one that was left behind: there may be no answer, or one that is not sure of itself, but not another one.
async fn look(
    mut read: RequestBuilder,
    past_redis: bool,
    key: &str,
    row: Option<&Row>,
) -> Result<()> {
    if past_redis {
        read = read.header("cache-control", "no-cache");
    }
    let Ok(answer) = read.send().await else {
        return Ok(());
    };
    let status = answer.status();
    if answer.headers().contains_key("birb-cache") {
        return Ok(());
    }
    let Ok(body) = answer.text().await else {
        return Ok(());
    };
    match status {
        StatusCode::OK => {
            let entry: Value = serde_json::from_str(&body).context("an entry is JSON")?;
            is_left(key, row, Some(found(&entry)?))
        }
        StatusCode::NOT_FOUND => is_left(key, row, None),
        _ => Ok(()),
    }
}

fn is_left(key: &str, row: Option<&Row>, found: Found) -> Result<()> {
    let must = row.and_then(Row::found);
    ensure!(
        found == must,
        "what an earlier round left behind is read as something else: {key} must be {must:?}, and is {found:?}"
    );
    Ok(())
}

/// Asks for many keys at once, which must all be known for certain.
///
/// # Errors
/// There is no such answer.
pub async fn read_many(
    http: &reqwest::Client,
    url: &str,
    keys: &[String],
) -> Result<Vec<(String, Found)>> {
    let mut all = Vec::with_capacity(keys.len());
    for keys in keys.chunks(BATCH) {
        let request = http
            .post(format!("{url}/v1/cache/batch/get"))
            .header("content-type", "application/json")
            .body(json!({ "keys": keys }).to_string());
        let answer = request.send().await?;
        let label = answer.headers().get("birb-cache").cloned();
        let body = answer.error_for_status()?.text().await?;
        ensure!(label.is_none(), "a batch is {label:?} after all was healed");
        let body: Value = serde_json::from_str(&body).context("a batch is JSON")?;
        let missing = body["missing"]
            .as_array()
            .context("it says what is missing")?;
        for key in keys {
            let entry = &body["entries"][key];
            let is_missing = missing.iter().any(|it| it == key);
            ensure!(
                entry.is_object() != is_missing,
                "{key} cannot be read in the end: {}",
                body["errors"]
            );
            let found = entry.is_object().then(|| found(entry)).transpose()?;
            all.push((key.clone(), found));
        }
    }
    Ok(all)
}

fn found(entry: &Value) -> Result<(u64, i64)> {
    let version = entry["version"].as_u64();
    let value = entry["value"].as_i64();
    version
        .zip(value)
        .context("versions and values are numbers")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(version: u64, is_deleted: bool) -> Row {
        Row {
            version,
            is_deleted,
            is_expired: false,
            expires: false,
            value: (!is_deleted).then(|| Value::from(7)),
        }
    }

    #[test]
    fn what_was_left_behind_stays_as_it_was() {
        let keys = ["there", "gone", "never"].map(str::to_owned);
        let rows = || {
            let [there, gone, _] = keys.clone();
            Rows::from([(there, row(5, false)), (gone, row(6, true))])
        };
        let mut memory = Memory::default();
        memory.keep(keys.clone(), &rows());
        assert!(memory.is_in(&rows()).is_ok());
        let changed = |key: &str, is: Option<Row>| {
            let mut rows = rows();
            match is {
                Some(row) => rows.insert(key.to_owned(), row),
                None => rows.remove(key),
            };
            memory.is_in(&rows).is_err()
        };
        assert!(changed("there", None) && changed("there", Some(row(4, false))));
        assert!(changed("there", Some(row(6, true))));
        assert!(changed("gone", Some(row(5, false))));
        assert!(changed("never", Some(row(7, false))));
        assert!(!changed("gone", None), "the janitor came by");
        assert!(is_left("there", Some(&row(5, false)), Some((5, 7))).is_ok());
        for other in [None, Some((4, 7)), Some((5, 8))] {
            assert!(is_left("there", Some(&row(5, false)), other).is_err());
        }
        assert!(is_left("gone", Some(&row(6, true)), None).is_ok());
        assert!(is_left("gone", Some(&row(6, true)), Some((5, 7))).is_err());
        assert!(is_left("never", None, Some((5, 7))).is_err());
    }
}
