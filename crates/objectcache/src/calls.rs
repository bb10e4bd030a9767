//! Requests to a store: signed, bounded, tried again while the failure may pass and there is time.

use crate::LayerContent;
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header, request::Parts};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use parking_lot::Mutex;
use reqsign_core::{Signer, SigningCredential};
use shipway_fault::{Class, Code, Fault, Result};
use shipway_http::{
    Body, BodyReader, Client, HttpError, Response, display_of, full_body, host_of, no_body,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

/// Longest error document that is read.
const MAX_ERROR: u64 = 64 << 10;
/// Longest part of a server's words that is shown.
const MAX_WORDS: usize = 300;
/// How long a store may take to answer once it has a whole upload.
const SETTLE: Duration = Duration::from_secs(60);

/// How often and how long a request is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Most tries of one request.
    pub tries: u32,
    /// How long a store may fail, whatever is asked of it, before nothing is tried again.
    pub budget: Duration,
    /// First pause before another try. The next ones are twice as long each.
    pub pause: Duration,
    /// Longest pause, unless the store asks for a longer one that the budget allows.
    pub max_pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            tries: 5,
            budget: Duration::from_secs(35),
            pause: Duration::from_millis(500),
            max_pause: Duration::from_secs(8),
        }
    }
}

/// Adds credentials to a request.
#[async_trait]
pub(crate) trait Sign: Send + Sync {
    async fn sign(&self, head: &mut Parts) -> Result<()>;
}

#[async_trait]
impl<K: SigningCredential> Sign for Signer<K> {
    async fn sign(&self, head: &mut Parts) -> Result<()> {
        Self::sign(self, head, None).await.map_err(|e| {
            // Its contexts may name files and addresses, and never a credential.
            tracing::debug!(error = ?e, "failed to sign a request");
            Fault::new(Code::Unauthenticated, format!("no usable credentials: {e}"))
                .with_class(Class::Environment)
        })
    }
}

/// What a request carries.
#[derive(Clone, Copy)]
pub(crate) enum Payload<'a> {
    Empty,
    Bytes(&'a Bytes),
    /// So many bytes of a layer, from an offset on.
    Layer {
        content: &'a dyn LayerContent,
        offset: u64,
        length: u64,
    },
}

impl Payload<'_> {
    pub fn len(&self) -> u64 {
        match self {
            Self::Empty => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Layer { length, .. } => *length,
        }
    }
}

/// One request, as it is before it is signed.
pub(crate) struct Call<'a> {
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
    pub payload: Payload<'a>,
    /// Whether redirects are followed. A signature would be for another address.
    pub follows: bool,
    /// What it is for, for messages: `write layer sha256:…`.
    pub action: String,
}

impl<'a> Call<'a> {
    pub fn new(method: Method, uri: Uri, action: impl Into<String>) -> Self {
        Self {
            method,
            uri,
            headers: HeaderMap::new(),
            payload: Payload::Empty,
            follows: false,
            action: action.into(),
        }
    }

    pub fn header(mut self, name: &'static str, value: impl TryInto<HeaderValue>) -> Self {
        if let Ok(value) = value.try_into() {
            self.headers.insert(name, value);
        }
        self
    }

    /// The same, through redirects; only for a GET that is not signed.
    pub fn following(mut self) -> Self {
        self.follows = true;
        self
    }

    pub fn payload(mut self, payload: Payload<'a>) -> Self {
        self.payload = payload;
        self
    }
}

/// An answer, not an error.
pub(crate) struct StoreReply {
    pub headers: HeaderMap,
    pub status: StatusCode,
    pub body: BodyReader,
}

impl StoreReply {
    /// A header as text.
    pub fn header(&self, name: impl header::AsHeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The whole body, at most `limit` bytes.
    pub async fn bytes(self, limit: u64) -> Result<Bytes> {
        Ok(self.body.collect(limit).await?)
    }

    /// Checks that the body is a document from `offset` on.
    pub fn body_from(self, offset: u64) -> Result<BodyReader> {
        let range = self.header(header::CONTENT_RANGE).unwrap_or_default();
        let right = offset == 0
            || self.status == StatusCode::PARTIAL_CONTENT
                && range.starts_with(&format!("bytes {offset}-"));
        if right {
            Ok(self.body)
        } else {
            let why =
                format!("the store answered a request for bytes from {offset} on with others");
            Err(Fault::unknown(why).with_class(Class::Environment))
        }
    }
}

/// What an error document of a store says.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct StoreError {
    /// The store's name for the error: `NoSuchKey`.
    pub code: String,
    /// A sentence.
    pub message: String,
}

