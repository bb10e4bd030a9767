//! Connections to servers: out by the step's way out, TLS with the machine's trust store.

use crate::{EgressRules, target::RequestTarget};
use http::Uri;
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use shipway_executor::Egress;
use std::{
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tower_service::Service;

/// How long a connection may take altogether.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long one of several addresses may take.
const ONE_ADDRESS: Duration = Duration::from_secs(10);
/// Most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 16;

/// Connects to the host of an address.
#[derive(Clone)]
pub(crate) struct Connector {
    egress: Arc<dyn Egress>,
    rules: Arc<EgressRules>,
    tls: TlsConnector,
}

/// That a server may not be reached.
#[derive(Debug)]
pub(crate) struct Denied(String);

impl std::fmt::Display for Denied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Denied {}

impl Connector {
    pub fn new(egress: Arc<dyn Egress>, rules: Arc<EgressRules>, tls: Arc<ClientConfig>) -> Self {
        Self { egress, rules, tls: TlsConnector::from(tls) }
    }

    async fn dial(self, uri: Uri) -> io::Result<UpstreamStream> {
        let target = RequestTarget::parse(&uri.to_string())
            .ok_or_else(|| io::Error::other(format!("{uri} is not the address of a server")))?;
        let looked_up = tokio::net::lookup_host((target.host.as_str(), target.port)).await;
        let addresses = looked_up
            .map_err(|e| io::Error::other(format!("dial tcp: lookup {}: {e}", target.host)))?;
        let mut last = io::Error::other(format!("dial tcp: lookup {}: no address", target.host));
        for address in addresses.take(MAX_ADDRESSES) {
            if let Err(fault) = self.rules.check_address(&target.host, address.ip()) {
                last = io::Error::other(Denied(fault.to_string()));
                continue;
            }
            let connected = timeout(ONE_ADDRESS, self.egress.connect(address)).await;
            match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(tcp) => return self.greet(&target, tcp).await,
                Err(e) => last = io::Error::other(format!("dial tcp {address}: {e}")),
            }
        }
        Err(last)
    }

    async fn greet(self, target: &RequestTarget, tcp: TcpStream) -> io::Result<UpstreamStream> {
        let _ = tcp.set_nodelay(true);
        if !target.https {
            return Ok(UpstreamStream::Plain(tcp));
        }
        let name = ServerName::try_from(target.host.clone())
            .map_err(|_| io::Error::other(format!("{:?} is not a valid host name", target.host)))?;
        let tls = self
            .tls
            .connect(name, tcp)
            .await
            .map_err(|e| io::Error::other(format!("TLS with {}: {e}", target.authority())))?;
        Ok(UpstreamStream::Tls(Box::new(tls)))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<UpstreamStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let dial = self.clone().dial(uri);
        Box::pin(async move {
            let dialed = timeout(PATIENCE, dial).await;
            dialed
                .unwrap_or_else(|_| {
                    Err(io::Error::other(format!("no connection within {PATIENCE:.0?}")))
                })
                .map(TokioIo::new)
        })
    }
}

/// A connection to a server.
pub(crate) enum UpstreamStream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection for UpstreamStream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}
