//! The proxy between a client and servers on loopback.

use crate::{
    Authority, Capture, EgressRules, Incomplete, MAX_CONNECTIONS, MAX_HEAD, MAX_URL, Material,
    Policy, Proxy,
};
use async_trait::async_trait;
use rcgen::{CertificateParams, KeyPair};
use shipway_executor::{Egress, StepProxy as _};
use shipway_fault::{Fault, Result};
use shipway_oci::Digest;
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{
            CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, pem::PemObject as _,
        },
    },
};

struct Direct;

#[async_trait]
impl Egress for Direct {
    async fn connect(&self, to: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(to).await
    }
}

/// Denies what says so, and sends `/old` to `/new`.
struct Rules;

#[async_trait]
impl Policy for Rules {
    async fn check(&self, url: &str) -> Result<String> {
        if url.contains("denied") {
            return Err(Fault::invalid("no"));
        }
        Ok(url.replace("/old", "/new"))
    }
}

/// A proxy at work, and what it captured.
struct Lab {
    address: SocketAddr,
    capture: Capture,
    authority: Arc<Authority>,
    task: JoinHandle<()>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Lab {
    async fn with_roots(roots: RootCertStore) -> Self {
        Self::within(roots, EgressRules::default()).await
    }

    async fn within(roots: RootCertStore, rules: EgressRules) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let authority = Arc::new(Authority::with_roots(roots).unwrap());
        let capture = Capture::default();
        let proxy = Proxy::new(authority.clone(), Some(Arc::new(Rules)), capture.clone())
            .within(Arc::new(rules));
        let task =
            shipway_task::spawn(
                "test",
                async move { proxy.serve(listener, Arc::new(Direct)).await },
            );
        Self { address, capture, authority, task }
    }

    async fn new() -> Self {
        Self::with_roots(RootCertStore::empty()).await
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// The whole answer to `head`, on a connection of its own.
    async fn ask(&self, head: &str) -> String {
        exchange(self.connect().await, head).await
    }

    async fn get(&self, url: &str) -> String {
        self.ask(&format!("GET {url} HTTP/1.1\r\nHost: elsewhere\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n")).await
    }
}

async fn exchange(mut stream: impl AsyncRead + AsyncWrite + Unpin, head: &str) -> String {
    // A proxy that refuses closes before it has read all.
    let _ = stream.write_all(head.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

/// Answers each connection's first request with the body that its path names; says in a header what
/// `Host` and encoding it was asked for.
async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(b) => head.push(b),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let host = head
        .lines()
        .find_map(|l| l.to_ascii_lowercase().strip_prefix("host: ").map(str::to_owned))
        .unwrap();
    let packed = head.to_ascii_lowercase().contains("accept-encoding");
    let (status, more, body) = match path.as_str() {
        "/missing" => ("404 Not Found", String::new(), "nothing"),
        "/moved" => ("302 Found", "Location: /file\r\n".to_owned(), ""),
        "/cut" => ("200 OK", String::new(), "half"),
        _ => ("200 OK", String::new(), "the file"),
    };
    let length = if path == "/cut" { 100 } else { body.len() };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nX-Seen: {path} {host} {packed}\r\nKeep-Alive: 5\r\n{more}Connection: close\r\n\r\n{body}"
    );
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// A server; its address.
async fn server(tls: Option<TlsAcceptor>) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    shipway_task::spawn("test", async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            shipway_task::spawn("test", async move {
                match tls {
                    None => answer(stream).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            answer(stream).await;
                        }
                    }
                }
            });
        }
    });
    address
}

fn incomplete(method: &str, url: String, reason: &str) -> Incomplete {
    Incomplete { method: method.into(), url, reason: reason.into() }
}

#[tokio::test]
async fn what_is_fetched_is_noted_with_its_digest() {
    let (lab, server) = (Lab::new().await, server(None).await);
    let url = |path: &str| format!("http://{server}{path}");
    let answer = lab.get(&url("/file")).await;
    assert!(
        answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n\r\nthe file"),
        "{answer}"
    );
    // What the client called the host does not count, and nothing comes packed.
    assert!(
        answer.to_ascii_lowercase().contains(&format!("x-seen: /file {server} false")),
        "{answer}"
    );
    assert!(!answer.to_ascii_lowercase().contains("keep-alive"), "{answer}");
    lab.get(&url("/moved")).await;
    lab.get(&url("/missing")).await;
    lab.get(&url("/cut")).await;
    lab.ask(&format!(
        "POST {} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi",
        url("/file")
    ))
    .await;
    lab.ask(&format!(
        "GET {} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\nConnection: close\r\n\r\n",
        url("/part")
    ))
    .await;
    let seen: Vec<_> = lab
        .capture
        .requests()
        .into_iter()
        .map(|r| (r.method, r.url.replace(&url(""), ""), r.status))
        .collect();
    let expected = [
        ("GET", "/file", 200),
        ("GET", "/moved", 302),
        ("GET", "/missing", 404),
        ("GET", "/cut", 200),
        ("POST", "/file", 200),
    ];
    assert_eq!(seen[..5], expected.map(|(m, p, s)| (m.to_owned(), p.to_owned(), s)));
    let digest = Digest::of("the file");
    assert_eq!(
        lab.capture.materials(),
        [Material { url: url("/file"), digest }, Material { url: url("/moved"), digest }]
    );
    assert_eq!(
        lab.capture.incomplete_requests(),
        [
            incomplete("GET", url("/missing"), "unsuccessful_response"),
            incomplete("GET", url("/cut"), "body_read_failed"),
            incomplete("POST", url("/file"), "method_not_materializable"),
            incomplete("GET", url("/part"), "partial_response"),
        ]
    );
}