/// Why there is no answer to take.
struct Failure {
    fault: Fault,
    /// Whether another try may succeed.
    may_pass: bool,
    /// When the store wants to be asked again.
    after: Option<Duration>,
}

/// Requests to one store, on behalf of one import or export.
pub(crate) struct Calls {
    client: Client,
    /// How it is called in messages: `S3`.
    store: &'static str,
    patience: Patience,
    /// Since when nothing but failures came.
    failing: Mutex<Option<Instant>>,
    words: fn(&[u8]) -> StoreError,
}

impl Calls {
    /// `words` reads the store's error documents.
    pub fn new(
        client: Client,
        store: &'static str,
        patience: Patience,
        words: fn(&[u8]) -> StoreError,
    ) -> Self {
        Self { client, store, patience, failing: Mutex::new(None), words }
    }

    /// Sends `call`, signed anew with each try.
    pub async fn send(&self, call: &Call<'_>, signer: &dyn Sign) -> Result<StoreReply> {
        let mut pause = self.patience.pause;
        let mut tries = 1;
        loop {
            let failure = match self.once(call, signer).await {
                Ok(reply) => {
                    *self.failing.lock() = None;
                    return Ok(reply);
                }
                Err(failure) => failure,
            };
            let wait = failure.after.unwrap_or(pause);
            if !failure.may_pass || tries >= self.patience.tries || !self.may_wait(wait) {
                let place = format!("{} at {}", self.store, host_of(&call.uri));
                return Err(failure.fault.context(format!("{} ({place})", call.action)));
            }
            tracing::debug!(
                store = self.store, action = call.action, error = %failure.fault,
                "trying again in {wait:?}"
            );
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(self.patience.max_pause);
            tries += 1;
        }
    }

    /// Whether the budget allows a pause of `wait`. It begins with the first failure after a
    /// success.
    fn may_wait(&self, wait: Duration) -> bool {
        let since = *self.failing.lock().get_or_insert_with(Instant::now);
        since.elapsed() + wait <= self.patience.budget
    }

    async fn once(&self, call: &Call<'_>, signer: &dyn Sign) -> Result<StoreReply, Failure> {
        let begun = Instant::now();
        // What takes long counts from its beginning.
        let fail = |fault: Fault, may_pass: bool| {
            if may_pass {
                self.failing.lock().get_or_insert(begun);
            }
            Failure { fault, may_pass, after: None }
        };
        let (mut head, ()) = Request::new(()).into_parts();
        (head.method, head.uri, head.headers) =
            (call.method.clone(), call.uri.clone(), call.headers.clone());
        let length = call.payload.len();
        if length > 0 || call.method == Method::PUT || call.method == Method::POST {
            head.headers.insert(header::CONTENT_LENGTH, length.into());
        }
        signer.sign(&mut head).await.map_err(|f| fail(f, false))?;
        let agent = HeaderValue::from_static(concat!("shipway/", env!("CARGO_PKG_VERSION")));
        head.headers.insert(header::USER_AGENT, agent);
        let sent = match call.payload {
            Payload::Empty if call.follows => {
                self.client.fetch(head.method, head.uri, head.headers).await
            }
            Payload::Empty => self.client.send(Request::from_parts(head, no_body())).await,
            Payload::Bytes(bytes) => {
                let count = Arc::new(AtomicU64::new(length));
                let request = Request::from_parts(head, full_body(bytes.clone()));
                self.client.send_long(request, count, length, SETTLE).await
            }
            Payload::Layer { content, offset, .. } => {
                let count = Arc::new(AtomicU64::new(0));
                let body = layer_body(content, offset, length, count.clone()).await;
                let request = Request::from_parts(head, body.map_err(|f| fail(f, false))?);
                self.client.send_long(request, count, length, SETTLE).await
            }
        };
        let response = sent.map_err(|error| {
            let passing = may_pass(&error);
            fail(Fault::from(error), passing)
        })?;
        if response.head.status.is_success() {
            let Response { head, body, .. } = response;
            return Ok(StoreReply { headers: head.headers, status: head.status, body });
        }
        let (status, after) = (response.head.status, retry_after(&response.head.headers));
        let uri = display_of(&response.uri);
        let said = (self.words)(&response.body.collect(MAX_ERROR).await.unwrap_or_default());
        let (fault, passing) = judged(status, &said, &call.method, &uri);
        Err(Failure { after, ..fail(fault, passing) })
    }
}

