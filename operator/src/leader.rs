//! Which of several operators acts: the holder of a Lease.
//!
//! **Invariant:** a process that may not be the holder any more does not act. It gives up when two thirds of the lease
//! have passed since it *began* its last successful renewal; another process takes the Lease only after it has watched it
//! unchanged for the whole lease by its own monotonic clock. So nobody's wall clock matters, and there is a third of the
//! lease in between for requests that were under way.
//!
//! Whoever stands by is told of each renewal by a watch, and looks again the moment the one that it saw last runs out. The watch
//! only says when to look: what counts is what was read.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
    jiff::Timestamp,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
    runtime::{WatchStreamExt, watcher},
};

use crate::{config::Election, render::CONTROLLER, watches::endless};

/// Until when this process may act. It is asked before each write: after the process was stopped for a while, a pass may run
/// again before [`Elector::keep`] does.
#[derive(Clone, Debug, Default)]
pub struct Term(Arc<Mutex<Option<Instant>>>);

impl Term {
    /// Whether it may act now.
    pub fn holds(&self) -> bool {
        self.end().is_some_and(|end| Instant::now() < end)
    }

    fn end(&self) -> Option<Instant> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, end: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }
}

/// One candidate.
pub struct Elector {
    leases: Api<Lease>,
    name: String,
    holder: String,
    duration: Duration,
    term: Term,
}

/// What another process's hold on the Lease looked like, and when it has run out if it still looks like that then.
struct Seen {
    resource_version: Option<String>,
    end: Instant,
}

impl Elector {
    /// `client` should not repeat requests by itself: a late renewal is worth nothing.
    pub fn new(client: Client, election: &Election, holder: &str) -> Self {
        Self {
            leases: Api::namespaced(client, &election.lease_namespace),
            name: election.lease_name.clone(),
            holder: holder.to_owned(),
            duration: election.lease_duration,
            term: Term::default(),
        }
    }

    /// Until when this process may act.
    pub fn term(&self) -> Term {
        self.term.clone()
    }

