//! The proxy itself: HTTP/1.1 towards the step, one request after another shown to the policy, sent
//! on and noted.

use crate::{
    Authority, Capture, EgressRules, ProxiedRequest,
    recorded::{Note, Recorded},
    target::{MAX_URL, RequestTarget},
    upstream::{Connector, Denied},
};
use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo, TokioTimer},
};
use parking_lot::Mutex;
use shipway_executor::{Egress, StepProxy};
use shipway_fault::{Fault, Result};
use std::{convert::Infallible, fmt, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

/// Most connections of one step at a time; more wait.
pub const MAX_CONNECTIONS: usize = 256;
/// Longest head of a request.
pub const MAX_HEAD: usize = 64 << 10;
/// Most headers of a request.
const MAX_HEADERS: usize = 100;
/// How long a head, or a TLS handshake, may take. A connection that says nothing for as long is
/// closed, too.
const HEAD_PATIENCE: Duration = Duration::from_secs(30);
/// Idle connections to one server that are kept.
const MAX_IDLE: usize = 8;

/// What belongs to one connection and not to the request that it carries.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// Decides what a step may fetch.
#[async_trait]
pub trait Policy: Send + Sync {
    /// The address to fetch in the place of `url`, or why it is not allowed.
    async fn check(&self, url: &str) -> Result<String>;
}

/// The proxy of one step. Clones share what was captured.
#[derive(Clone)]
pub struct Proxy {
    authority: Arc<Authority>,
    policy: Option<Arc<dyn Policy>>,
    egress: Arc<EgressRules>,
    capture: Capture,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proxy")
    }
}

impl Proxy {
    /// A proxy that notes in `capture` what the policy allows; without one, everything is allowed.
    pub fn new(
        authority: Arc<Authority>,
        policy: Option<Arc<dyn Policy>>,
        capture: Capture,
    ) -> Self {
        Self { authority, policy, egress: Arc::default(), capture }
    }

    /// The same within `rules`, which go before the policy and also hold for what it makes of a
    /// request.
    #[must_use]
    pub fn within(self, rules: Arc<EgressRules>) -> Self {
        Self { egress: rules, ..self }
    }

    /// Where a request for `target` goes, or why it goes nowhere.
    async fn checked(&self, method: &Method, target: RequestTarget) -> Result<RequestTarget> {
        self.egress.check_host(&target.host)?;
        let target = self.judged(method, target).await?;
        self.egress.check_host(&target.host)?;
        Ok(target)
    }

    async fn judged(&self, method: &Method, target: RequestTarget) -> Result<RequestTarget> {
        let Some(policy) = &self.policy else { return Ok(target) };
        let asked = target.to_string();
        let url = policy.check(&asked).await?;
        if url == asked {
            return Ok(target);
        }
        if *method != Method::GET {
            return Err(Fault::invalid(format!(
                "source policy converted proxy request {asked:?}, but conversion is only supported for GET"
            )));
        }
        RequestTarget::parse(&url).ok_or_else(|| {
            Fault::invalid(format!(
                "source policy converted proxy request {asked:?} to an unsupported address"
            ))
        })
    }
}

#[async_trait]
impl StepProxy for Proxy {
    fn trusted(&self) -> Bytes {
        self.authority.pem().clone()
    }

    async fn serve(&self, listener: TcpListener, egress: Arc<dyn Egress>) {
        let connector = Connector::new(egress, self.egress.clone(), self.authority.client());
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(HEAD_PATIENCE)
            .pool_max_idle_per_host(MAX_IDLE)
            .build(connector);
        let serving = Arc::new(Serving { proxy: self.clone(), client });
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            // Never closed.
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok((stream, _)) => {
                    let serving = serving.clone();
                    connections.spawn(shipway_task::named("serve a connection", async move {
                        serving.connection(stream).await;
                        drop(permit);
                    }));
                }
                // No descriptors are left, or the client went away in between.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }
}

struct Serving {
    proxy: Proxy,
    client: Client<Connector, Incoming>,
}

/// A connection that asked for a tunnel, and where to.
type Tunnel = Mutex<Option<(OnUpgrade, RequestTarget)>>;

impl Serving {
    async fn connection(&self, stream: tokio::net::TcpStream) {
        let _ = stream.set_nodelay(true);
        let tunnel = Tunnel::default();
        self.requests(stream, None, &tunnel).await;
        let asked = tunnel.into_inner();
        let Some((upgrade, target)) = asked else { return };
        if let Err(e) = self.tunnel(upgrade, target).await {
            tracing::debug!("tunnel of a step failed: {e}");
        }
    }

    /// Takes the place of the server that a tunnel leads to.
    async fn tunnel(
        &self,
        upgrade: OnUpgrade,
        target: RequestTarget,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let config = self.proxy.authority.server(&target.host)?;
        let stream = TokioIo::new(upgrade.await?);
        let tls = timeout(HEAD_PATIENCE, TlsAcceptor::from(config).accept(stream)).await??;
        self.requests(tls, Some(&target), &Tunnel::default()).await;
        Ok(())
    }

