//! Keys that are left alone after one change or two, so that what a fault does to them is still there when somebody looks.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rand::{Rng, rngs::StdRng};
use serde_json::{Value, json};

use crate::{
    client::{ATTEMPTS, Client, SHOCK},
    history::{Kind, Label, Operation},
    stores::{Row, Rows},
};

/// Among how many the next one is that is changed a second time.
const N_WAITING: usize = 12;
/// `API_MAX_BATCH`.
pub(crate) const BATCH: usize = 100;

/// A version and a value.
pub type Found = Option<(u64, i64)>;

/// What earlier rounds left behind: nobody writes it again, so it is the same for ever.
#[derive(Default)]
pub struct Memory {
    left: Vec<Left>,
}

/// A key that was left behind.
struct Left {
    key: String,
    /// What PostgreSQL has of it; nothing of what was never written.
    row: Option<Row>,
    /// All that anybody wrote to it, or may have.
    values: Vec<i64>,
}

impl Memory {
    /// Takes over what a round left behind.
    pub fn keep(
        &mut self,
        keys: impl IntoIterator<Item = String>,
        rows: &Rows,
        operations: &[Operation],
    ) {
        let mut values: HashMap<&str, Vec<i64>> = HashMap::new();
        for it in operations.iter().filter(|it| it.kind.is_write()) {
            values.entry(&it.key).or_default().push(it.value);
        }
        self.left.extend(keys.into_iter().map(|key| Left {
            row: rows.get(&key).cloned(),
            values: values.remove(key.as_str()).unwrap_or_default(),
            key,
        }));
    }

    /// Whether all of it is still what it was.
    ///
    /// # Errors
    /// What has changed.
    pub fn is_in(&self, rows: &Rows) -> Result<()> {
        for Left { key, row: was, .. } in &self.left {
            let is = rows.get(key);
            let was_deleted = was.as_ref().is_none_or(|row| row.is_deleted);
            ensure!(
                is == was.as_ref() || (is.is_none() && was_deleted),
                "what an earlier round left behind has changed: {key} was {was:?} in PostgreSQL, and is {is:?}"
            );
        }
        Ok(())
    }

    /// Asks an API for a hundred of them at once, until it is sure of its answer.
    ///
    /// # Errors
    /// It has no such answer, or another one than it must have.
    pub async fn is_served(&self, url: &str, random: &mut StdRng) -> Result<()> {
        let picked: HashMap<&str, &Left> = (0..BATCH.min(self.left.len()))
            .filter_map(|_| self.pick(random))
            .map(|left| (left.key.as_str(), left))
            .collect();
        let keys: Vec<String> = picked.keys().map(|&key| key.to_owned()).collect();
        let http = reqwest::Client::new();
        let mut found = read_many(&http, url, &keys).await;
        for _ in 1..ATTEMPTS {
            if found.is_ok() {
                break;
            }
            tokio::time::sleep(SHOCK).await;
            found = read_many(&http, url, &keys).await;
        }
        for (key, found) in found? {
            picked[key.as_str()].shows(found, None)?;
        }
        Ok(())
    }

    fn pick(&self, random: &mut StdRng) -> Option<&Left> {
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
    memory: &Memory,
    random: &mut StdRng,
    stop: &AtomicBool,
) -> Result<Vec<String>> {
    let (mut keys, mut waiting) = (Vec::new(), Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let api = random.random_range(0..2);
        let mut was_answered = true;
        if random.random_ratio(1, 4)
            && let Some(left) = memory.pick(random)
        {
            let kind = if random.random() {
                Kind::Read
            } else {
                Kind::Plain
            };
            match client.look(kind, &left.key, api).await? {
                Some(look) => left.shows(look.shown(), look.label)?,
                None => was_answered = false,
            }
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

impl Left {
    /// Whether it may be read as that. Only who could not be sure, and said so, may show something older: a value that the key
    /// once had, never one that is newer or of another key, and never nothing.
    fn shows(&self, found: Found, label: Option<Label>) -> Result<()> {
        let must = self.row.as_ref().and_then(Row::found);
        let is_older = |(version, value): (u64, i64)| {
            let newest = self.row.as_ref().map(|row| row.version);
            self.values.contains(&value) && newest.is_none_or(|newest| version < newest)
        };
        let is_excused = label == Some(Label::Unconfirmed) && found.is_some_and(is_older);
        ensure!(
            found == must || is_excused,
            "what an earlier round left behind is read as something else: {} must be {must:?}, and is {found:?} ({label:?})",
            self.key
        );
        Ok(())
    }
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
            left: None,
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
        memory.keep(keys.clone(), &rows(), &[]);
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
    }

    #[test]
    fn what_was_left_behind_is_read_as_it_was() {
        let left = |row| Left {
            key: "k".to_owned(),
            row,
            values: vec![6, 7],
        };
        let there = left(Some(row(5, false)));
        let (gone, never) = (left(Some(row(6, true))), left(None));
        for label in [None, Some(Label::Pending), Some(Label::Unconfirmed)] {
            assert!(there.shows(Some((5, 7)), label).is_ok());
            assert!(gone.shows(None, label).is_ok());
            for other in [None, Some((5, 6)), Some((6, 6)), Some((4, 9))] {
                assert!(there.shows(other, label).is_err(), "{other:?} {label:?}");
            }
            // Who is not sure may show what the key once had.
            let is_unsure = label == Some(Label::Unconfirmed);
            assert_eq!(there.shows(Some((4, 6)), label).is_ok(), is_unsure);
            assert_eq!(gone.shows(Some((5, 7)), label).is_ok(), is_unsure);
            assert_eq!(never.shows(Some((5, 7)), label).is_ok(), is_unsure);
            assert!(gone.shows(Some((7, 7)), label).is_err());
            assert!(never.shows(Some((5, 9)), label).is_err());
        }
    }
}
