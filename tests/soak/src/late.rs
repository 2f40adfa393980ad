//! Who was late: the processes that a deadline of an eighth of a second is about are asked all the time whether they get to
//! run, by somebody who is not the nest.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Result;
use tokio::task::JoinHandle;

use crate::{
    calm::{Late, Span, nanoseconds},
    history::History,
};

/// How often each is asked.
const BEAT: Duration = Duration::from_millis(50);
/// Half of the shortest deadline inside, which is for several such answers: who takes so long for nothing is late.
pub const LONG: Duration = Duration::from_millis(60);

/// Asks each API for nothing, and Redis through the API's own link to it.
pub struct Probes {
    late: Arc<Mutex<Vec<Late>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Probes {
    /// Begins.
    ///
    /// # Errors
    /// The URL of Redis is none.
    pub fn start(history: &History, apis: &[String; 2], redis: &[String; 2]) -> Result<Self> {
        let late: Arc<Mutex<Vec<Late>>> = Arc::default();
        let mut tasks = Vec::new();
        for (api, (url, redis)) in apis.iter().zip(redis).enumerate() {
            let (history, late) = (history.clone(), late.clone());
            let note = {
                let history = history.clone();
                move |from: u64| {
                    let to = history.now();
                    if to - from >= nanoseconds(LONG) {
                        let span = Span { from, to };
                        let mut late = late.lock().unwrap_or_else(PoisonError::into_inner);
                        late.push(Late { api, span });
                    }
                }
            };
            let url = format!("{url}/livez");
            tasks.push(tokio::spawn(probe_api(url, history.clone(), note.clone())));
            let client = redis::Client::open(redis.as_str())?;
            tasks.push(tokio::spawn(probe_redis(client, history, note)));
        }
        Ok(Self { late, tasks })
    }

    /// Who was late so far.
    #[must_use]
    pub fn late(&self) -> Vec<Late> {
        let late = self.late.lock();
        late.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn probe_api(url: String, history: History, note: impl Fn(u64)) {
    let http = reqwest::Client::new();
    loop {
        let from = history.now();
        // One that was killed is not late.
        if http.get(&url).send().await.is_ok() {
            note(from);
        }
        tokio::time::sleep(BEAT).await;
    }
}

async fn probe_redis(client: redis::Client, history: History, note: impl Fn(u64)) {
    loop {
        if let Ok(mut connection) = client.get_multiplexed_async_connection().await {
            loop {
                let from = history.now();
                let answer = redis::cmd("PING").exec_async(&mut connection).await;
                note(from);
                if answer.is_err() {
                    break;
                }
                tokio::time::sleep(BEAT).await;
            }
        }
        tokio::time::sleep(BEAT).await;
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
