//! The client, its responses and their bodies.

use crate::{
    DeniedNetworks, HttpError, Timeouts, TlsSettings,
    connect::Connector,
    error::{error_in, innermost},
    host_of,
    tls::client_config,
};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::body::{Body as _, Incoming};
use hyper_util::{
    client::legacy,
    rt::{TokioExecutor, TokioTimer},
};
use shipway_fault::Fault;
use shipway_telemetry::{TARGET, fail, meter, set, traced};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, timeout};
use tracing::info_span;

/// Most redirects that are followed.
const MAX_REDIRECTS: usize = 10;

/// Connections to a host that are kept for later: as many as small parts of blobs are fetched over
/// at once.
const MAX_IDLE: usize = 16;

/// A request's body.
pub type Body = UnsyncBoxBody<Bytes, Fault>;

/// No body.
pub fn no_body() -> Body {
    Empty::new().map_err(|e| match e {}).boxed_unsync()
}

/// A body of these bytes.
pub fn full_body(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|e| match e {}).boxed_unsync()
}

/// A pool of connections with one set of TLS settings. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: legacy::Client<Connector, Body>,
    timeouts: Timeouts,
}

/// A response, and where it finally came from.
#[derive(Debug)]
pub struct Response {
    /// Status and headers.
    pub head: http::response::Parts,
    /// The body, to be read.
    pub body: BodyReader,
    /// Address after redirects.
    pub uri: Uri,
}

