//! The metrics are those of docs/METRICS.md, and alerts ask for no others; events have the lines of docs/OPERATIONS.md.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use birb_nest_stack::Role;
use reqwest::StatusCode;

use crate::{
    shown::{counted, is_counted},
    world::{World, eventually},
};

const DOCUMENT: &str = include_str!("../../../docs/METRICS.md");
const EVENTS: &str = include_str!("../../../docs/OPERATIONS.md");
const ALERTS: &str = include_str!("../../../configs/alerts.yml");
const ALERTS_TRIED: &str = include_str!("../../../configs/alerts_test.yml");

/// Names of metrics in `text`.
fn named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("birbnest_")).collect()
}

/// Those that have a row of their own.
fn documented() -> BTreeSet<&'static str> {
    let rows = DOCUMENT.lines().filter_map(|line| line.strip_prefix("| `"));
    let names = rows.filter_map(|row| row.split('`').next());
    names.filter(|name| named(name).contains(name)).collect()
}

#[test]
fn alerts_ask_for_metrics_that_there_are() {
    let documented = documented();
    let asked = named(ALERTS);
    assert!(asked.len() > 5, "{asked:?}");
    let unknown: Vec<_> = asked.difference(&documented).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
}

/// `make lint` has promtool play them.
#[test]
fn every_alert_is_seen_to_tell_and_not_to_tell() {
    let alerts = ALERTS
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "));
    let tried: Vec<&str> = ALERTS_TRIED.lines().map(str::trim).collect();
    let mut n_alerts = 0;
    for name in alerts {
        let silent = format!("alertname: {name}}}");
        let told = format!("alertname: {name}");
        assert!(tried.iter().any(|line| line.ends_with(&silent)), "{name}");
        let told = tried.iter().position(|line| *line == told);
        assert!(
            told.is_some_and(|at| tried[at + 1] == "exp_alerts:"),
            "{name}"
        );
        n_alerts += 1;
    }
    assert!(n_alerts > 5, "{n_alerts}");
}

/// What `…` stands for in docs/OPERATIONS.md, in a string of the code.
fn with_gaps(code: &str) -> String {
    let mut parts = code.split('{');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once('}') {
            Some((name, rest)) if !name.contains(['\n', '"']) => {
                out.push('…');
                out.push_str(rest);
            }
            _ => {
                out.push('{');
                out.push_str(part);
            }
        }
    }
    out
}

/// All code of the data plane, without its tests.
fn code() -> Result<String> {
    let mut all = String::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dataplane")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(path)?;
                let text = text.split("#[cfg(test)]").next().unwrap_or_default();
                all.push_str(&with_gaps(text));
            }
        }
    }
    Ok(all)
}

#[test]
fn every_event_has_one_line_in_the_code_and_a_metric() -> Result<()> {
    let (code, documented) = (code()?, documented());
    let events = EVENTS.split("### Events").nth(1).context("a table")?;
    let events = events.split("### ").next().context("its end")?;
    let mut lines: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for row in events.lines().filter(|line| line.starts_with("| ")).skip(1) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [_, level, line, metrics] = cells[..] else {
            anyhow::bail!("{row}");
        };
        let level = level.split(',').next().unwrap_or_default();
        lines.entry(line.trim_matches('`')).or_default().push(level);
        let metrics = named(metrics);
        ensure!(
            !metrics.is_empty() && metrics.is_subset(&documented),
            "{row}"
        );
    }
    ensure!(lines.len() > 20, "{lines:?}");
    for (line, levels) in lines {
        let found: Vec<&str> = code
            .match_indices(&format!("\"{line}\""))
            .map(|(at, _)| {
                let before = code[..at].rsplit("tracing::").next().unwrap_or_default();
                before.split('!').next().unwrap_or_default()
            })
            .collect();
        ensure!(
            found.len() == levels.len(),
            "`{line}` is there {} times",
            found.len()
        );
        for level in levels {
            // Others are told with what they are the reason of.
            let is_own = ["error", "warn", "info"].contains(&level);
            ensure!(
                !is_own || found.contains(&level),
                "`{line}` is at {found:?}"
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn every_metric_that_is_shown_is_documented() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let env = world.env.replica()?;
    let _worker = env.start(Role::Worker).await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    api.get("k").await?.expect(StatusCode::OK)?;
    let documented = documented();
    let mut all = String::new();
    for url in [api.url.clone(), env.worker_url()] {
        let text = reqwest::get(format!("{url}/metrics")).await?.text().await?;
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let shown: BTreeSet<&str> = types.filter_map(|line| line.split(' ').next()).collect();
        ensure!(shown.len() > 5, "{text}");
        let unknown: Vec<_> = shown.difference(&documented).collect();
        ensure!(unknown.is_empty(), "{url} shows {unknown:?}");
        all += &text;
    }
    // Nothing has increased by its first sample.
    for asked in ALERTS.split("increase(").skip(1) {
        let asked = asked.split('[').next().unwrap();
        let (name, labels) = asked.split_once('{').unwrap_or((asked, ""));
        let labels = labels.trim_end_matches('}');
        let is_shown = |line: &str| line.starts_with(name) && line.contains(labels);
        ensure!(all.lines().any(is_shown), "no {asked} before it counts");
    }
    Ok(())
}

/// What is written and read shows in every instrument that it passes.
#[tokio::test]
async fn what_is_done_is_counted() -> Result<()> {
    let world = World::shared().await?;
    let api = world.api().await?;
    let mut env = world.env.replica()?;
    // What is stored stays in the log for the gauges to see.
    env.set("LOG_TRIM_LAG", "1h");
    let _worker = env.start(Role::Worker).await?;
    let worker = env.worker_url();
    for n in 0..3 {
        let version = api.write("k", &n.to_string()).await?;
        world.stored("k", version).await?;
    }
    // Who tells Redis late, or empties it once more, has a read look further a second time.
    world.redis_is_told().await?;
    world.empty_redis().await?;
    api.get("k").await?.expect(StatusCode::OK)?;
    api.delete("k").await?.expect(StatusCode::NO_CONTENT)?;
    for (name, label, n) in [
        ("birbnest_cache_writes_total", "set", 3.0),
        ("birbnest_cache_writes_total", "delete", 1.0),
        ("birbnest_cache_rehydrations_total", "", 1.0),
        (
            "birbnest_http_request_duration_seconds_count",
            "/v1/cache/{key}",
            5.0,
        ),
    ] {
        let counts = counted(&api.url, name, label).await?;
        ensure!(counts == n, "{name} {label}: {counts}, and not {n}");
    }
    is_counted(&api.url, "birbnest_postgres_pool_connections", "").await?;
    for name in [
        "birbnest_log_messages",
        "birbnest_log_size_bytes",
        "birbnest_worker_batch_messages_count",
        "birbnest_worker_batch_rows_count",
        "birbnest_worker_flush_duration_seconds_count",
        "birbnest_worker_shards",
    ] {
        is_counted(&worker, name, "").await?;
    }
    // PostgreSQL takes nothing for a while: what waits has an age.
    let lock = world.sql("alter table cache_entries rename to away");
    lock.await?;
    api.write("k", "1").await?;
    let age = "birbnest_log_oldest_age_seconds";
    is_counted(&worker, age, "").await?;
    world
        .sql("alter table away rename to cache_entries")
        .await?;
    eventually("nothing waits", async || {
        Ok((counted(&worker, age, "").await? == 0.0).then_some(()))
    })
    .await
}
