//! How many requests a client may make: a client is a key, or without one an address.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use axum::{
    extract::{ConnectInfo, Request, State},
    http::{HeaderName, HeaderValue, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    state::keyed::DefaultKeyedStateStore,
};

use crate::{
    access::Holder,
    error::{ApiError, Code},
    state::AppState,
};

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
/// How often clients are forgotten that have their whole allowance again.
const FORGET_EVERY: Duration = Duration::from_secs(30);

/// Whose requests are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Client {
    /// A key, by its name, from wherever it is used.
    Key(Arc<str>),
    /// An address of the network: for IPv6 its first 64 bits, which is what one client has.
    Address(IpAddr),
}

type Limiter =
    RateLimiter<Client, DefaultKeyedStateStore<Client>, DefaultClock, StateInformationMiddleware>;

/// `API_RATE_LIMIT_REQUESTS` in `API_RATE_LIMIT_DURATION` for each client, refilled evenly.
pub struct Rate {
    limiter: Limiter,
    clock: DefaultClock,
    limit: NonZeroU32,
    /// For one request.
    refill: Duration,
}

impl Rate {
    /// `None` without a limit.
    pub fn new(requests: u32, duration: Duration) -> Option<Self> {
        let limit = NonZeroU32::new(requests)?;
        // Finer than a nanosecond there is no period, and none would mean no limit.
        let refill = (duration / requests).max(Duration::from_nanos(1));
        let quota = Quota::with_period(refill)?.allow_burst(limit);
        Some(Self {
            limiter: RateLimiter::keyed(quota).with_middleware(),
            clock: DefaultClock::default(),
            limit,
            refill,
        })
    }

    /// Forgets clients that have their whole allowance again. Never ends.
    pub async fn forget(&self) {
        loop {
            tokio::time::sleep(FORGET_EVERY).await;
            self.limiter.retain_recent();
            self.limiter.shrink_to_fit();
        }
    }

    /// How many more requests `client` may make at once; or how long it has to wait for the next one.
    fn admit(&self, client: &Client) -> Result<u32, Duration> {
        match self.limiter.check_key(client) {
            Ok(state) => Ok(state.remaining_burst_capacity()),
            Err(until) => Err(until.wait_time_from(self.clock.now())),
        }
    }

    /// When the whole allowance is there again.
    fn reset(&self, remaining: u32) -> u64 {
        let missing = self.limit.get().saturating_sub(remaining);
        ceil_seconds(self.refill * missing)
    }

    fn describe(&self, response: &mut Response, remaining: u32) {
        let headers = response.headers_mut();
        headers.insert(LIMIT, HeaderValue::from(self.limit.get()));
        headers.insert(REMAINING, HeaderValue::from(remaining));
        headers.insert(RESET, HeaderValue::from(self.reset(remaining)));
    }
}

/// Counts a request, and refuses it (429) if there were too many.
pub async fn limit(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let Some(rate) = &state.rate else {
        return next.run(request).await;
    };
    let client = client(&request);
    match rate.admit(&client) {
        Ok(remaining) => {
            let mut response = next.run(request).await;
            rate.describe(&mut response, remaining);
            response
        }
        Err(wait) => {
            let mut error = ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                Code::RateLimited,
                "too many requests; this one changed nothing",
            );
            error.retry_after = Some(Duration::from_secs(ceil_seconds(wait)));
            let mut response = error.into_response();
            rate.describe(&mut response, 0);
            response
        }
    }
}

fn client(request: &Request) -> Client {
    if let Some(holder) = request.extensions().get::<Holder>() {
        return Client::Key(holder.name.clone());
    }
    // Whoever connects: a header that names another address can be made up.
    let address = request
        .extensions()
        .get::<ConnectInfo<SocketAddr>>()
        .map_or(IpAddr::from([0, 0, 0, 0]), |ConnectInfo(peer)| {
            peer.ip().to_canonical()
        });
    Client::Address(match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => IpAddr::from((u128::from(address) >> 64 << 64).to_be_bytes()),
    })
}

fn ceil_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_an_allowance_of_its_own() {
        assert!(Rate::new(0, Duration::from_secs(1)).is_none());
        assert!(Rate::new(u32::MAX, Duration::from_millis(1)).is_some());
        let rate = Rate::new(3, Duration::from_secs(3600)).expect("a limit");
        let (a, b) = (
            Client::Key("a".into()),
            Client::Address(IpAddr::from([127, 0, 0, 1])),
        );
        for client in [&a, &b] {
            let admitted: Vec<_> = (0..3).map(|_| rate.admit(client)).collect();
            assert_eq!(admitted, [Ok(2), Ok(1), Ok(0)]);
            let wait = rate.admit(client).expect_err("too many");
            assert!(
                wait > Duration::from_secs(1190) && wait <= Duration::from_secs(1200),
                "{wait:?}"
            );
        }
        assert_eq!((rate.reset(3), rate.reset(0)), (0, 3600));
        rate.limiter.retain_recent();
        assert_eq!(rate.limiter.len(), 2);
    }
}
