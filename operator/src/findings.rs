//! What a pass found, for whoever judges it.

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

    /// Whether there are fewer pods than there should be.
    pub fn is_short(&self) -> bool {
        let mut rollouts = [&self.api, &self.worker].into_iter().flatten();
        self.any_server_down() || rollouts.any(|rollout| rollout.ready < rollout.desired)
    }
}
