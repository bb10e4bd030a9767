//! Between kubelet and containerd: a socket that passes everything on, and keeps the credentials
//! that pulls bring for the repositories that they are for.
//!
//! kubelet hands the credentials of a pod's secrets, of its node and of its credential providers to
//! CRI's `PullImage`, and containerd forgets them when the pull ends, which is when a lazy layer
//! needs them. So kubelet is pointed here (`--image-service-endpoint`), and this proxies to
//! containerd. It works on HTTP/2's requests and bodies, not on messages: whatever CRI's versions
//! have, streams, errors and trailers included, goes through as it is. Only of
//! `runtime.v1.ImageService/PullImage` and its elder `runtime.v1alpha2` (containerd 1.6 serves
//! both, and the fields have the same numbers) the request is read, and then sent byte for byte.
//!
//! What a pull brings counts from its beginning, since its layers are looked for meanwhile; if
//! containerd says that the pull failed, what was there before counts again.
//!
//! `hyper` does HTTP/2 on both sides, as it does for the registry client's HTTP; tonic is above it
//! and would want to know every message. `prost` reads three messages of CRI's.

use crate::keyring::{Giver, Grant, Hosts, Keyring, Login, Receipt};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Uri, uri::Authority};
use http_body_util::{BodyExt as _, Either, Empty, Full, Limited, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, client::conn::http2::SendRequest, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use prost::Message;
use shipway_fault::{Code, Fault, Result};
use shipway_oci::ImageName;
use std::{convert::Infallible, path::PathBuf, sync::Arc};
use tokio::{net::UnixStream, sync::Semaphore};
use tokio_stream::{Stream, StreamExt as _};
use zeroize::Zeroize as _;

/// Largest request of a pull, in bytes: what containerd takes.
pub const MAX_REQUEST: usize = 16 << 20;
/// Most connections at once; further ones wait.
const MAX_CLIENTS: usize = 64;
/// Most calls of one connection at once.
const MAX_CALLS: u32 = 1024;
/// The calls that bring credentials.
const PULLS: [&str; 2] =
    ["/runtime.v1.ImageService/PullImage", "/runtime.v1alpha2.ImageService/PullImage"];
/// Where errors of calls are told.
const STATUS: &str = "grpc-status";
const MESSAGE: &str = "grpc-message";

/// The parts of CRI that are read (`k8s.io/cri-api`, `api.proto`).
mod wire {
    #[derive(Clone, PartialEq, prost::Message)]
    pub struct PullImageRequest {
        #[prost(message, optional, tag = "1")]
        pub image: Option<ImageSpec>,
        #[prost(message, optional, tag = "2")]
        pub auth: Option<AuthConfig>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct ImageSpec {
        #[prost(string, tag = "1")]
        pub image: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    #[prost(skip_debug)]
    pub struct AuthConfig {
        #[prost(string, tag = "1")]
        pub username: String,
        #[prost(string, tag = "2")]
        pub password: String,
        #[prost(string, tag = "3")]
        pub auth: String,
        #[prost(string, tag = "4")]
        pub server_address: String,
        #[prost(string, tag = "5")]
        pub identity_token: String,
        #[prost(string, tag = "6")]
        pub registry_token: String,
    }

    impl std::fmt::Debug for AuthConfig {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("AuthConfig(…)")
        }
    }
}

type Sent = Either<Incoming, Full<Bytes>>;
type Answered = UnsyncBoxBody<Bytes, hyper::Error>;

/// The way to containerd, and what is kept on it.
pub struct Proxy {
    containerd: PathBuf,
    keyring: Arc<Keyring>,
    connection: Mutex<Option<SendRequest<Sent>>>,
}

impl Proxy {
    /// One to the containerd at the socket `containerd`.
    pub fn new(containerd: PathBuf, keyring: Arc<Keyring>) -> Arc<Self> {
        Arc::new(Self { containerd, keyring, connection: Mutex::default() })
    }

    /// Serves connections, which come from root: the socket is open to nobody else.
    pub async fn serve(self: Arc<Self>, connections: impl Stream<Item = UnixStream>) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        let mut connections = std::pin::pin!(connections);
        while let Some(connection) = connections.next().await {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let proxy = self.clone();
            shipway_task::spawn("CRI connection", async move {
                let _place = place;
                let answer = service_fn(move |request| {
                    let proxy = proxy.clone();
                    async move { Ok::<_, Infallible>(proxy.answer(request).await) }
                });
                let ended = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .max_concurrent_streams(MAX_CALLS)
                    .serve_connection(TokioIo::new(connection), answer)
                    .await;
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection of CRI ended");
                }
            });
        }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Answered> {
        let answered = if PULLS.contains(&request.uri().path()) {
            self.pull(request).await
        } else {
            self.forward(request.map(Either::Left)).await.map(|r| r.map(|b| b.boxed_unsync()))
        };
        answered.unwrap_or_else(|fault| {
            tracing::warn!(%fault, "a call of CRI was not passed on");
            failed(&fault)
        })
    }

    /// Passes a pull on, and keeps what it brings.
    async fn pull(&self, request: Request<Incoming>) -> Result<Response<Answered>> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, MAX_REQUEST).collect().await.map_err(|e| {
            Fault::new(Code::ResourceExhausted, format!("the request of a pull: {e}"))
        })?;
        let bytes = body.to_bytes();
        let receipt = match given(&bytes) {
            Ok(Some((image, grant))) => {
                tracing::debug!(repository = image.locator(), "a pull brought credentials");
                Some(self.keyring.give(&image, grant))
            }
            Ok(None) => None,
            Err(fault) => {
                // It is containerd that decides about the call.
                tracing::warn!(%fault, "the credentials of a pull are not kept");
                None
            }
        };
        let request = Request::from_parts(head, Either::Right(Full::new(bytes)));
        let answered = match self.forward(request).await {
            Ok(answered) => answered,
            Err(fault) => {
                receipt.into_iter().for_each(|receipt| self.keyring.take_back(receipt));
                return Err(fault);
            }
        };
        let mut verdict = Verdict { keyring: self.keyring.clone(), receipt };
        verdict.see(answered.headers());
        Ok(answered.map(|body| {
            let seen = body.map_frame(move |frame| {
                frame.trailers_ref().into_iter().for_each(|trailers| verdict.see(trailers));
                frame
            });
            seen.boxed_unsync()
        }))
    }

    async fn forward(&self, mut request: Request<Sent>) -> Result<Response<Incoming>> {
        // What a client leaves out of its request's address is needed in ours.
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.scheme = Some(http::uri::Scheme::HTTP);
        uri.authority.get_or_insert(Authority::from_static("localhost"));
        *request.uri_mut() = Uri::from_parts(uri)
            .map_err(|e| Fault::invalid(format!("the address of a call of CRI: {e}")))?;
        let mut connection = self.connect().await?;
        connection.send_request(request).await.map_err(|e| self.away(e))
    }

    fn away(&self, error: impl std::error::Error + Send + Sync + 'static) -> Fault {
        Fault::unavailable(format!("containerd at {}: {error}", self.containerd.display()))
            .with_source(error)
            .hint("is containerd running, and its socket that of `cri.containerd`?")
    }

    /// A connection to containerd that is open.
    async fn connect(&self) -> Result<SendRequest<Sent>> {
        let known = self.connection.lock().clone();
        if let Some(mut known) = known
            && known.ready().await.is_ok()
        {
            return Ok(known);
        }
        let stream = UnixStream::connect(&self.containerd).await.map_err(|e| self.away(e))?;
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .map_err(|e| self.away(e))?;
        shipway_task::spawn("CRI of containerd", async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to containerd's CRI ended");
            }
        });
        *self.connection.lock() = Some(sender.clone());
        Ok(sender)
    }
}