#[tokio::test]
async fn the_policy_decides_before_anything_is_sent() {
    let (lab, server) = (Lab::new().await, server(None).await);
    assert!(
        lab.get(&format!("http://{server}/denied")).await.starts_with("HTTP/1.1 403 Forbidden")
    );
    let answer = lab.get(&format!("http://{server}/old")).await;
    assert!(answer.contains(&format!("x-seen: /new {server}")), "{answer}");
    let posted = format!(
        "POST http://{server}/old HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    assert!(lab.ask(&posted).await.starts_with("HTTP/1.1 403"));
    let noted: Vec<_> = lab.capture.requests().into_iter().map(|r| (r.url, r.status)).collect();
    assert_eq!(
        noted[..2],
        [(format!("http://{server}/denied"), 403), (format!("http://{server}/new"), 200)]
    );
    assert_eq!(lab.capture.materials().len(), 1);
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_a_bad_gateway() {
    let lab = Lab::new().await;
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    let answer = lab.get(&format!("http://{closed}/file")).await;
    assert!(
        answer.starts_with("HTTP/1.1 502 Bad Gateway") && answer.contains("refused"),
        "{answer}"
    );
    assert_eq!(lab.capture.requests()[0].status, 502);
    assert_eq!(
        lab.capture.incomplete_requests(),
        [incomplete("GET", format!("http://{closed}/file"), "upstream_error")]
    );
}

fn client(pem: &[u8]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pem).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap();
    TlsConnector::from(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

/// A tunnel to `host`, in which the certificate of the lab's authority is believed.
async fn tunnel(lab: &Lab, host: &'static str, port: u16) -> TlsStream<TcpStream> {
    let mut stream = lab.connect().await;
    stream
        .write_all(format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 200"));
    client(lab.authority.pem()).connect(ServerName::try_from(host).unwrap(), stream).await.unwrap()
}

#[tokio::test]
async fn tls_is_opened_with_a_certificate_that_the_step_trusts() {
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = builder
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let port = server(Some(TlsAcceptor::from(Arc::new(config)))).await.port();
    let lab = Lab::with_roots(roots).await;

    let answer = exchange(
        tunnel(&lab, "localhost", port).await,
        "GET /file HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(
        answer.contains("200 OK") && answer.contains(&format!("x-seen: /file localhost:{port}")),
        "{answer}"
    );
    let answer = exchange(
        tunnel(&lab, "localhost", port).await,
        "GET /denied HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 403 Forbidden"), "{answer}");
    // A name that the server's certificate does not have: it is the proxy that checks.
    let answer = exchange(
        tunnel(&lab, "127.0.0.1", port).await,
        "GET /file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answer.starts_with("HTTP/1.1 502 Bad Gateway"), "{answer}");
    let url = format!("https://localhost:{port}/file");
    assert_eq!(lab.capture.materials(), [Material { url, digest: Digest::of("the file") }]);
}

#[tokio::test]
async fn heads_addresses_and_tunnels_are_bounded() {
    let lab = Lab::new().await;
    let long = format!("http://localhost/{}", "x".repeat(MAX_URL));
    assert!(lab.get(&long).await.starts_with("HTTP/1.1 414"));
    let header = format!("X: {}\r\n", "x".repeat(4 * MAX_HEAD));
    let answer = lab.ask(&format!("GET http://localhost/ HTTP/1.1\r\n{header}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    let many = "X: y\r\n".repeat(500);
    assert!(
        lab.ask(&format!("GET http://localhost/ HTTP/1.1\r\n{many}\r\n"))
            .await
            .starts_with("HTTP/1.1 431")
    );
    assert!(
        lab.ask("GET ftp://h/ HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 400")
    );
    assert!(lab.capture.requests().is_empty());
}

#[tokio::test]
async fn only_so_many_connections_are_served_at_once() {
    let (lab, server) = (Lab::new().await, server(None).await);
    let mut held = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        held.push(lab.connect().await);
    }
    let head = format!("GET http://{server}/file HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let mut waiting = lab.connect().await;
    waiting.write_all(head.as_bytes()).await.unwrap();
    // The first of those that hold all places is served, and only its end lets the waiting one in.
    let mut first = held.remove(0);
    first.write_all(head.as_bytes()).await.unwrap();
    let mut answer = String::new();
    first.read_to_string(&mut answer).await.unwrap();
    assert_eq!(lab.capture.requests().len(), 1);
    drop(first);
    answer.clear();
    waiting.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn the_operators_rules_go_before_the_builds_policy_and_see_addresses() {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let at = port.local_addr().unwrap().port();
    let lab = |allow: &[&str], deny: &[&str]| {
        let texts = |all: &[&str]| all.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        Lab::within(RootCertStore::empty(), EgressRules::new(&texts(allow), &texts(deny)).unwrap())
    };
    for (allow, deny) in [
        (&["elsewhere.example"][..], &[][..]),
        (&[], &["localhost"]),
        // The name is fine, and none of its addresses is.
        (&["localhost"], &["127.0.0.0/8", "::1"]),
        (&["10.0.0.0/8"], &[]),
    ] {
        let lab = lab(allow, deny).await;
        let url = format!("http://localhost:{at}/");
        let answer = lab.get(&url).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{allow:?} {deny:?}: {answer}");
        let noted = lab.capture.requests();
        assert_eq!((noted[0].url.as_str(), noted[0].status), (url.as_str(), 403));
        assert!(lab.capture.incomplete_requests().is_empty());
    }
    let lab = lab(&["127.0.0.0/8", "::1"], &[]).await;
    let url = format!("http://localhost:{at}/");
    let ask = lab.get(&url);
    let serve = async {
        let (mut stream, _) = port.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    let (answer, ()) = tokio::join!(ask, serve);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
