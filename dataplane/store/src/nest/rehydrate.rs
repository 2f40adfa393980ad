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
    /// Keys that have a value now; none if PostgreSQL could not count them in time.
    pub n_keys: u64,
    /// Whether there are more than were counted, or may be.
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
    /// [`NestError::Unavailable`] when they cannot be asked, or have too much to do already.
    pub async fn rehydrate_prefix(&self, prefix: String) -> Result<Asked, NestError> {
        let session = self.session()?;
        let range = Range {
            prefix,
            after: None,
        };
        let id = format!("{:08x}", rand::random::<u32>());
        let job = Job {
            id: id.clone(),
            n_done: 0,
            range: range.clone(),
        };
        session
            .ask_rehydration(&Request::Prefix(job))
            .await
            .map_err(not_asked)?;
        // Nothing depends on the number: to count rows that are on disk may take longer than PostgreSQL is waited for.
        let counted = self.database().count(&range, MOST_COUNTED + 1).await;
        let (n_keys, has_more) = match counted {
            Ok(n) => (n.min(MOST_COUNTED.into()), n > MOST_COUNTED.into()),
            Err(error) => {
                tracing::debug!(%error, job = id, "the keys of a prefix were not counted");
                (0, true)
            }
        };
        Ok(Asked {
            job: id,
            n_keys,
            has_more,
        })
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