/// Whether a failure to get an answer may pass.
fn may_pass(error: &HttpError) -> bool {
    match error {
        HttpError::Connect(why) => !why.contains("no such host"),
        HttpError::TimedOut { .. } | HttpError::Broken(_) => true,
        HttpError::NotTls(_)
        | HttpError::Tls(_)
        | HttpError::TooLarge(_)
        | HttpError::Protocol(_)
        | HttpError::Local(_) => false,
    }
}

/// The fault that an answer stands for, and whether it may pass.
fn judged(status: StatusCode, said: &StoreError, method: &Method, uri: &str) -> (Fault, bool) {
    let StoreError { code, message } = said;
    let mut text = format!("{method} request to {uri}: {}", status.as_u16());
    for part in [code, message] {
        if !part.is_empty() {
            text.push_str(": ");
            text.extend(part.chars().filter(|c| !c.is_control()).take(MAX_WORDS));
        }
    }
    // Stores that gave up waiting for bytes say so with a status for wrong requests.
    let passing = matches!(status.as_u16(), 408 | 429 | 500..) || code == "RequestTimeout";
    let code = match status.as_u16() {
        404 => Code::NotFound,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        409 | 412 => Code::AlreadyExists,
        429 => Code::ResourceExhausted,
        501 => Code::Unimplemented,
        _ if passing => Code::Unavailable,
        _ => Code::Unknown,
    };
    (Fault::new(code, text).with_class(Class::Environment), passing && status.as_u16() != 501)
}

/// When a server wants to be asked again: seconds, or a time.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(SystemTime::now()).unwrap_or_default())
}

/// `length` bytes of a layer from `offset` on, counted as they leave.
async fn layer_body(
    content: &dyn LayerContent,
    offset: u64,
    length: u64,
    count: Arc<AtomicU64>,
) -> Result<Body> {
    let pieces = content.open(offset).await?;
    let pieces = stream::try_unfold((pieces, length), move |(mut pieces, left)| {
        let count = count.clone();
        async move {
            if left == 0 {
                return Ok::<_, Fault>(None);
            }
            let Some(mut piece) = pieces.next().await.transpose()? else {
                return Err(Fault::internal(format!("a layer ended {left} bytes too early")));
            };
            piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            let left = left - piece.len() as u64;
            count.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Ok(Some((piece, (pieces, left))))
        }
    });
    Ok(StreamBody::new(pieces.map_ok(Frame::data)).boxed_unsync())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_tried_again() {
        let of = |status: u16, code: &str| {
            let words = StoreError { code: code.into(), message: "m".into() };
            let status = StatusCode::from_u16(status).unwrap();
            let (fault, passing) = judged(status, &words, &Method::PUT, "http://h/k");
            (fault.code(), passing)
        };
        assert_eq!(of(503, "SlowDown"), (Code::Unavailable, true));
        assert_eq!(of(429, ""), (Code::ResourceExhausted, true));
        assert_eq!(of(400, "RequestTimeout"), (Code::Unavailable, true));
        assert_eq!(of(400, "InvalidArgument"), (Code::Unknown, false));
        assert_eq!(of(403, "AccessDenied"), (Code::PermissionDenied, false));
        assert_eq!(of(404, "NoSuchKey"), (Code::NotFound, false));
        assert_eq!(of(501, "NotImplemented"), (Code::Unimplemented, false));
        assert_eq!(of(412, "BlobAlreadyExists"), (Code::AlreadyExists, false));
    }

    #[test]
    fn a_store_says_when_to_ask_again() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(of("7"), Some(Duration::from_secs(7)));
        assert_eq!(of("Wed, 21 Oct 2015 07:28:00 GMT"), Some(Duration::ZERO));
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(of(&soon).is_some_and(|d| (90..=100).contains(&d.as_secs())));
        assert_eq!(of("-3"), None);
        assert_eq!(of("soon"), None);
    }
}
