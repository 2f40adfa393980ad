//! What all ports that speak HTTP have in common: how many connections there are, how long clients may take, and how much one
//! may do at once. What is served there, the roles say.

mod connections;

use std::{net::SocketAddr, time::Duration};

use axum_server::Server;

pub use self::connections::{Bounded, Connection, Counted, Limit};

/// Connections to a port for probes and Prometheus.
pub const ADMIN_CONNECTIONS: u32 = 256;

/// Requests under way on one HTTP/2 connection; further ones wait at the client.
const MAX_STREAMS: u32 = 128;

/// How long clients may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the head of the first request on a connection.
    pub header: Duration,
    /// Between two requests, the head of the second included.
    pub keepalive: Duration,
}

impl Patience {
    /// Has `server` wait for its clients no longer than this.
    pub fn bound<A>(self, server: Server<SocketAddr, A>) -> Server<SocketAddr, A> {
        let mut server = server.first_request_timeout(self.header);
        server
            .http_builder()
            .http1()
            .header_read_timeout(self.keepalive);
        server
            .http_builder()
            .http2()
            .max_concurrent_streams(MAX_STREAMS)
            .keep_alive_interval(Some(Duration::from_secs(30)))
            .keep_alive_timeout(Duration::from_secs(10));
        server
    }
}
