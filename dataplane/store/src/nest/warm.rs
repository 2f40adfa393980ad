//! Putting many keys into Redis at once, by the same rules as a read: token, log, PostgreSQL, fill.

use birb_nest_core::Key;
use futures::{StreamExt, TryStreamExt, stream};

use super::{
    Nest, NestError,
    ask::{AT_ONCE, unsure},
};
use crate::{
    jetstream::Delivery,
    redis::{LEASE, Lease, Token},
};

// A try that failed may leave its tokens behind. While they stand, the next one takes them for those of somebody else,
// passes over these keys, and is done: it comes when they are gone.
const _: () = assert!(
    Delivery::REST.as_secs() > LEASE.as_secs() && Delivery::ACK_WAIT.as_secs() > LEASE.as_secs()
);

impl Nest {
    /// Fills Redis with what is known of those of `keys` that it does not have; returns how many it filled, those
    /// without a value included. What is being read or written by somebody else is left to them, and a key whose dead
    /// letter is gone is left out: no later call can do more for it.
    ///
    /// # Errors
    /// [`NestError::Unavailable`] when Redis cannot be asked or takes a key not, or a key cannot be judged now; the
    /// others are filled then.
    pub async fn warm(&self, keys: &[Key]) -> Result<usize, NestError> {
        let nest = &*self.0;
        if nest.log.session().is_none() {
            return Err(NestError::Unavailable(
                "the log is not connected".to_owned(),
            ));
        }
        // The tokens come before the log is asked, as for every read.
        let leased: Vec<(Key, Token)> = stream::iter(keys.iter().cloned())
            .map(|key| async move {
                let token = Token::random();
                match nest.cache.lease_for_read(&key, &token).await {
                    Ok(Lease::Taken) => Ok(Some((key, token))),
                    Ok(Lease::Found(_)) => Ok(None),
                    Err(error) => Err(NestError::Unavailable(error.to_string())),
                }
            })
            .buffered(AT_ONCE)
            .try_filter_map(async |leased| Ok(leased))
            .try_collect()
            .await?;
        let (keys, tokens): (Vec<Key>, Vec<Token>) = leased.into_iter().unzip();
        let answers = nest.ask_many(&keys).await;
        stream::iter(keys.iter().zip(tokens).zip(answers))
            .map(|((key, token), answer)| async move {
                // It may have been stored between the two questions, and is gone by that.
                let answer = match answer {
                    Err(NestError::Gone(_)) => nest.ask(key).await,
                    answer => answer,
                };
                let filled = nest.fill(key, &token, &answer).await;
                match answer {
                    Err(NestError::Gone(why)) => {
                        tracing::warn!(shard = %nest.shard_of(key), why, "a key cannot be warmed until it is written again");
                        Ok(0)
                    }
                    Err(error) => Err(error),
                    Ok(answer) if answer.unconfirmed => Err(unsure()),
                    Ok(_) => match filled {
                        Ok(filled) => Ok(usize::from(filled)),
                        Err(error) => Err(NestError::Unavailable(error.to_string())),
                    },
                }
            })
            .buffered(AT_ONCE)
            .collect::<Vec<_>>()
            .await
            .into_iter()
            .sum()
    }
}
