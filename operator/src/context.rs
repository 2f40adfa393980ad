//! What every pass is given.

use std::{collections::HashSet, sync::Arc, time::Duration};

use kube::{
    Client, ResourceExt,
    runtime::{
        events::{Recorder, Reporter},
        reflector::ObjectRef,
    },
};
use rand::Rng;
use tokio::sync::Semaphore;

use crate::{
    api::BirbNest,
    backoff::Backoff,
    config::Config,
    error::{Error, Result},
    leader::Term,
    memo::Memo,
    owned::Owned,
    readers::Readers,
    render::CONTROLLER,
    scaling::Scaling,
    upgrades::Upgrades,
};

/// Passes at once, each over another nest.
const CONCURRENCY: usize = 8;

/// Shared by all passes.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// Where events go.
    pub recorder: Recorder,
    /// Flags.
    pub config: Config,
    /// Nests whose workers follow the lag.
    pub scaling: Arc<Scaling>,
    /// Which nests may move to this operator's release.
    pub upgrades: Arc<Upgrades>,
    /// Until when this process may write.
    term: Term,
    /// The objects of all nests.
    pub owned: Owned,
    /// What was applied last.
    pub memo: Memo,
    /// How long to wait after a failed pass.
    pub backoff: Backoff,
    /// Which nests read which Secrets.
    pub readers: Readers,
    /// One for each pass that may look and write now.
    pub turns: Semaphore,
}

impl Context {
    /// For this process.
    pub fn new(client: Client, config: Config, holder: &str, term: Term, owned: Owned) -> Self {
        let reporter = Reporter {
            controller: CONTROLLER.to_owned(),
            instance: Some(holder.to_owned()),
        };
        Self {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            upgrades: Arc::new(Upgrades::new(
                config.images.release.clone(),
                config.upgrade_pause,
            )),
            config,
            scaling: Arc::default(),
            term,
            owned,
            memo: Memo::default(),
            backoff: Backoff::default(),
            readers: Readers::default(),
            turns: Semaphore::new(CONCURRENCY),
        }
    }

    /// Asked before each write.
    ///
    /// # Errors
    /// [`Error::NotLeading`].
    pub fn may_write(&self) -> Result<()> {
        if self.term.holds() {
            Ok(())
        } else {
            Err(Error::NotLeading)
        }
    }

    /// Forgets all about a nest that is gone.
    pub fn forget(&self, nest: &BirbNest) {
        let uid = nest.uid().unwrap_or_default();
        self.memo.forget(&uid);
        self.backoff.forget(&uid);
        self.upgrades.gone(&uid);
        self.readers.forget(nest);
    }

    /// Forgets all about nests other than these.
    pub fn keep(&self, nests: &[Arc<BirbNest>]) {
        let uids: HashSet<String> = nests.iter().filter_map(|nest| nest.uid()).collect();
        self.memo.keep(&uids);
        self.backoff.keep(&uids);
        let nests = nests.iter().map(|nest| ObjectRef::from_obj(nest.as_ref()));
        self.readers.keep(&nests.collect());
    }

    /// The resync interval, give or take a tenth, so that nests do not move in step.
    pub fn resync(&self) -> Duration {
        self.config
            .resync
            .mul_f64(rand::rng().random_range(0.9..1.1))
    }
}
