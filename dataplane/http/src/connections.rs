//! Connections: how many there are at once, and how long one may leave an answer untaken.

use std::{
    future::{Ready, ready},
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{Extension, middleware::AddExtension};
use axum_server::accept::Accept;
use birb_nest_core::Warning;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tower_layer::Layer;

/// Takes as many connections as it has room for; what comes beyond is closed at once.
#[derive(Debug, Clone)]
pub struct Bounded {
    room: Arc<Semaphore>,
    limit: Limit,
    refused: Arc<Warning>,
}

/// What [`Bounded`] keeps to.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    /// Connections at once.
    pub n: u32,
    /// What says how many, for whoever reads the log.
    pub setting: &'static str,
    /// A connection whose client takes nothing of what it was sent for so long is closed.
    pub patience: Duration,
    /// Counts one that was refused.
    pub count_refused: fn(),
}

impl Bounded {
    /// Room for as many as `limit` says.
    #[must_use]
    pub fn new(limit: Limit) -> Self {
        Self {
            room: Arc::new(Semaphore::new(limit.n as usize)),
            limit,
            refused: Arc::default(),
        }
    }

    fn take(&self, stream: TcpStream) -> io::Result<(Counted, Connection)> {
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else {
            (self.limit.count_refused)();
            if let Some(n_refused) = self.refused.note(Instant::now()) {
                tracing::warn!(
                    n_refused,
                    limit = self.limit.n,
                    "closing connections as they come: {} are open",
                    self.limit.setting
                );
            }
            return Err(io::Error::other("there are too many connections"));
        };
        stream.set_nodelay(true)?;
        // A client that is alive and reads nothing keeps TCP's window closed for as long as it likes.
        #[cfg(target_os = "linux")]
        socket2::SockRef::from(&stream).set_tcp_user_timeout(Some(self.limit.patience))?;
        let ended = CancellationToken::new();
        let counted = Counted {
            stream,
            ended: Box::pin(ended.clone().cancelled_owned()),
            _permit: permit,
        };
        Ok((counted, Connection(ended)))
    }
}

/// The connection that a request came by; each request has it as an extension.
#[derive(Debug, Clone)]
pub struct Connection(CancellationToken);

impl Connection {
    /// Closes it at once, whatever else is under way there.
    pub fn close(&self) {
        self.0.cancel();
    }
}

impl<S> Accept<TcpStream, S> for Bounded {
    type Stream = Counted;
    type Service = AddExtension<S, Connection>;
    type Future = Ready<io::Result<(Counted, Self::Service)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        ready(self.take(stream).map(|(stream, connection)| {
            let service = Extension(connection).layer(service);
            (stream, service)
        }))
    }
}

/// A connection, and its place among all.
#[derive(Debug)]
pub struct Counted {
    stream: TcpStream,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: OwnedSemaphorePermit,
}

impl Counted {
    /// Fails once the connection is to be closed, and wakes whoever waits for the client then.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.ended.as_mut().poll(context) {
            Poll::Ready(()) => {
                // What is on its way to a client that takes nothing is dropped, too; if that cannot be, it is kept for
                // the system's own time.
                let _ = self.stream.set_zero_linger();
                Err(io::ErrorKind::ConnectionAborted.into())
            }
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(context)?;
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