/// What becomes of the credentials of a pull.
struct Verdict {
    keyring: Arc<Keyring>,
    receipt: Option<Receipt>,
}

impl Verdict {
    /// The headers or trailers of the answer, of which one says how the call ended.
    fn see(&mut self, headers: &HeaderMap) {
        let Some(status) = headers.get(STATUS) else { return };
        if let Some(receipt) = self.receipt.take()
            && status.as_bytes() != b"0"
        {
            self.keyring.take_back(receipt);
        }
    }
}

/// The answer to a call that failed here.
fn failed(fault: &Fault) -> Response<Answered> {
    let body = Empty::new().map_err(|never: Infallible| match never {});
    let mut response = Response::new(body.boxed_unsync());
    // Printable ASCII but for the percent sign goes as it is.
    let escaped = fault.to_string().bytes().fold(String::new(), |mut text, byte| {
        match byte {
            b' '..=b'~' if byte != b'%' => text.push(byte.into()),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
        text
    });
    let headers = response.headers_mut();
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(STATUS, HeaderValue::from(fault.code() as i32));
    if let Ok(message) = HeaderValue::try_from(escaped) {
        headers.insert(MESSAGE, message);
    }
    response
}

/// What the body of a `PullImage` brings, if it brings credentials.
fn given(body: &[u8]) -> Result<Option<(ImageName, Grant)>> {
    let broken = |why: &str| Fault::invalid(format!("the request of a pull {why}"));
    let (frame, message) = body.split_at_checked(5).ok_or_else(|| broken("is cut short"))?;
    if frame[0] != 0 {
        return Err(broken("is compressed"));
    }
    let mut request =
        wire::PullImageRequest::decode(message).map_err(|_| broken("is not one of CRI's"))?;
    let (Some(image), Some(auth)) = (&request.image, &mut request.auth) else { return Ok(None) };
    let name: Result<ImageName> = image
        .image
        .parse()
        .map_err(|e| Fault::invalid(format!("{:?} is not a valid image name: {e}", image.image)));
    let login = login(auth);
    let server = std::mem::take(&mut auth.server_address);
    for text in [&mut auth.password, &mut auth.auth, &mut auth.identity_token] {
        text.zeroize();
    }
    auth.registry_token.zeroize();
    let Some(login) = login? else { return Ok(None) };
    let hosts = match shipway_dockerconfig::host_of_key(&server) {
        "" => Hosts::Any,
        host => Hosts::One(host.to_owned()),
    };
    Ok(Some((name?, Grant { giver: Giver::Kubelet, hosts, login, until: None })))
}

/// Which of its fields containerd goes by, in its order.
fn login(auth: &mut wire::AuthConfig) -> Result<Option<Login>> {
    let take = |text: &mut String| std::mem::take(text);
    if !auth.username.is_empty() {
        let (username, secret) = (take(&mut auth.username), take(&mut auth.password).into());
        return Ok(Some(Login::Password { username, secret }));
    }
    if !auth.identity_token.is_empty() {
        let secret = take(&mut auth.identity_token).into();
        return Ok(Some(Login::Password { username: String::new(), secret }));
    }
    if !auth.auth.is_empty() {
        let (username, secret) = shipway_dockerconfig::decode_auth(&auth.auth)?;
        return Ok(Some(Login::Password { username, secret: secret.into() }));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Some(Login::Token(take(&mut auth.registry_token).into())));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use std::time::Duration;
    use tokio::net::UnixListener;

    fn framed(image: &str, auth: Option<wire::AuthConfig>) -> Vec<u8> {
        let image = Some(wire::ImageSpec { image: image.into() });
        let message = wire::PullImageRequest { image, auth }.encode_to_vec();
        let length = (message.len() as u32).to_be_bytes();
        [&[0], &length[..], &message].concat()
    }

    #[test]
    fn the_fields_of_a_pull_mean_what_they_mean_to_containerd() {
        let auth = wire::AuthConfig::default;
        let password = |username: &str, secret: &str| Login::Password {
            username: username.into(),
            secret: secret.to_owned().into(),
        };
        for (name, auth, expected) in [
            (
                "a name and a password",
                wire::AuthConfig {
                    username: "u".into(),
                    password: "p".into(),
                    identity_token: "x".into(),
                    ..auth()
                },
                Some((Hosts::Any, password("u", "p"))),
            ),
            (
                "an identity token",
                wire::AuthConfig { identity_token: "t".into(), ..auth() },
                Some((Hosts::Any, password("", "t"))),
            ),
            (
                "both in one, for a host alone",
                wire::AuthConfig {
                    auth: "dTpwOnE=".into(),
                    server_address: "https://r.example:5000/v2/".into(),
                    ..auth()
                },
                Some((Hosts::One("r.example:5000".into()), password("u", "p:q"))),
            ),
            (
                "a registry token",
                wire::AuthConfig { registry_token: "t".into(), ..auth() },
                Some((Hosts::Any, Login::Token("t".to_owned().into()))),
            ),
            ("nothing", auth(), None),
        ] {
            let found = given(&framed("r.example/a:1", Some(auth))).unwrap();
            let found = found.map(|(image, grant)| {
                assert_eq!((image.locator().as_str(), grant.until), ("r.example/a", None));
                (grant.hosts, grant.login)
            });
            assert_eq!(found, expected, "{name}");
        }
        assert!(given(&framed("r.example/a:1", None)).unwrap().is_none());
    }

    #[test]
    fn what_is_no_pull_is_an_error_that_shows_no_secret() {
        let auth = wire::AuthConfig {
            username: "u".into(),
            password: "s3cret".into(),
            ..Default::default()
        };
        let whole = framed("R/UPPER", Some(auth.clone()));
        let mut compressed = whole.clone();
        compressed[0] = 1;
        let broken = wire::AuthConfig { auth: "s3cret%".into(), ..Default::default() };
        for bytes in [
            &whole[..],
            &compressed,
            &whole[..3],
            &whole[..whole.len() - 2],
            &framed("a", Some(broken)),
        ] {
            let error = given(bytes).unwrap_err().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
        assert!(!format!("{auth:?}").contains("s3cret"), "{auth:?}");
    }

    /// A containerd that answers each call in a way of its own, by its path.
    async fn containerd(listener: UnixListener) {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            shipway_task::spawn("containerd", async move {
                let answer = service_fn(|request: Request<Incoming>| async move {
                    let (head, body) = request.into_parts();
                    let path = head.uri.path().to_owned();
                    let mut trailers = HeaderMap::new();
                    trailers.insert(
                        STATUS,
                        HeaderValue::from(
                            if path.ends_with("Fails") || head.headers.contains_key("fail") {
                                16
                            } else {
                                0
                            },
                        ),
                    );
                    trailers.insert("x-path", path.parse().unwrap());
                    // What comes goes back, as it comes.
                    let body = body.map_frame(|frame| frame.map_data(|data| data));
                    let tail = StreamBody::new(tokio_stream::iter([Ok::<_, hyper::Error>(
                        Frame::trailers(trailers),
                    )]));
                    let stream = http_body_util::BodyStream::new(body).chain(tail);
                    let mut response = Response::new(StreamBody::new(stream));
                    response.headers_mut().insert(
                        "x-name",
                        head.headers
                            .get("x-name")
                            .cloned()
                            .unwrap_or(HeaderValue::from_static("none")),
                    );
                    Ok::<_, Infallible>(response)
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
            });
        }
    }

    struct Between {
        client: SendRequest<UnsyncBoxBody<Bytes, Infallible>>,
        keyring: Arc<Keyring>,
        _dir: tempfile::TempDir,
    }

    async fn between(with_containerd: bool) -> Between {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock");
        if with_containerd {
            let listener = UnixListener::bind(&socket).unwrap();
            shipway_task::spawn("containerd", containerd(listener));
        }
        let keyring = Arc::<Keyring>::default();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connections = tokio_stream::iter([theirs]).chain(tokio_stream::pending());
        shipway_task::spawn("proxy", Proxy::new(socket, keyring.clone()).serve(connections));
        let (client, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours))
                .await
                .unwrap();
        shipway_task::spawn("client", connection);
        Between { client, keyring, _dir: dir }
    }

    impl Between {
        async fn call(
            &mut self,
            path: &str,
            headers: &[(&'static str, &'static str)],
            body: impl hyper::body::Body<Data = Bytes, Error = Infallible> + Send + 'static,
        ) -> Response<Incoming> {
            let mut request = Request::post(format!("http://localhost{path}"));
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            self.client.ready().await.unwrap();
            self.client.send_request(request.body(body.boxed_unsync()).unwrap()).await.unwrap()
        }

        async fn pull(
            &mut self,
            path: &str,
            headers: &[(&'static str, &'static str)],
            password: &str,
        ) {
            let auth = wire::AuthConfig {
                username: "u".into(),
                password: password.into(),
                ..Default::default()
            };
            let bytes = Bytes::from(framed("r.example/a:1", Some(auth)));
            let answered = self.call(path, headers, Full::new(bytes.clone())).await;
            let back = answered.into_body().collect().await.unwrap();
            assert!(back.trailers().is_some_and(|t| t["x-path"] == *path));
            assert_eq!(back.to_bytes(), bytes, "byte for byte");
        }

        fn kept(&self) -> Option<String> {
            let grant =
                self.keyring.find(&"r.example/a".parse().unwrap(), "r.example", |_| true)?;
            match &grant.login {
                Login::Password { secret, .. } => Some(secret.reveal().to_owned()),
                Login::Token(_) => None,
            }
        }
    }

    #[tokio::test]
    async fn pulls_of_both_versions_leave_their_credentials_unless_they_fail() {
        let mut between = between(true).await;
        between.pull(PULLS[0], &[], "first").await;
        assert_eq!(between.kept().as_deref(), Some("first"));
        between.pull(PULLS[1], &[], "second").await;
        assert_eq!(between.kept().as_deref(), Some("second"));
        between.pull(PULLS[0], &[("fail", "1")], "wrong").await;
        assert_eq!(between.kept().as_deref(), Some("second"), "what failed opens nothing");
        let bytes = Bytes::from(framed("r.example/a:1", None));
        between.call(PULLS[0], &[], Full::new(bytes)).await;
        assert_eq!(between.kept().as_deref(), Some("second"), "a pull without any takes none");
    }

    #[tokio::test]
    async fn streams_headers_and_errors_go_through_as_they_are() {
        let mut between = between(true).await;
        // Each piece comes back before the next one is sent.
        let (pieces, sent) = tokio::sync::mpsc::channel(1);
        let stream = tokio_stream::wrappers::ReceiverStream::new(sent);
        let body = StreamBody::new(stream.map(|b: Bytes| Ok::<_, Infallible>(Frame::data(b))));
        let answered =
            between.call("/runtime.v1.RuntimeService/Events", &[("x-name", "v")], body).await;
        assert_eq!(answered.headers()["x-name"], "v");
        let mut back = answered.into_body();
        for piece in ["one", "two", "three"] {
            pieces.send(Bytes::from(piece)).await.unwrap();
            let frame = back.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_data().unwrap(), piece);
        }
        drop(pieces);
        let trailers = back.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(
            (&trailers[STATUS], &trailers["x-path"]),
            (&HeaderValue::from(0), &HeaderValue::from_static("/runtime.v1.RuntimeService/Events"))
        );

        let answered = between
            .call("/runtime.v1.ImageService/Fails", &[], Full::new(Bytes::from_static(b"x")))
            .await;
        let trailers = answered.into_body().collect().await.unwrap();
        assert_eq!(trailers.trailers().unwrap()[STATUS], "16");
    }

    #[tokio::test]
    async fn a_client_that_goes_ends_its_call_at_containerd() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (gone, told) = tokio::sync::oneshot::channel::<()>();
        let gone = Arc::new(Mutex::new(Some(gone)));
        shipway_task::spawn("containerd", async move {
            let (stream, _) = listener.accept().await.unwrap();
            let answer = service_fn(move |request: Request<Incoming>| {
                let gone = gone.clone();
                async move {
                    let _request = request;
                    // Dropped with the call.
                    let _held = gone.lock().take();
                    std::future::pending::<Result<Response<Empty<Bytes>>, Infallible>>().await
                }
            });
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer)
                .await;
        });
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connections = tokio_stream::iter([theirs]).chain(tokio_stream::pending());
        shipway_task::spawn("proxy", Proxy::new(socket, Arc::default()).serve(connections));
        let (mut client, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(ours))
                .await
                .unwrap();
        shipway_task::spawn("client", connection);
        let request = Request::post("http://localhost/x").body(Empty::<Bytes>::new()).unwrap();
        let call = client.send_request(request);
        assert!(tokio::time::timeout(Duration::from_millis(300), call).await.is_err());
        // The sender is dropped when the call is, and not before.
        let ended = tokio::time::timeout(Duration::from_secs(20), told).await;
        assert!(matches!(ended, Ok(Err(_))), "{ended:?}");
    }

    #[tokio::test]
    async fn without_containerd_a_call_is_an_error_of_grpc() {
        let mut between = between(false).await;
        for path in ["/runtime.v1.ImageService/ListImages", PULLS[0]] {
            let auth = wire::AuthConfig { username: "u".into(), ..Default::default() };
            let bytes = Bytes::from(framed("r.example/a:1", Some(auth)));
            let answered = between.call(path, &[], Full::new(bytes)).await;
            assert_eq!(answered.headers()[STATUS], HeaderValue::from(Code::Unavailable as i32));
            let message = answered.headers()[MESSAGE].to_str().unwrap();
            assert!(message.contains("containerd.sock"), "{message}");
        }
        assert_eq!(between.kept(), None);
    }

    #[tokio::test]
    async fn the_request_of_a_pull_is_bounded() {
        let mut between = between(true).await;
        let bytes = Bytes::from(vec![0; MAX_REQUEST + 1]);
        let answered = between.call(PULLS[0], &[], Full::new(bytes)).await;
        assert_eq!(answered.headers()[STATUS], HeaderValue::from(Code::ResourceExhausted as i32));
    }
}
