//! A TCP proxy that cuts, stalls, swallows or delays what goes through it.

use std::net::{Ipv4Addr, TcpListener as StdListener};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use crate::{Port, Server};

/// Proxies outlive the runtime of the test that made them, so they run on their own.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(1).thread_name("proxy").enable_all();
    builder.build().expect("a runtime can be started")
});

/// A proxy on a port of its own in front of one server, open at first. Dropped, it closes all its connections.
///
/// Each call takes effect before it returns: after `cut` or `stall` not one more byte is handed on. Bytes that the kernel
/// has already taken for a receiver may still arrive there.
#[derive(Debug)]
pub struct Proxy {
    port: Port,
    server: Server,
    gate: watch::Sender<Gate>,
}

/// What the connections may do at the moment.
#[derive(Clone, Copy, Debug, Default)]
struct Gate {
    cut: bool,
    stalled: bool,
    /// How often connections were cut; a connection ends when this differs from what it was when it was accepted.
    n_cuts: u64,
    /// How often connections were swallowed; nothing comes through one that was accepted before the last time.
    n_swallowed: u64,
    delay: Duration,
}

/// What a connection remembers of the time when it was accepted.
#[derive(Clone, Copy, Debug)]
struct Birth {
    n_cuts: u64,
    n_swallowed: u64,
}

impl Gate {
    fn birth(&self) -> Birth {
        Birth {
            n_cuts: self.n_cuts,
            n_swallowed: self.n_swallowed,
        }
    }

    fn ended(&self, birth: Birth) -> bool {
        self.cut || self.n_cuts != birth.n_cuts
    }

    fn passes(&self, birth: Birth) -> bool {
        !self.ended(birth) && !self.stalled && self.n_swallowed == birth.n_swallowed
    }
}

impl Proxy {
    pub(crate) fn start(server: Server) -> Result<Self> {
        let port = Port::reserve()?;
        let bind = || -> std::io::Result<StdListener> {
            let listener = StdListener::bind((Ipv4Addr::LOCALHOST, port.number()))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener =
            bind().with_context(|| format!("failed to listen on port {}", port.number()))?;
        let (gate, connections) = watch::channel(Gate::default());
        RUNTIME.spawn(serve(listener, server.port(), connections));
        Ok(Self { port, server, gate })
    }

    /// The port on 127.0.0.1 to connect to instead of the server's.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The server behind it.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Resets all connections, and every new one, until [`Proxy::heal`]. What was held by a stall is lost.
    pub fn cut(&self) {
        self.gate.send_modify(|gate| {
            gate.cut = true;
            gate.n_cuts += 1;
        });
    }

    /// Lets everything through again, after [`Proxy::cut`] or [`Proxy::stall`]. A delay stays.
    pub fn heal(&self) {
        self.gate.send_modify(|gate| {
            gate.cut = false;
            gate.stalled = false;
        });
    }

    /// Holds all bytes in both directions; connections stay open, new ones are accepted and held.
    pub fn stall(&self) {
        self.gate.send_modify(|gate| gate.stalled = true);
    }

    /// Nothing comes through any present connection any more, and neither end is told, as when something between them has
    /// forgotten it; not even that the other end closed it. New ones are not concerned.
    pub fn swallow(&self) {
        self.gate.send_modify(|gate| gate.n_swallowed += 1);
    }

    /// Lets held bytes and connections go on after [`Proxy::stall`].
    pub fn resume(&self) {
        self.gate.send_modify(|gate| gate.stalled = false);
    }

    /// Holds each chunk (at most 64 KiB) for this long before it goes on, in both directions, one after the other; zero ends it.
    pub fn delay(&self, delay: Duration) {
        self.gate.send_modify(|gate| gate.delay = delay);
    }
}

async fn serve(listener: StdListener, upstream: u16, gate: watch::Receiver<Gate>) {
    let listener = TcpListener::from_std(listener).expect("the listener is non-blocking");
    let mut proxy = gate.clone();
    // Never true: waiting ends, with an error, when the proxy is dropped.
    let dropped = async move { proxy.wait_for(|_| false).await.is_err() };
    tokio::pin!(dropped);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut dropped => return,
        };
        match accepted {
            Ok((client, _)) => {
                let birth = gate.borrow().birth();
                tokio::spawn(connection(client, upstream, gate.clone(), birth));
            }
            // Out of file descriptors, perhaps: it passes when connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn connection(
    mut client: TcpStream,
    upstream: u16,
    mut gate: watch::Receiver<Gate>,
    birth: Birth,
) {
    let passes = gate.clone();
    let mut server = None;
    tokio::select! {
        // Broken by one of the two ends, or closed by both: dropping the streams closes the other.
        _ = relay(&mut client, &mut server, upstream, passes, birth) => return,
        _ = gate.wait_for(|gate| gate.ended(birth)) => {}
    }
    for stream in [Some(client), server].into_iter().flatten() {
        // Closing now sends a reset; if it cannot, it is an ordinary close.
        let _ = stream.set_zero_linger();
    }
}

async fn relay(
    client: &mut TcpStream,
    server: &mut Option<TcpStream>,
    upstream: u16,
    mut gate: watch::Receiver<Gate>,
    birth: Birth,
) -> Result<()> {
    gate.wait_for(|gate| gate.passes(birth)).await?;
    let server = server.insert(TcpStream::connect((Ipv4Addr::LOCALHOST, upstream)).await?);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    tokio::try_join!(
        pump(client_read, server_write, gate.clone(), birth),
        pump(server_read, client_write, gate, birth)
    )?;
    Ok(())
}

/// Copies one direction until its end, which it hands on too.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut gate: watch::Receiver<Gate>,
    birth: Birth,
) -> Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n_bytes = from.read(&mut buffer).await?;
        let delay = gate.borrow().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let mut rest = &buffer[..n_bytes];
        while !rest.is_empty() {
            to.writable().await?;
            // Holding the gate's lock while we write is what makes `cut` and `stall` exact.
            let open = gate.wait_for(|gate| gate.passes(birth)).await?;
            match to.try_write(rest) {
                Ok(n_written) => rest = &rest[n_written..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            drop(open);
        }
        if n_bytes == 0 {
            gate.wait_for(|gate| gate.passes(birth)).await?;
            to.shutdown().await?;
            return Ok(());
        }
    }
}
