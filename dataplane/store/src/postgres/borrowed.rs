//! Connections of the pool, and what becomes of them when nobody waits for an answer any more.

use std::ops::{Deref, DerefMut};

use sqlx::{PgConnection, PgPool, Postgres, pool::PoolConnection};

use super::database_error;

/// A connection for one question. Dropped before [`Borrowed::done`] it is closed, within seconds: to take it back, the pool
/// would wait for the answer first, for ever if nothing comes through it any more, and have one less meanwhile.
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
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if !self.is_done {
            self.connection.close_on_drop();
        }
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
