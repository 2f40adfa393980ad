//! What PostgreSQL allows our sessions: one that hangs is ended by the server, and gives up its locks.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Result, ensure};

use crate::{
    dead_letters::n_ever_dead,
    shown::counted,
    world::{World, eventually},
};

/// As `current_setting` has them.
const LIMITS: [(&str, &str); 8] = [
    ("synchronous_commit", "on"),
    ("statement_timeout", "30s"),
    ("lock_timeout", "10s"),
    ("idle_in_transaction_session_timeout", "30s"),
    ("tcp_keepalives_idle", "10"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    // Read from the socket, in milliseconds.
    ("tcp_user_timeout", "25000"),
];

/// Each session that reads how far a shard is stored leaves a note of its own settings, as the server has them: those of TCP are
/// the socket's.
#[tokio::test]
async fn every_session_in_postgresql_has_its_limits() -> Result<()> {
    let world = World::shared().await?;
    let names: Vec<String> = LIMITS.iter().map(|(name, _)| format!("'{name}'")).collect();
    world
        .sql(&format!(
            "create table noted (application text, name text, value text, unique (application, name, value));
             create function note() returns boolean language plpgsql as $$ begin
               insert into noted select current_setting('application_name'), name, current_setting(name)
               from unnest(array[{}]) name on conflict do nothing;
               return true;
             end $$;
             alter table shard_state rename to shard_state_kept;
             create view shard_state as select * from shard_state_kept where note()",
            names.join(", ")
        ))
        .await?;
    let api = world.api().await?;
    let _worker = world.worker().await?;
    let version = api.write("k", "1").await?;
    world.stored("k", version).await?;
    world.flush_redis().await?;
    api.get("never").await?;
    let noted = eventually("all kinds of sessions were there", async || {
        let rows = world
            .sql("select application, name, value from noted where application <> 'psql'")
            .await?;
        let mut noted: BTreeMap<String, BTreeSet<(String, String)>> = BTreeMap::new();
        for row in rows.lines() {
            let mut columns = row.split('|').map(str::to_owned);
            if let (Some(application), Some(name), Some(value)) =
                (columns.next(), columns.next(), columns.next())
            {
                noted.entry(application).or_default().insert((name, value));
            }
        }
        let kinds = ["birb-nest api", ": shard 0", ": membership"];
        let all = kinds
            .iter()
            .all(|kind| noted.keys().any(|application| application.contains(kind)));
        Ok(all.then_some(noted))
    })
    .await?;
    let limits: BTreeSet<(String, String)> = LIMITS
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    for (application, settings) in noted {
        ensure!(
            settings == limits,
            "{application} has {settings:?}, {limits:?} are due"
        );
    }
    Ok(())
}

/// PostgreSQL ends a statement that takes too long, though it waits for no lock. What it was to store is stored when it can be.
#[tokio::test]
async fn a_statement_that_takes_too_long_is_ended_and_dead_letters_nothing() -> Result<()> {
    let world = World::shared_with(&[("NATS_SHARDS", "1")]).await?;
    // The session that stores `first` has a second for each statement from the next one on, in place of half a minute; the one
    // that stores `second` goes on for as long as there is a row.
    world
        .sql(
            "create table goes_on as select 1;
             create function dawdle() returns trigger language plpgsql as $$ begin
               if new.key = 'first' then perform set_config('statement_timeout', '1s', false); end if;
               while new.key = 'second' and exists (select from goes_on) loop perform pg_sleep(0.01); end loop;
               return new;
             end $$;
             create trigger dawdle before insert on cache_entries for each row execute function dawdle()",
        )
        .await?;
    let (api, worker) = (world.api().await?, world.worker().await?);
    let first = api.write("first", "1").await?;
    world.stored("first", first).await?;
    let second = api.write("second", "1").await?;
    eventually("the statement is ended", async || {
        Ok(worker.log()?.contains("57014").then_some(()))
    })
    .await?;
    ensure!(world.row("second").await?.is_none(), "it is stored");
    world.sql("delete from goes_on").await?;
    world.stored("second", second).await?;
    let n_dead = n_ever_dead(&world).await?;
    ensure!(n_dead == 0, "{n_dead} dead letters");
    let (url, errors) = (world.env.worker_url(), "birbnest_errors_total");
    ensure!(counted(&url, errors, "postgres_apply").await? >= 1.0);
    Ok(())
}
