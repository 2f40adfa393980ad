//! What ends a pass early.

use crate::render::Kind;

/// Why a pass could not be finished. It is tried again, later each time.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A request about the nest itself.
    #[error("failed to {what}")]
    Nest {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        source: kube::Error,
    },
    /// A request about one of its objects.
    #[error("failed to {verb} {} {name}", kind.as_str())]
    Child {
        /// What was being done.
        verb: &'static str,
        /// What with.
        kind: Kind,
        /// Its name.
        name: String,
        /// Why it failed.
        source: kube::Error,
    },
    /// This process may not be the leader any more, so it writes nothing.
    #[error("the lease has run out; nothing was written")]
    NotLeading,
    /// A pass took too long; the API server hangs.
    #[error("the API server did not answer in time")]
    TimedOut,
}

/// Result of a pass.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The namespace is going, and everything in it: nothing can be made there any more.
    pub fn is_namespace_ending(&self) -> bool {
        let Some(kube::Error::Api(status)) = self.source_error() else {
            return false;
        };
        let causes = status.details.iter().flat_map(|details| &details.causes);
        status.is_forbidden()
            && causes
                .into_iter()
                .any(|cause| cause.reason == "NamespaceTerminating")
    }

    /// For the metric: a closed set.
    pub fn metric_label(&self) -> &'static str {
        match self.source_error() {
            _ if self.is_namespace_ending() => "namespace_ending",
            Some(kube::Error::Api(status)) if status.is_conflict() => "conflict",
            Some(kube::Error::Api(status)) if status.is_forbidden() => "forbidden",
            Some(kube::Error::Api(_)) => "refused",
            Some(kube::Error::SerdeError(_)) => "unreadable",
            Some(_) => "unreachable",
            None if matches!(self, Self::NotLeading) => "not_leading",
            None => "timeout",
        }
    }

    /// Somebody changed the object meanwhile: at once again.
    pub fn is_conflict(&self) -> bool {
        matches!(self.source_error(), Some(kube::Error::Api(status)) if status.is_conflict())
    }

    fn source_error(&self) -> Option<&kube::Error> {
        match self {
            Self::Nest { source, .. } | Self::Child { source, .. } => Some(source),
            Self::NotLeading | Self::TimedOut => None,
        }
    }
}
