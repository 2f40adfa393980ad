//! What a pass found, for whoever judges it.

use std::time::Duration;

use crate::{
    api::{Reason, Suspension},
    observe::{Rollout, Setup},
    render::Kind,
    scaling::View,
};

/// Something in the way that a person must see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What it is.
    pub reason: Reason,
    /// What is wrong with which object, and what to do.
    pub message: String,
    /// It lies in what the nest says, and nowhere else.
    pub is_of_the_nest: bool,
}

impl Problem {
    /// One that may lie elsewhere.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            is_of_the_nest: false,
        }
    }

    /// Whether it may be mended without a change of anything that is watched: then somebody must look.
    fn may_end_unseen(&self) -> bool {
        match self.reason {
            // Secrets that a nest names are watched.
            Reason::SecretMissing => false,
            // Nobody tells of quotas, policies and webhooks.
            Reason::InvalidObject | Reason::PodTemplateInvalid => !self.is_of_the_nest,
            // Nor of objects of others, and of volumes. To look in vain costs little.
            _ => true,
        }
    }
}

/// A managed server that does not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Down {
    /// Its StatefulSet.
    pub name: String,
    /// Why, as far as somebody says so.
    pub why: Option<String>,
}

/// What a pass found.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// What is in the way.
    pub problems: Vec<Problem>,
    /// Managed servers that do not run (yet); nothing if the pass did not get so far.
    pub servers_down: Option<Vec<Down>>,
    /// Name of the setup Job for these settings, once they are known.
    pub setup_job: Option<String>,
    /// How far it is.
    pub setup: Setup,
    /// Why its pod does not start, as far as somebody says so.
    pub setup_why: Option<String>,
    /// The API's Deployment, if there is one.
    pub api: Option<Rollout>,
    /// The workers' Deployment, if there is one.
    pub worker: Option<Rollout>,
    /// API and workers were rolled out as they should be.
    pub rolled_out: bool,
    /// The release that it is to have when the nests before it have moved there.
    pub moves_later_to: Option<String>,
    /// Kinds of objects that it is to have and the API server does not know.
    pub kinds_missing: Vec<Kind>,
    /// How far it is on its way to sleep, if it is to sleep.
    pub suspension: Option<Suspension>,
    /// What is known of the lag, in mode Lag once it was asked for.
    pub scaling: Option<View>,
}

impl Findings {
    /// Whether a managed server is known not to run.
    pub fn any_server_down(&self) -> bool {
        self.servers_down
            .as_ref()
            .is_some_and(|down| !down.is_empty())
    }

    /// How long until the next pass if nothing happens before and it would else be `later`: what may be mended unseen is
    /// looked at again after `retry`, what cannot be waits for the change that mends it.
    pub fn pause(&self, later: Duration, retry: Duration) -> Duration {
        if self.problems.iter().any(Problem::may_end_unseen) {
            later.min(retry)
        } else {
            later
        }
    }

    /// Whether there are fewer pods than there should be, of what they should be.
    pub fn is_short(&self) -> bool {
        let mut rollouts = [&self.api, &self.worker].into_iter().flatten();
        self.any_server_down() || rollouts.any(|rollout| !rollout.complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: Duration = Duration::from_secs(600);
    const RETRY: Duration = Duration::from_secs(30);

    fn pause(problems: &[Problem]) -> Duration {
        let findings = Findings {
            problems: problems.to_vec(),
            ..Findings::default()
        };
        findings.pause(LATER, RETRY)
    }

    #[test]
    fn only_what_may_be_mended_unseen_is_looked_at_again() {
        let watched = [Reason::SecretMissing];
        let refused = [Reason::InvalidObject, Reason::PodTemplateInvalid];
        for reason in Reason::ALL {
            let elsewhere = Problem::new(reason, "it");
            let of_the_nest = Problem {
                is_of_the_nest: true,
                ..elsewhere.clone()
            };
            let waits = watched.contains(&reason);
            let expected = if waits { LATER } else { RETRY };
            assert_eq!(pause(&[elsewhere]), expected, "{reason:?}");
            let waits = waits || refused.contains(&reason);
            let expected = if waits { LATER } else { RETRY };
            assert_eq!(pause(&[of_the_nest]), expected, "{reason:?} of the nest");
        }
    }

    #[test]
    fn one_that_must_be_looked_for_is_enough_and_nothing_in_the_way_is_none() {
        assert_eq!(pause(&[]), LATER);
        let secret = Problem::new(Reason::SecretMissing, "Secret servers");
        let service = Problem::new(Reason::NameConflict, "Service cache");
        assert_eq!(pause(&[secret.clone(), service, secret]), RETRY);
        let soon = Duration::from_secs(5);
        let service = Problem::new(Reason::NameConflict, "Service cache");
        let findings = Findings {
            problems: vec![service],
            ..Findings::default()
        };
        assert_eq!(findings.pause(soon, RETRY), soon);
    }
}
