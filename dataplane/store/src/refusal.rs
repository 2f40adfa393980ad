//! Why a server cannot be used: for now, or until somebody changes something.

/// What opening a server can end in. Whoever starts a role exits on [`OpenError::Refused`] and waits on the other.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OpenError {
    /// It cannot be reached or logged in to, or is not set up yet: trying again may help.
    #[error("{server} cannot be used now: {why}")]
    Unreachable {
        /// The server's name and address, without credentials.
        server: String,
        /// What happened, and what to do.
        why: String,
    },
    /// It is the wrong one, too old, or belongs to something else: a person must change something.
    #[error("{server} is refused: {why}")]
    Refused {
        /// The server's name and address, without credentials.
        server: String,
        /// What is wrong, and what to do.
        why: String,
    },
}

impl OpenError {
    pub(crate) fn unreachable(server: impl ToString, why: impl ToString) -> Self {
        Self::Unreachable {
            server: server.to_string(),
            why: why.to_string(),
        }
    }

    /// What only a person can mend; `what` is a server, or a file that is needed.
    #[must_use]
    pub fn refused(what: impl ToString, why: impl ToString) -> Self {
        Self::Refused {
            server: what.to_string(),
            why: why.to_string(),
        }
    }

    /// Whether only a person can mend it.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// An error and its causes in one line, `what: why: why`, for logs and refusals.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
