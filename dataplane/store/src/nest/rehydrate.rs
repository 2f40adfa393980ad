//! Warming Redis because somebody asks for it.

use birb_nest_core::{Key, Range};

use super::{Nest, NestError};
use crate::jetstream::{Job, ReadError, Request, Session};

/// Counting what a prefix has ends here: the workers find the others all the same.
const MOST_COUNTED: u32 = 100_000;

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Names it in the workers' logs.
    pub job: String,
    /// Keys that have a value now.
    pub n_keys: u64,
    /// Whether there are more than were counted.
    pub has_more: bool,
}

impl Nest {
    /// Asks the workers to put `keys` into Redis.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when they cannot be asked, or have too much to do already; some of the keys may be asked
    /// for then.
    pub async fn rehydrate(&self, keys: &[Key]) -> Result<(), NestError> {
        let session = self.session()?;
        for keys in Request::pieces(keys) {
            let request = Request::Keys(keys.to_vec());
            session.ask_rehydration(&request).await.map_err(not_asked)?;
        }
        Ok(())
    }

    /// Asks the workers to put all stored keys that begin with `prefix` into Redis, in the order of their bytes.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when they cannot be asked, have too much to do already, or PostgreSQL is down.
    pub async fn rehydrate_prefix(&self, prefix: String) -> Result<Asked, NestError> {
        let session = self.session()?;
        let range = Range {
            prefix,
            after: None,
        };
        let counted = self.database().count(&range, MOST_COUNTED + 1).await;
        let n_keys = counted.map_err(|error| NestError::Unavailable(error.to_string()))?;
        let job = Job {
            id: format!("{:08x}", rand::random::<u32>()),
            n_done: 0,
            range,
        };
        let asked = Asked {
            job: job.id.clone(),
            n_keys: n_keys.min(u64::from(MOST_COUNTED)),
            has_more: n_keys > u64::from(MOST_COUNTED),
        };
        session
            .ask_rehydration(&Request::Prefix(job))
            .await
            .map_err(not_asked)?;
        Ok(asked)
    }

    fn session(&self) -> Result<std::sync::Arc<Session>, NestError> {
        self.log()
            .session()
            .ok_or_else(|| NestError::Unavailable("the log is not connected".to_owned()))
    }
}

fn not_asked(error: ReadError) -> NestError {
    NestError::Unavailable(format!("the workers could not be asked: {error}"))
}