    /// Waits until this process holds the Lease. Failures are logged and waited out.
    ///
    /// # Cancel safety
    /// Dropping the future may leave the Lease taken, until it runs out.
    pub async fn acquire(&self, mut on_contact: impl FnMut()) -> Hold {
        let mut seen: Option<Seen> = None;
        let mut changes = pin!(self.changes());
        loop {
            let began = Instant::now();
            match tokio::time::timeout(self.request_limit(), self.try_acquire(&mut seen)).await {
                Ok(Ok(Some(lease))) => return self.held(lease, began),
                Ok(Ok(None)) => on_contact(),
                Ok(Err(kube::Error::Api(status)))
                    if status.is_conflict() || status.is_already_exists() =>
                {
                    on_contact();
                }
                Ok(Err(error)) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "the Lease {} cannot be asked for; trying again",
                    self.name
                ),
                Err(_) => tracing::warn!(
                    "the API server does not answer; asking for the Lease {} again",
                    self.name
                ),
            }
            // Longer than a holder's pauses: where the watch works, it is always the first to tell.
            let pause = Instant::now() + self.duration / 4;
            let end = seen.as_ref().map(|seen| seen.end);
            let again = end
                .filter(|end| *end > began)
                .map_or(pause, |end| end.min(pause));
            tokio::select! {
                () = tokio::time::sleep_until(again.into()) => {}
                Some(_) = changes.next() => {}
            }
        }
    }

    /// An item for each change of the Lease, as far as the watch works.
    fn changes(&self) -> impl Stream<Item = watcher::Result<Lease>> + Send + use<> {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.name));
        endless("Lease", watcher::watcher(self.leases.clone(), config)).touched_objects()
    }

    async fn try_acquire(&self, seen: &mut Option<Seen>) -> kube::Result<Option<Lease>> {
        let Some(lease) = self.leases.get_opt(&self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(1, None)),
            };
            return self.leases.create(&self.post(), &lease).await.map(Some);
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let held = spec
            .holder_identity
            .as_deref()
            .is_some_and(|holder| !holder.is_empty() && holder != self.holder);
        if held {
            // The holder's word counts, not ours: the two may be configured differently.
            let theirs = spec
                .lease_duration_seconds
                .and_then(|seconds| u64::try_from(seconds).ok());
            let lasts = theirs.map_or(self.duration, Duration::from_secs);
            let unchanged = seen
                .as_ref()
                .filter(|seen| seen.resource_version == lease.metadata.resource_version);
            let Some(unchanged) = unchanged else {
                *seen = Some(Seen {
                    resource_version: lease.metadata.resource_version,
                    end: Instant::now() + lasts,
                });
                return Ok(None);
            };
            if Instant::now() < unchanged.end {
                return Ok(None);
            }
        }
        let transitions = spec.lease_transitions.unwrap_or(0) + 1;
        self.replace(lease, self.spec(transitions, None))
            .await
            .map(Some)
    }

    fn held(&self, lease: Lease, began: Instant) -> Hold {
        self.term.set(began + self.limit());
        Hold { lease }
    }

    /// How long after the beginning of its last renewal this process may act.
    fn limit(&self) -> Duration {
        self.duration * 2 / 3
    }

    /// Keeps the Lease; returns when it may be lost, with the reason.
    ///
    /// # Cancel safety
    /// Dropping the future stops renewing; [`Elector::release`] can follow.
    pub async fn keep(&self, hold: &mut Hold) -> String {
        let mut pauses = tokio::time::interval(self.duration / 5);
        pauses.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let end = self.term.end().expect("it was acquired");
            let late = format!("it could not be renewed for {:?}", self.limit());
            let round = async {
                pauses.tick().await;
                self.renew_once(hold).await
            };
            // Whatever a round does, it does not outlast the term.
            match tokio::time::timeout_at(end.into(), round).await {
                Ok(None) => {}
                Ok(Some(lost)) => return lost,
                Err(_) => return late,
            }
        }
    }

    /// Tries to renew; returns why the Lease is lost if it is.
    async fn renew_once(&self, hold: &mut Hold) -> Option<String> {
        let began = Instant::now();
        match tokio::time::timeout(self.request_limit(), self.renew(hold)).await {
            Ok(Ok(lease)) => *hold = self.held(lease, began),
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_not_found() => {
                match self.still_ours().await {
                    // Somebody touched it without taking it.
                    Some(lease) => hold.lease = lease,
                    None => return Some("another process holds it, or it was deleted".to_owned()),
                }
            }
            Ok(Err(error)) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the Lease {} could not be renewed",
                self.name
            ),
            Err(_) => tracing::warn!(
                "the API server does not answer; the Lease {} was not renewed",
                self.name
            ),
        }
        None
    }

    /// Gives the Lease back, so that another process need not wait for its end.
    pub async fn release(&self, hold: Hold) {
        match tokio::time::timeout(self.request_limit(), self.give_back(hold.lease)).await {
            Ok(Ok(())) => tracing::info!("gave back the Lease {}", self.name),
            Ok(Err(error)) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the Lease {} could not be given back; it runs out",
                self.name
            ),
            Err(_) => tracing::warn!(
                "the Lease {} could not be given back in time; it runs out",
                self.name
            ),
        }
    }

    async fn give_back(&self, lease: Lease) -> kube::Result<()> {
        let nobody = |lease: &Lease| LeaseSpec {
            holder_identity: Some(String::new()),
            ..lease.spec.clone().unwrap_or_default()
        };
        let spec = nobody(&lease);
        match self.replace(lease, spec).await {
            // A renewal that was broken off may have arrived all the same.
            Err(kube::Error::Api(status)) if status.is_conflict() => {
                let Some(lease) = self.still_ours().await else {
                    return Ok(());
                };
                let spec = nobody(&lease);
                self.replace(lease, spec).await.map(|_| ())
            }
            other => other.map(|_| ()),
        }
    }

    async fn renew(&self, hold: &Hold) -> kube::Result<Lease> {
        let old = hold.lease.spec.clone().unwrap_or_default();
        let spec = self.spec(old.lease_transitions.unwrap_or(1), old.acquire_time);
        self.replace(hold.lease.clone(), spec).await
    }

    async fn still_ours(&self) -> Option<Lease> {
        let asked =
            tokio::time::timeout(self.request_limit(), self.leases.get_opt(&self.name)).await;
        let lease = asked.ok()?.ok()??;
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.as_deref());
        (holder == Some(self.holder.as_str())).then_some(lease)
    }

    /// With the resource version that was read: of two who try, one gets a conflict.
    async fn replace(&self, mut lease: Lease, spec: LeaseSpec) -> kube::Result<Lease> {
        lease.spec = Some(spec);
        self.leases.replace(&self.name, &self.post(), &lease).await
    }

    fn spec(&self, transitions: i32, acquired: Option<MicroTime>) -> LeaseSpec {
        // The API server keeps microseconds.
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.holder.clone()),
            lease_duration_seconds: Some(
                i32::try_from(self.duration.as_secs()).unwrap_or(i32::MAX),
            ),
            lease_transitions: Some(transitions),
            acquire_time: Some(acquired.unwrap_or_else(|| now.clone())),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }
    }

    fn post(&self) -> PostParams {
        PostParams {
            field_manager: Some(CONTROLLER.to_owned()),
            ..PostParams::default()
        }
    }

    fn request_limit(&self) -> Duration {
        self.duration / 4
    }
}

/// The Lease in hand.
pub struct Hold {
    lease: Lease,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::Config;

    #[test]
    fn a_term_holds_until_its_end() {
        let term = Term::default();
        assert!(!term.holds(), "it was never acquired");
        term.set(Instant::now() + Duration::from_secs(60));
        assert!(term.holds());
        term.set(Instant::now());
        assert!(!term.holds());
    }

    #[tokio::test]
    async fn a_holder_that_is_never_answered_gives_up_before_the_lease_has_ended() {
        // It is connected to, and never answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let client = Client::try_from(kube::Config::new(url.parse().unwrap())).unwrap();
        let election = Election {
            lease_duration: Duration::from_secs(3),
            ..Config::parse_from(["birb-nest-operator"]).election
        };
        let elector = Elector::new(client, &election, "it");
        let began = Instant::now();
        let mut hold = elector.held(Lease::default(), began);
        assert!(elector.term().holds());
        let why = elector.keep(&mut hold).await;
        assert!(why.contains("could not be renewed"), "{why}");
        assert!(!elector.term().holds());
        assert!(began.elapsed() >= elector.limit());
        assert!(began.elapsed() < election.lease_duration);
    }
}
