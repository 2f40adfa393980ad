//! What a process shows of itself: its metrics and its log.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use birb_nest_stack::Process;

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

/// Waits until `process` has said something: what is counted is also told.
pub async fn is_told(process: &Process, line: &str) -> Result<()> {
    eventually(&format!("the log has `{line}`"), async || {
        Ok(process.log()?.contains(line).then_some(()))
    })
    .await
}
