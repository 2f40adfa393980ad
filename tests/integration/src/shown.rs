//! What a process shows of itself: its metrics and its log.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use birb_nest_stack::Process;
use reqwest::StatusCode;
use serde_json::json;

use crate::world::{Api, eventually};

impl Api {
    /// One metric's samples by their labels as they are printed.
    pub async fn metric(&self, name: &str) -> Result<BTreeMap<String, f64>> {
        metric(&self.url, name).await
    }
}

/// Samples of a metric of the process at `url`, by their labels as they are printed.
pub async fn metric(url: &str, name: &str) -> Result<BTreeMap<String, f64>> {
    let text = reqwest::get(format!("{url}/metrics")).await?.text().await?;
    text.lines()
        .filter_map(|line| line.strip_prefix(name))
        .filter(|rest| rest.starts_with(['{', ' ']))
        .map(|rest| {
            let (labels, value) = rest.rsplit_once(' ').context("a value")?;
            Ok((labels.to_owned(), value.parse()?))
        })
        .collect()
}

/// The sum over those samples of a metric whose labels contain `label`; 0 if there is none.
pub async fn counted(url: &str, name: &str, label: &str) -> Result<f64> {
    let samples = metric(url, name).await?;
    let those = samples.iter().filter(|(labels, _)| labels.contains(label));
    Ok(those.map(|(_, value)| value).sum())
}

/// Waits until the process at `url` has counted something: what happened is also told.
pub async fn is_counted(url: &str, name: &str, label: &str) -> Result<()> {
    eventually(&format!("{name} {label} is above 0"), async || {
        Ok((counted(url, name, label).await? > 0.0).then_some(()))
    })
    .await
}

/// Waits until all samples of a metric whose labels contain `label` are `value`, and there is one.
pub async fn is_shown(url: &str, name: &str, label: &str, value: f64) -> Result<()> {
    eventually(&format!("{name} {label} is {value}"), async || {
        let samples = metric(url, name).await?;
        let mut those = samples.iter().filter(|(labels, _)| labels.contains(label));
        let is_there = those.clone().next().is_some();
        Ok((is_there && those.all(|(_, shown)| *shown == value)).then_some(()))
    })
    .await
}

/// Waits until the process at `url` is not ready, for lack of `missing` alone.
pub async fn lacks(url: &str, missing: &str) -> Result<()> {
    eventually(&format!("it lacks {missing}"), async || {
        let ready = reqwest::get(format!("{url}/readyz")).await?;
        let is_refused = ready.status() == StatusCode::SERVICE_UNAVAILABLE;
        let body: serde_json::Value = ready.json().await?;
        let is_due = body["ready"] == false && body["missing"] == json!([missing]);
        Ok((is_refused && is_due).then_some(()))
    })
    .await
}

/// Waits until `process` has said something: what is counted is also told.
pub async fn is_told(process: &Process, line: &str) -> Result<()> {
    eventually(&format!("the log has `{line}`"), async || {
        Ok(process.log()?.contains(line).then_some(()))
    })
    .await
}

/// The same in a warning.
pub async fn is_warned(process: &Process, of: &str) -> Result<()> {
    eventually(&format!("the log warns: `{of}`"), async || {
        let log = process.log()?;
        let mut warnings = log.lines().filter(|line| line.contains(" WARN "));
        Ok(warnings.any(|line| line.contains(of)).then_some(()))
    })
    .await
}