impl Client {
    /// A client; reads certificate files, so call it where blocking is allowed.
    pub fn new(
        tls: &TlsSettings,
        timeouts: Timeouts,
        denied: DeniedNetworks,
    ) -> Result<Self, String> {
        let connector = Connector::new(client_config(tls)?, timeouts.connect, denied);
        let inner = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(90))
            .pool_max_idle_per_host(MAX_IDLE)
            .build(connector);
        Ok(Self { inner, timeouts })
    }

    /// Sends one request and waits for the head of its response. Redirects are responses like
    /// others.
    pub async fn send(&self, request: Request<Body>) -> Result<Response, HttpError> {
        let wait = self.timeouts.response + self.timeouts.connect;
        let answered = |sending: legacy::ResponseFuture| async move {
            timeout(wait, sending)
                .await
                .map_err(|_| HttpError::TimedOut { waiting_for: "an answer", after: wait })?
                .map_err(|e| error_of(&e))
        };
        self.traced(request, answered).await
    }

    /// Sends a request in a span of its own, with the W3C context among its headers (row
    /// `net.trace`); `answered` waits for the response.
    async fn traced<F>(
        &self,
        mut request: Request<Body>,
        answered: impl FnOnce(legacy::ResponseFuture) -> F,
    ) -> Result<Response, HttpError>
    where
        F: Future<Output = Result<http::Response<Incoming>, HttpError>>,
    {
        let uri = request.uri().clone();
        // Values of a query may be secrets (signed URLs).
        let span = info_span!(target: TARGET, "HTTP request", otel.name = %request.method(), otel.kind = "client",
            http.request.method = %request.method(), server.address = host_of(&uri), url.path = uri.path());
        if let Some(context) = span.in_scope(shipway_telemetry::current) {
            context.inject(request.headers_mut());
        }
        let length = request.body().size_hint().exact().unwrap_or(0);
        let noted = span.clone();
        let result = traced(span, async {
            let result = answered(self.inner.request(request)).await;
            match &result {
                Ok(response) => {
                    set(&noted, "http.response.status_code", response.status().as_u16().into());
                }
                Err(error) => fail(&noted, error),
            }
            result
        });
        let response = result.await?;
        meter::HTTP_SENT.add(length);
        Ok(self.received(response, uri))
    }

    /// Sends a request whose body is long. `sent` counts the body's bytes as they leave: the upload
    /// is stalled when it does not grow. `settle` is how long the response may take after the last
    /// byte.
    pub async fn send_long(
        &self,
        request: Request<Body>,
        sent: Arc<AtomicU64>,
        total: u64,
        settle: Duration,
    ) -> Result<Response, HttpError> {
        let watch = async {
            let mut before = sent.load(Ordering::Relaxed);
            loop {
                let wait = if before >= total { settle } else { self.timeouts.stall };
                tokio::time::sleep(wait).await;
                let now = sent.load(Ordering::Relaxed);
                if now == before {
                    break wait;
                }
                before = now;
            }
        };
        let answered = |sending: legacy::ResponseFuture| async move {
            tokio::select! {
                r = sending => r.map_err(|e| error_of(&e)),
                after = watch => Err(HttpError::TimedOut { waiting_for: "the upload to be taken", after }),
            }
        };
        let result = self.traced(request, answered).await;
        meter::HTTP_SENT.add(sent.load(Ordering::Relaxed));
        result
    }

    /// A GET or HEAD that follows redirects. `Authorization` and cookies stay with the host they
    /// were meant for, and nothing leads from HTTPS to plain HTTP.
    pub async fn fetch(
        &self,
        method: Method,
        uri: Uri,
        headers: HeaderMap,
    ) -> Result<Response, HttpError> {
        let (mut method, mut uri, mut headers) = (method, uri, headers);
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::new(no_body());
            *request.method_mut() = method.clone();
            *request.uri_mut() = uri.clone();
            *request.headers_mut() = headers.clone();
            let response = self.send(request).await?;
            let Some(location) = redirect_of(&response.head) else { return Ok(response) };
            let next = join(&uri, &location)?;
            if uri.scheme_str() == Some("https") && next.scheme_str() == Some("http") {
                return Err(HttpError::Protocol(format!(
                    "refusing the redirect from {} to plain HTTP at {}",
                    host_of(&uri),
                    host_of(&next)
                )));
            }
            if next.authority() != uri.authority() || next.scheme() != uri.scheme() {
                // Credentials for one host are not for another: keep what only describes the
                // request.
                let kept = [
                    header::ACCEPT,
                    header::RANGE,
                    header::CACHE_CONTROL,
                    header::USER_AGENT,
                    header::IF_NONE_MATCH,
                    header::IF_MODIFIED_SINCE,
                    header::IF_RANGE,
                ];
                headers = headers
                    .iter()
                    .filter(|(n, _)| kept.contains(n))
                    .map(|(n, v)| (n.clone(), v.clone()))
                    .collect();
            }
            if response.head.status == StatusCode::SEE_OTHER && method != Method::HEAD {
                method = Method::GET;
            }
            uri = next;
        }
        Err(HttpError::Protocol(format!("stopped after {MAX_REDIRECTS} redirects")))
    }

    fn received(&self, response: http::Response<Incoming>, uri: Uri) -> Response {
        let (head, body) = response.into_parts();
        Response { head, body: BodyReader::new(body, self.timeouts), uri }
    }
}

fn redirect_of(head: &http::response::Parts) -> Option<String> {
    use StatusCode as S;
    let redirect = matches!(
        head.status,
        S::MOVED_PERMANENTLY
            | S::FOUND
            | S::SEE_OTHER
            | S::TEMPORARY_REDIRECT
            | S::PERMANENT_REDIRECT
    );
    let location = head.headers.get(header::LOCATION)?.to_str().ok()?;
    redirect.then(|| location.to_owned())
}

/// The address without its query, whose values may be secrets (signed URLs).
pub fn display_of(uri: &Uri) -> String {
    let query = if uri.query().is_some() { "?…" } else { "" };
    format!("{}://{}{}{query}", uri.scheme_str().unwrap_or("?"), host_of(uri), uri.path())
}

