//! Connections of the pool, and what becomes of them when nobody waits for an answer any more.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use sqlx::{PgConnection, PgPool, Postgres, pool::PoolConnection};
use tokio::{runtime::Handle, sync::Semaphore, time::sleep};

use super::database_error;

/// How long PostgreSQL may work on a question that nobody waits for any more: its `statement_timeout`.
const LINGERS: Duration = Duration::from_secs(30);
/// Connections that are closed over such questions at a time. A PostgreSQL that is slow would otherwise get another one for
/// each question that is given up, and be slower still.
static LINGERING: Semaphore = Semaphore::const_new(16);

/// A connection for one question. Dropped before [`Borrowed::done`] it is closed, within seconds: to take it back, the pool
/// would wait for the answer first, for ever if nothing comes through it any more, and have one less meanwhile. Where too many
/// were closed like that a short while ago, the pool waits.
pub(super) struct Borrowed {
    connection: PoolConnection<Postgres>,
    is_done: bool,
}

impl Borrowed {
    /// # Errors
    /// A sentence.
    pub async fn from(pool: &PgPool) -> Result<Self, String> {
        let connection = pool.acquire().await;
        Ok(Self {
            connection: connection.map_err(|error| database_error(&error))?,
            is_done: false,
        })
    }

    /// Gives it back.
    pub fn done(mut self) {
        self.is_done = true;
    }

    /// Closes it, when it is done and of no further use.
    pub fn close(mut self) {
        self.is_done = true;
        self.connection.close_on_drop();
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        let (false, Ok(place), Ok(runtime)) =
            (self.is_done, LINGERING.try_acquire(), Handle::try_current())
        else {
            return;
        };
        self.connection.close_on_drop();
        runtime.spawn(async move {
            sleep(LINGERS).await;
            drop(place);
        });
    }
}

impl Deref for Borrowed {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Borrowed {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}