    async fn requests(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        within: Option<&RequestTarget>,
        tunnel: &Tunnel,
    ) {
        let service = service_fn(|request| async {
            Ok::<_, Infallible>(self.answer(request, within, tunnel).await)
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_PATIENCE)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service);
        // Boxed: requests within a tunnel are served by the same code.
        let outcome: std::result::Result<(), hyper::Error> = match within {
            None => served.with_upgrades().await,
            Some(_) => served.await,
        };
        if let Err(e) = outcome {
            tracing::debug!("connection of a step failed: {e}");
        }
    }

    async fn answer(
        &self,
        mut request: Request<Incoming>,
        within: Option<&RequestTarget>,
        tunnel: &Tunnel,
    ) -> Response<Body> {
        if request.uri().path().len() + request.uri().query().map_or(0, str::len) > MAX_URL {
            return plain(StatusCode::URI_TOO_LONG, "the address is too long");
        }
        if request.method() == Method::CONNECT {
            let target = request.uri().authority().and_then(|a| RequestTarget::new(true, a, None));
            return match target.filter(|_| within.is_none()) {
                Some(target) => {
                    let upgrade = hyper::upgrade::on(&mut request);
                    *tunnel.lock() = Some((upgrade, target));
                    Response::new(no_body())
                }
                None => plain(StatusCode::BAD_REQUEST, "no address to connect to"),
            };
        }
        let Some(asked) = RequestTarget::of_request(request.uri(), request.headers(), within)
        else {
            return plain(StatusCode::BAD_REQUEST, "no address of a server");
        };
        let target = match self.proxy.checked(request.method(), asked.clone()).await {
            Ok(target) => target,
            Err(e) => {
                tracing::debug!("denied a step's request for {asked}: {e}");
                self.note(request.method(), &asked, None, StatusCode::FORBIDDEN);
                return plain(StatusCode::FORBIDDEN, "Forbidden");
            }
        };
        self.send(request, target).await
    }

    /// Sends a request that is allowed.
    async fn send(&self, request: Request<Incoming>, target: RequestTarget) -> Response<Body> {
        let (head, body) = request.into_parts();
        let method = head.method;
        let ranged = head.headers.contains_key(header::RANGE);
        let mut onward = Request::new(body);
        *onward.headers_mut() = end_to_end(head.headers);
        // What is noted is what a server has, not how it was packed.
        onward.headers_mut().remove(header::ACCEPT_ENCODING);
        *onward.method_mut() = method.clone();
        // Whatever the step calls the host: this one was allowed.
        match (target.to_string().parse(), HeaderValue::from_str(&target.authority())) {
            (Ok(uri), Ok(host)) => {
                *onward.uri_mut() = uri;
                onward.headers_mut().insert(header::HOST, host);
            }
            _ => return plain(StatusCode::BAD_REQUEST, "no address of a server"),
        }
        let answer = match self.client.request(onward).await {
            Ok(answer) => answer,
            Err(e) => {
                let (reason, is_denied) = reason_of(&e);
                if is_denied {
                    tracing::debug!("denied a step's request for {target}: {reason}");
                    self.note(&method, &target, None, StatusCode::FORBIDDEN);
                    return plain(StatusCode::FORBIDDEN, "Forbidden");
                }
                self.note(&method, &target, None, StatusCode::BAD_GATEWAY);
                self.proxy.capture.incomplete(
                    method.to_string(),
                    target.to_string(),
                    "upstream_error",
                );
                return plain(StatusCode::BAD_GATEWAY, &reason);
            }
        };
        let (head, body) = answer.into_parts();
        let location = head
            .headers
            .get(header::LOCATION)
            .and_then(|l| l.to_str().ok())
            .and_then(|l| target.follow(l));
        self.note(&method, &target, location, head.status);
        let note = Note {
            capture: self.proxy.capture.clone(),
            method,
            target,
            status: head.status,
            ranged,
        };
        let mut response = Response::new(Recorded::new(body, note).boxed_unsync());
        *response.status_mut() = head.status;
        *response.headers_mut() = end_to_end(head.headers);
        response
    }

    fn note(
        &self,
        method: &Method,
        target: &RequestTarget,
        redirect: Option<String>,
        status: StatusCode,
    ) {
        self.proxy.capture.request(ProxiedRequest {
            method: method.to_string(),
            url: target.to_string(),
            redirect,
            status: status.as_u16(),
        });
    }
}

/// The headers without those that belong to a connection.
fn end_to_end(mut headers: HeaderMap) -> HeaderMap {
    let named: Vec<String> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    for name in named.iter().map(String::as_str).chain(HOP_BY_HOP.iter().copied()) {
        headers.remove(name);
    }
    headers
}

fn no_body() -> Body {
    Full::default().map_err(|e: Infallible| match e {}).boxed_unsync()
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let body = Full::new(Bytes::from(format!("{text}\n")))
        .map_err(|e: Infallible| match e {})
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
}

/// The innermost reason, which is what the connector reports, and whether it is that the server may
/// not be reached.
fn reason_of(error: &(dyn std::error::Error + 'static)) -> (String, bool) {
    let mut at = error;
    let mut is_denied = false;
    loop {
        is_denied |= at.downcast_ref::<Denied>().is_some()
            || at.downcast_ref::<std::io::Error>().is_some_and(|e| {
                e.get_ref().is_some_and(|inner| inner.downcast_ref::<Denied>().is_some())
            });
        match at.source() {
            Some(source) => at = source,
            None => return (at.to_string(), is_denied),
        }
    }
}