/// What `reference` (a `Location`) means, seen from `base` (RFC 3986, section 5, as far as it
/// occurs).
pub fn join(base: &Uri, reference: &str) -> Result<Uri, HttpError> {
    let reference = reference.split('#').next().unwrap_or_default().trim();
    let bad = || {
        HttpError::Protocol(format!(
            "the server pointed to a wrong address {:?}",
            reference.chars().take(200).collect::<String>()
        ))
    };
    let (scheme, authority) =
        (base.scheme_str().unwrap_or("https"), base.authority().map_or("", |a| a.as_str()));
    let text = if reference.contains("://") {
        reference.to_owned()
    } else if let Some(rest) = reference.strip_prefix("//") {
        format!("{scheme}://{rest}")
    } else if reference.starts_with('/') {
        format!("{scheme}://{authority}{reference}")
    } else if reference.starts_with('?') {
        format!("{scheme}://{authority}{}{reference}", base.path())
    } else {
        let directory = base.path().rsplit_once('/').map_or("", |(d, _)| d);
        format!("{scheme}://{authority}{directory}/{reference}")
    };
    let uri: Uri = text.replace(' ', "%20").parse().map_err(|_| bad())?;
    let known = matches!(uri.scheme_str(), Some("http" | "https"));
    if known && uri.authority().is_some() { Ok(uri) } else { Err(bad()) }
}

/// The error of ours inside an error of the pool.
fn error_of(error: &legacy::Error) -> HttpError {
    error_in(error).unwrap_or_else(|| {
        let why = innermost(error);
        if error.is_connect() { HttpError::Connect(why) } else { HttpError::Broken(why) }
    })
}

/// Reads a response's body and notices when it stalls or trickles. Only time spent waiting for the
/// network counts, not the time that the reader takes between pieces.
#[derive(Debug)]
pub struct BodyReader {
    body: Incoming,
    timeouts: Timeouts,
    waited: Duration,
    moved: u64,
}

impl BodyReader {
    fn new(body: Incoming, timeouts: Timeouts) -> Self {
        Self { body, timeouts, waited: Duration::ZERO, moved: 0 }
    }

    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            let started = Instant::now();
            let left = self.timeouts.stall.saturating_sub(self.waited);
            let stalled = HttpError::TimedOut { waiting_for: "data", after: self.timeouts.stall };
            let frame = match timeout(left, self.body.frame()).await {
                Err(_) => return Err(stalled),
                Ok(None) => return Ok(None),
                Ok(Some(frame)) => frame.map_err(|e| {
                    error_in(&e).unwrap_or_else(|| HttpError::Broken(innermost(&e)))
                })?,
            };
            self.waited += started.elapsed();
            let Ok(data) = frame.into_data() else { continue };
            self.moved += data.len() as u64;
            if self.moved >= self.timeouts.stall_bytes {
                (self.waited, self.moved) = (Duration::ZERO, 0);
            }
            if !data.is_empty() {
                meter::HTTP_RECEIVED.add(data.len() as u64);
                return Ok(Some(data));
            }
        }
    }

    /// The whole rest, at most `limit` bytes.
    pub async fn collect(mut self, limit: u64) -> Result<Bytes, HttpError> {
        let mut all = BytesMut::new();
        while let Some(piece) = self.next().await? {
            if all.len() as u64 + piece.len() as u64 > limit {
                return Err(HttpError::TooLarge(limit));
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_joined() {
        let base: Uri = "https://r.io:5/v2/a/blobs/uploads/?x=1".parse().unwrap();
        for (reference, want) in [
            ("https://s3.example/x?y", "https://s3.example/x?y"),
            ("//cdn/x", "https://cdn/x"),
            ("/v2/z?_state=a%3D", "https://r.io:5/v2/z?_state=a%3D"),
            ("uuid", "https://r.io:5/v2/a/blobs/uploads/uuid"),
            ("?q=1", "https://r.io:5/v2/a/blobs/uploads/?q=1"),
            ("/a#fragment", "https://r.io:5/a"),
        ] {
            assert_eq!(join(&base, reference).unwrap().to_string(), want);
        }
        for bad in ["ftp://x/y", "https://", "file:///etc/passwd", "http://[::"] {
            assert!(join(&base, bad).is_err(), "{bad}");
        }
    }
}
