//! A proxy between an operator and the API server, which refuses, holds and cuts what it is told to.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, Result};
use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
};
use birb_nest_cluster::Cluster;
use futures::{StreamExt, stream};
use kube::{
    Client,
    config::{AuthInfo, KubeConfigOptions, Kubeconfig},
};
use serde_json::json;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

/// `User-Agent` of what went through a proxy, for the audit log.
pub const THROUGH_PROXY: &str = "birb-nest-test-proxy";

/// Largest request that is passed on.
const LARGEST: usize = 4 << 20;

/// What the proxy does to requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// All are answered with this status, as an API server that is overloaded or broken does; but those of the election.
    Refuse(u16),
    /// Applies of Services whose names begin so are answered with this status.
    RefuseServices(&'static str, u16),
    /// Applies of Services whose names begin so get no answer; those held go on when the fault is over.
    HoldServices(&'static str),
    /// Watches begin and then yield an error with this code and nothing else.
    WatchError(u16),
    /// Watches begin and then yield the `Status` of a server that is starting, half a line, and nothing else.
    WatchGarbage,
    /// Requests of the election get no answer; those held go on when the fault is over.
    HoldElection,
    /// What would change something, but for the election, gets no answer; what is held goes on when the fault is over.
    HoldWrites,
    /// None gets an answer; those held go on when the fault is over.
    HoldAll,
    /// Watches end as too old, and the listings that follow never get an answer, not even when the fault is over.
    LoseLists,
    /// Watches stay open and yield nothing any more, those that are open for as long as they live.
    Mute,
    /// The next so many applies of Services meet a conflict, each a change by somebody else.
    Conflict(u32),
}

impl Fault {
    fn hits(self, request: &Request) -> bool {
        let is_election = resource(request) == "leases";
        match self {
            Self::Refuse(_) => !is_election,
            Self::RefuseServices(prefix, _) | Self::HoldServices(prefix) => {
                applies_service(request, prefix)
            }
            Self::WatchError(_) | Self::WatchGarbage => is_watch(request),
            Self::HoldElection => is_election,
            Self::HoldWrites => !is_election && request.method() != Method::GET,
            Self::HoldAll => true,
            Self::LoseLists => is_list(request),
            // What it hits are answers.
            Self::Mute => false,
            Self::Conflict(_) => applies_service(request, ""),
        }
    }
}

/// A running proxy, at first one that passes everything on. Dropped, it ends.
pub struct Proxy {
    /// For a kubeconfig. Without TLS, so that there is something to look into.
    pub url: String,
    link: Link,
    serving: JoinHandle<()>,
}

#[derive(Clone)]
struct Link {
    client: Client,
    gate: watch::Sender<Gate>,
    /// Resources of which a request, or what a watch told, was hit by the fault that there is.
    hit: Arc<Mutex<BTreeSet<String>>>,
    /// Each request that was, as it came.
    hits: Arc<Mutex<Vec<Hit>>>,
}

/// A request that a fault has hit.
#[derive(Clone, Debug)]
pub struct Hit {
    /// What it was about, in plural, as in `deployments`.
    pub resource: String,
    /// When it came.
    pub at: Instant,
}

#[derive(Clone, Copy, Default)]
struct Gate {
    fault: Option<Fault>,
    /// A watch ends when this differs from what it was when it began.
    n_cuts: u64,
}

impl Gate {
    fn count_conflict(&mut self) {
        if let Some(Fault::Conflict(left)) = self.fault {
            self.fault = (left > 1).then(|| Fault::Conflict(left - 1));
        }
    }
}

impl Proxy {
    /// Starts one in front of the API server of `cluster`.
    ///
    /// # Errors
    /// No port can be had, or the kubeconfig cannot be used.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig())?;
        let options = KubeConfigOptions::default();
        let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        // Who asks says who it is.
        config.auth_info = AuthInfo::default();
        config.default_retry = false;
        let link = Link {
            client: Client::try_from(config)?,
            gate: watch::Sender::default(),
            hit: Arc::default(),
            hits: Arc::default(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let router = Router::new().fallback(pass_on).with_state(link.clone());
        let serving = tokio::spawn(async move {
            // It ends with the test.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { url, link, serving })
    }

    /// From now on `fault` happens to requests; watches that are open are cut, unless it concerns none.
    pub fn fault(&self, fault: Fault) {
        self.link.hits().clear();
        self.link.all_hits().clear();
        self.link.gate.send_modify(|gate| {
            gate.fault = Some(fault);
            let is_cut = !matches!(
                fault,
                Fault::HoldElection
                    | Fault::Mute
                    | Fault::RefuseServices(..)
                    | Fault::HoldServices(_)
                    | Fault::Conflict(_)
            );
            gate.n_cuts += u64::from(is_cut);
        });
    }

    /// The fault is over.
    pub fn heal(&self) {
        self.link.gate.send_modify(|gate| gate.fault = None);
    }

    /// Resources of which a request, or what a watch told, was hit since the last call of [`Proxy::fault`].
    pub fn hit(&self) -> BTreeSet<String> {
        self.link.hits().clone()
    }

    /// The requests that were hit since then, oldest first.
    pub fn hits(&self) -> Vec<Hit> {
        self.link.all_hits().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Link {
    fn hits(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.hit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_hits(&self) -> std::sync::MutexGuard<'_, Vec<Hit>> {
        self.hits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn pass_on(State(link): State<Link>, request: Request) -> Response {
    let gate = *link.gate.borrow();
    let fault = gate.fault.filter(|fault| fault.hits(&request));
    if fault.is_some() {
        link.hits().insert(resource(&request));
        link.all_hits().push(Hit {
            resource: resource(&request),
            at: Instant::now(),
        });
    }
    if gate.fault == Some(Fault::LoseLists) && is_watch(&request) {
        return watch_error(410);
    }
    match fault {
        Some(Fault::Refuse(code) | Fault::RefuseServices(_, code)) => return refusal(code),
        Some(Fault::Conflict(_)) => {
            link.gate.send_modify(Gate::count_conflict);
            return refusal(409);
        }
        Some(Fault::WatchError(code)) => return watch_error(code),
        Some(Fault::WatchGarbage) => {
            return format!("{}\n{{\"type\":\"MOD", status(429)).into_response();
        }
        Some(
            held @ (Fault::HoldElection
            | Fault::HoldServices(_)
            | Fault::HoldWrites
            | Fault::HoldAll),
        ) => {
            // Who gives up in the meantime takes this request along.
            let _ = link
                .gate
                .subscribe()
                .wait_for(|gate| gate.fault != Some(held))
                .await;
        }
        // Whoever gives up ends this.
        Some(Fault::LoseLists) => std::future::pending().await,
        Some(Fault::Mute) | None => {}
    }
    match forward(&link, request, gate.n_cuts).await {
        Ok(answer) => answer,
        Err(error) => (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
    }
}

async fn forward(link: &Link, request: Request, n_cuts: u64) -> Result<Response> {
    let watched = is_watch(&request).then(|| resource(&request));
    let (mut parts, body) = request.into_parts();
    parts.headers.remove(header::HOST);
    parts
        .headers
        .insert(header::USER_AGENT, HeaderValue::from_static(THROUGH_PROXY));
    let body = to_bytes(body, LARGEST).await?.to_vec();
    let answer = link
        .client
        .send(http::Request::from_parts(parts, body.into()))
        .await;
    let (parts, body) = answer
        .context("the API server does not answer")?
        .into_parts();
    let body = Body::new(body);
    let body = match watched {
        Some(resource) => until_cut(link, body, n_cuts, resource),
        None => body,
    };
    Ok(Response::from_parts(parts, body))
}

/// `body` until watches are cut: then its connection ends amidst it.
fn until_cut(link: &Link, body: Body, n_cuts: u64, resource: String) -> Body {
    let link = link.clone();
    let begun = (body.into_data_stream(), link.gate.subscribe(), false);
    let chunks = stream::unfold(begun, move |(mut chunks, mut gate, mut is_mute)| {
        let (link, resource) = (link.clone(), resource.clone());
        async move {
            loop {
                let chunk = tokio::select! {
                    _ = gate.wait_for(|gate| gate.n_cuts != n_cuts) => Err(io::Error::other("cut")),
                    chunk = chunks.next() => chunk?.map_err(io::Error::other),
                };
                // For good: what follows may be the rest of a line.
                is_mute |= gate.borrow().fault == Some(Fault::Mute);
                if !is_mute || chunk.is_err() {
                    return Some((chunk, (chunks, gate, is_mute)));
                }
                link.hits().insert(resource.clone());
            }
        }
    });
    Body::from_stream(chunks)
}

/// A watch that yields this error and nothing else.
fn watch_error(code: u16) -> Response {
    let event = json!({ "type": "ERROR", "object": status(code) });
    format!("{event}\n").into_response()
}

fn refusal(code: u16) -> Response {
    let body = status(code).to_string();
    let mut answer = (StatusCode::from_u16(code).unwrap_or_default(), body).into_response();
    let headers = answer.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    answer
}

fn status(code: u16) -> serde_json::Value {
    let reason = match code {
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    json!({ "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
            "message": "as the test says" })
}

fn is_watch(request: &Request) -> bool {
    request
        .uri()
        .query()
        .is_some_and(|query| query.split('&').any(|part| part == "watch=true"))
}

/// Whether it asks for all objects of a kind.
fn is_list(request: &Request) -> bool {
    let last = request.uri().path().rsplit('/').next();
    request.method() == Method::GET
        && !is_watch(request)
        && last.is_some_and(|last| !last.is_empty() && last == resource(request))
}

fn applies_service(request: &Request, prefix: &str) -> bool {
    let name = request.uri().path().rsplit('/').next().unwrap_or_default();
    resource(request) == "services" && request.method() == Method::PATCH && name.starts_with(prefix)
}

/// What the request is about, in plural, as in `deployments`.
fn resource(request: &Request) -> String {
    let path: Vec<&str> = request.uri().path().trim_matches('/').split('/').collect();
    let rest = match path[..] {
        ["api", _, ref rest @ ..] | ["apis", _, _, ref rest @ ..] => rest,
        _ => &[],
    };
    let found = match *rest {
        ["namespaces", _, resource, ..] | [resource, ..] => resource,
        _ => "",
    };
    found.to_owned()
}
