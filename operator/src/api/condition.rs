//! Names of conditions and their reasons. People and scripts match on them, so they are closed sets and part of the API.

/// `type` of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ConditionType {
    /// All of it works: the next four are true.
    Ready,
    /// Enough API replicas take requests.
    ApiAvailable,
    /// Enough workers store.
    WorkersAvailable,
    /// What the nest refers to is there, and its managed servers run.
    DependenciesReady,
    /// The servers are prepared for this release and these settings.
    MigrationComplete,
    /// A change is being rolled out.
    Progressing,
    /// Something needs a person, or it works with less than was asked for.
    Degraded,
    /// The number of workers follows the lag.
    ScalingActive,
    /// For tools that read kstatus: `Progressing`, while nothing is stalled.
    Reconciling,
    /// For tools that read kstatus: it gets no further until a person has changed something.
    Stalled,
}

impl ConditionType {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 10] = [
        Self::Ready,
        Self::ApiAvailable,
        Self::WorkersAvailable,
        Self::DependenciesReady,
        Self::MigrationComplete,
        Self::Progressing,
        Self::Degraded,
        Self::ScalingActive,
        Self::Reconciling,
        Self::Stalled,
    ];

    /// As it stands in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::ApiAvailable => "APIAvailable",
            Self::WorkersAvailable => "WorkersAvailable",
            Self::DependenciesReady => "DependenciesReady",
            Self::MigrationComplete => "MigrationComplete",
            Self::Progressing => "Progressing",
            Self::Degraded => "Degraded",
            Self::ScalingActive => "ScalingActive",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
        }
    }
}

/// `reason` of a condition, and of the event that tells of its change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is as it should be.
    AsExpected,
    /// All parts work.
    Available,
    /// Pods are not there yet.
    PodsNotReady,
    /// A Deployment is being changed.
    RollingOut,
    /// A Deployment does not get on: Kubernetes gave up waiting for it.
    RolloutStuck,
    /// Scaled to zero by the spec.
    ScaledToZero,
    /// A managed server does not run yet, or not any more.
    ServerNotReady,
    /// A Secret or a key in it, which the nest refers to, is not there.
    SecretMissing,
    /// A generated Secret is gone while the volume it belongs to is still there.
    CredentialsLost,
    /// An object of that name belongs to somebody else.
    NameConflict,
    /// The setup Job is at work.
    SetupRunning,
    /// The setup Job cannot reach a server or log in to it; it tries again.
    ServerUnreachable,
    /// The setup Job was refused; a person must change something.
    MigrationFailed,
    /// The setup Job waits for what comes before it.
    WaitingForDependencies,
    /// Nests before this one move to the operator's release first.
    WaitingForTurn,
    /// What the spec says of pods is no pod template, or one that is refused.
    PodTemplateInvalid,
    /// The API server refuses an object that the spec asks for.
    InvalidObject,
    /// The API server does not know a kind of objects that the spec asks for.
    KindMissing,
    /// Nothing is changed because the spec says so.
    Paused,
    /// It is being put to sleep: workers store what is left in the log.
    Draining,
    /// It sleeps because the spec says so.
    Suspended,
    /// It was put to sleep before all of its log was stored.
    NotDrained,
    /// The mode of scaling is another one than Lag.
    ScalingDisabled,
    /// The lag cannot be read, so the number of workers stays.
    LagUnknown,
    /// `worker.scaling.replicas`, which `kubectl scale` sets, has no effect in this mode.
    ScaleIgnored,
}

impl Reason {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::AsExpected,
        Self::Available,
        Self::PodsNotReady,
        Self::RollingOut,
        Self::RolloutStuck,
        Self::ScaledToZero,
        Self::ServerNotReady,
        Self::SecretMissing,
        Self::CredentialsLost,
        Self::NameConflict,
        Self::SetupRunning,
        Self::ServerUnreachable,
        Self::MigrationFailed,
        Self::WaitingForDependencies,
        Self::InvalidObject,
        Self::WaitingForTurn,
        Self::PodTemplateInvalid,
        Self::KindMissing,
        Self::Paused,
        Self::Draining,
        Self::Suspended,
        Self::NotDrained,
        Self::ScalingDisabled,
        Self::LagUnknown,
        Self::ScaleIgnored,
    ];

    /// The reason that stands in a status as `text`.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text)
    }

    /// As it stands in the status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AsExpected => "AsExpected",
            Self::Available => "Available",
            Self::PodsNotReady => "PodsNotReady",
            Self::RollingOut => "RollingOut",
            Self::RolloutStuck => "RolloutStuck",
            Self::ScaledToZero => "ScaledToZero",
            Self::ServerNotReady => "ServerNotReady",
            Self::SecretMissing => "SecretMissing",
            Self::CredentialsLost => "CredentialsLost",
            Self::NameConflict => "NameConflict",
            Self::SetupRunning => "SetupRunning",
            Self::ServerUnreachable => "ServerUnreachable",
            Self::MigrationFailed => "MigrationFailed",
            Self::WaitingForDependencies => "WaitingForDependencies",
            Self::InvalidObject => "InvalidObject",
            Self::WaitingForTurn => "WaitingForTurn",
            Self::PodTemplateInvalid => "PodTemplateInvalid",
            Self::KindMissing => "KindMissing",
            Self::Paused => "Paused",
            Self::Draining => "Draining",
            Self::Suspended => "Suspended",
            Self::NotDrained => "NotDrained",
            Self::ScalingDisabled => "ScalingDisabled",
            Self::LagUnknown => "LagUnknown",
            Self::ScaleIgnored => "ScaleIgnored",
        }
    }
}
