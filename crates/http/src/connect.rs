//! TCP (all addresses of a name, raced), proxies from the environment, TLS.

use crate::{
    HttpError,
    denied::{DeniedNetworks, Resolver},
    error::innermost,
    host_of, is_loopback,
};
use http::Uri;
use hyper_util::{
    client::{
        legacy::connect::{Connected, Connection, HttpConnector},
        proxy::matcher::{Intercept, Matcher},
    },
    rt::TokioIo,
};
use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, Error as TlsError, pki_types::ServerName},
};
use tower_service::Service;

/// Longest answer of a proxy to CONNECT.
const MAX_PROXY_HEAD: usize = 8 << 10;
/// How long a server on this machine may take for a TLS handshake.
const LOOPBACK_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone)]
pub(super) struct Connector {
    tcp: HttpConnector<Resolver>,
    denied: DeniedNetworks,
    tls: TlsConnector,
    proxy: Arc<Matcher>,
    patience: Duration,
}

impl Connector {
    pub(super) fn new(tls: ClientConfig, patience: Duration, denied: DeniedNetworks) -> Self {
        let mut tcp = HttpConnector::new_with_resolver(Resolver::new(denied.clone()));
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(patience));
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        Self {
            tcp,
            denied,
            tls: TlsConnector::from(Arc::new(tls)),
            proxy: Arc::new(Matcher::from_env()),
            patience,
        }
    }

    async fn dial(mut self, uri: Uri) -> Result<Stream, HttpError> {
        let host =
            uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
        let proxy = if is_loopback(&host) { None } else { self.proxy.intercept(&uri) };
        let target = match &proxy {
            None => uri.clone(),
            Some(p) if p.uri().scheme_str() == Some("http") => p.uri().clone(),
            Some(p) => {
                return Err(HttpError::Connect(format!(
                    "the proxy {} has an unsupported scheme: want http://",
                    host_of(p.uri())
                )));
            }
        };
        // Of names the resolver knows; an address is not looked up.
        if let Ok(address) = host.parse() {
            self.denied.check(&host, address).map_err(HttpError::Connect)?;
        }
        let mut tcp = self
            .tcp
            .call(target)
            .await
            .map_err(|e| HttpError::Connect(tcp_reason(&e, &uri, proxy.as_ref())))?
            .into_inner();
        if uri.scheme_str() != Some("https") {
            return Ok(Stream { kind: Kind::Plain(tcp), proxied: proxy.is_some() });
        }
        if let Some(proxy) = &proxy {
            tunnel(&mut tcp, &uri, proxy).await?;
        }
        let name = ServerName::try_from(host.clone())
            .map_err(|_| HttpError::Connect(format!("{host:?} is not a valid host name")))?;
        // A server that speaks plain HTTP may wait for ever for the end of what it takes for a
        // request.
        let wait = if is_loopback(&host) {
            LOOPBACK_PATIENCE.min(self.patience / 2)
        } else {
            self.patience / 2
        };
        let silent =
            |_| HttpError::NotTls(format!("no answer to a TLS greeting within {wait:.0?}"));
        let tls = timeout(wait, self.tls.connect(name, tcp))
            .await
            .map_err(silent)?
            .map_err(|e| tls_failure(&e))?;
        Ok(Stream { kind: Kind::Tls(Box::new(tls)), proxied: false })
    }
}

fn tcp_reason(
    error: &(dyn std::error::Error + 'static),
    uri: &Uri,
    proxy: Option<&Intercept>,
) -> String {
    let via = proxy.map(|p| format!(" through the proxy {}", host_of(p.uri()))).unwrap_or_default();
    // The outer text says the stage (dns error, tcp connect error), the innermost the reason.
    let (stage, reason) = (error.to_string(), innermost(error));
    if stage == "dns error" {
        // In words that users know from Go programs.
        let said = if reason.contains("not known") { "no such host".to_owned() } else { reason };
        return format!("dial tcp: lookup {}{via}: {said}", uri.host().unwrap_or_default());
    }
    let stage = if stage == reason || stage.ends_with(&reason) {
        stage
    } else {
        format!("{stage}: {reason}")
    };
    format!("dial {}{via}: {stage}", host_of(uri))
}

fn tls_failure(error: &io::Error) -> HttpError {
    match error.get_ref().and_then(|e| e.downcast_ref::<TlsError>()) {
        Some(TlsError::InvalidMessage(_)) => HttpError::NotTls(error.to_string()),
        Some(e) => HttpError::Tls(e.to_string()),
        None => HttpError::NotTls(error.to_string()),
    }
}

/// Asks the proxy for a way through to `uri`'s host.
async fn tunnel(tcp: &mut TcpStream, uri: &Uri, proxy: &Intercept) -> Result<(), HttpError> {
    let broken =
        |e: io::Error| HttpError::Connect(format!("the proxy {}: {e}", host_of(proxy.uri())));
    let target = format!("{}:{}", uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(443));
    let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n").into_bytes();
    if let Some(auth) = proxy.basic_auth() {
        request.extend_from_slice(b"Proxy-Authorization: ");
        request.extend_from_slice(auth.as_bytes());
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"\r\n");
    tcp.write_all(&request).await.map_err(broken)?;
    // Byte by byte, so that nothing of what follows the head is taken; it is short and comes once
    // per connection.
    let mut head = Vec::with_capacity(256);
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > MAX_PROXY_HEAD {
            return Err(broken(io::Error::other("its answer has no end")));
        }
        head.push(tcp.read_u8().await.map_err(broken)?);
    }
    let line = String::from_utf8_lossy(head.split(|b| *b == b'\r').next().unwrap_or_default())
        .into_owned();
    match line.split(' ').nth(1) {
        Some("200") => Ok(()),
        _ => Err(broken(io::Error::other(format!("it refused the way to {target}: {line}")))),
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = HttpError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, HttpError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), HttpError>> {
        ready!(self.tcp.poll_ready(cx)).map_err(|e| HttpError::Connect(e.to_string()))?;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = self.clone();
        let patience = self.patience;
        Box::pin(async move {
            let dialed = timeout(patience, this.dial(uri)).await;
            dialed
                .map_err(|_| HttpError::TimedOut { waiting_for: "a connection", after: patience })?
                .map(TokioIo::new)
        })
    }
}

/// A connection, plain or TLS.
pub(super) struct Stream {
    kind: Kind,
    /// Plain HTTP through a proxy, which wants whole addresses in requests.
    proxied: bool,
}

enum Kind {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new().proxy(self.proxied)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Kind::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.kind {
            Kind::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Kind::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Plain(s) => Pin::new(s).poll_flush(cx),
            Kind::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.kind {
            Kind::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Kind::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
