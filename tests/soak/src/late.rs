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

/// Asks an API of no server, and Redis of nothing.
pub struct Probes {
    late: Arc<Mutex<Vec<Late>>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Probes {
    /// Begins.
    ///
    /// # Errors
    /// There is no HTTP, or the URL of Redis is none.
    pub fn start(history: &History, apis: &[String; 2], redis: &str) -> Result<Self> {
        let late: Arc<Mutex<Vec<Late>>> = Arc::default();
        let note = |api: Option<usize>| {
            let (history, late) = (history.clone(), late.clone());
            move |from: u64| {
                let to = history.now();
                if to - from >= nanoseconds(LONG) {
                    let span = Span { from, to };
                    let mut late = late.lock().unwrap_or_else(PoisonError::into_inner);
                    late.push(Late { api, span });
                }
            }
        };
        let mut tasks = Vec::new();
        for (n, url) in apis.iter().enumerate() {
            let (url, history, note) = (format!("{url}/livez"), history.clone(), note(Some(n)));
            let http = reqwest::Client::new();
            tasks.push(tokio::spawn(async move {
                loop {
                    let from = history.now();
                    // One that was killed is not late.
                    if http.get(&url).send().await.is_ok() {
                        note(from);
                    }
                    tokio::time::sleep(BEAT).await;
                }
            }));
        }
        let (redis, history, note) = (redis::Client::open(redis)?, history.clone(), note(None));
        tasks.push(tokio::spawn(async move {
            loop {
                let Ok(mut connection) = redis.get_multiplexed_async_connection().await else {
                    tokio::time::sleep(BEAT).await;
                    continue;
                };
                loop {
                    let from = history.now();
                    let ping = redis::cmd("PING");
                    if ping.exec_async(&mut connection).await.is_err() {
                        // It may have been late, or killed, or stopped; what is left of it is not used again.
                        note(from);
                        break;
                    }
                    note(from);
                    tokio::time::sleep(BEAT).await;
                }
            }
        }));
        Ok(Self { late, tasks })
    }

    /// Who was late so far.
    #[must_use]
    pub fn late(&self) -> Vec<Late> {
        let late = self.late.lock();
        late.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
