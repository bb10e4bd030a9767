//! gRPC over a byte stream that exists already, with either end as the client (row `ctl.session`).

use parking_lot::Mutex;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use shipway_fault::{Code, Fault, Result};
use shipway_telemetry::meter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{
    service::Routes,
    transport::{Channel, Endpoint, Server},
};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const MAX_FRAME: u32 = 1 << 20;
/// Errors carry whole Dockerfiles in their trailers, and calls to a client's session whole lists of
/// patterns in their headers: this is what clients, and the sessions in them, take from the daemon.
const MAX_HEADERS: u32 = shipway_proto::MAX_MESSAGE as u32;
/// What servers take of a request's headers. The longest that clients send announce the methods of
/// a session, which is some kilobytes.
const MAX_REQUEST_HEADERS: u32 = 256 << 10;
/// Calls of one connection at the same time. A client that wants more waits; a bake of many targets
/// takes some calls for each.
const MAX_STREAMS: u32 = 1000;
/// A connection is pinged when it was quiet for so long, and closed when none
/// comes: clients vanish behind routers without a word. A client that was stopped for a moment
/// stays.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(60));

/// A server with the windows and limits that all our servers have. Message sizes are set per
/// service: `max_decoding_message_size(shipway_proto::MAX_MESSAGE)` and its twin.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .http2_max_header_list_size(MAX_REQUEST_HEADERS)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .tcp_nodelay(true)
}

/// An endpoint with the windows and limits that all our clients have.
pub fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .http2_max_header_list_size(MAX_HEADERS)
        .tcp_nodelay(true)
}

/// A gRPC client whose only connection is a given byte stream. Clones share it.
#[derive(Clone, Debug)]
pub struct TunnelChannel {
    channel: Channel,
    stop: CancellationToken,
    closed: CancellationToken,
}

impl TunnelChannel {
    /// Starts HTTP/2, as its client, on `io`.
    pub async fn connect(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Self> {
        let (stop, closed) = (CancellationToken::new(), CancellationToken::new());
        let io = Watched {
            io,
            stopped: Box::pin(stop.clone().cancelled_owned()),
            closed: closed.clone(),
        };
        let once = Arc::new(Mutex::new(Some(TokioIo::new(io))));
        let connector = tower::service_fn(move |_: http::Uri| {
            let io = once.lock().take();
            async move {
                io.ok_or_else(|| {
                    io::Error::new(io::ErrorKind::NotConnected, "the client has gone away")
                })
            }
        });
        let channel = tuned(Endpoint::from_static("http://localhost"))
            .connect_with_connector(connector)
            .await
            .map_err(|e| {
                Fault::unavailable(format!("start HTTP/2 in the tunnel: {e}")).with_source(e)
            })?;
        Ok(Self { channel, stop, closed })
    }

    /// The channel to make tonic clients of.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Resolves when the byte stream has ended, on whichever side.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.closed.clone().cancelled_owned()
    }

    /// Whether the byte stream has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Ends the byte stream; calls in flight fail.
    pub fn close(&self) {
        self.stop.cancel();
        self.closed.cancel();
    }
}

/// Who is at the other end of a tunnel that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TunnelPeer {
    /// The daemon, whom a client's session believes.
    Daemon,
    /// An unknown program, such as a frontend.
    Stranger,
}

/// Serves `routes` over `io`, as HTTP/2's server, until the stream ends.
pub async fn serve_tunnel(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    routes: Routes,
    peer: TunnelPeer,
) -> Result<()> {
    let headers = match peer {
        TunnelPeer::Daemon => MAX_HEADERS,
        TunnelPeer::Stranger => MAX_REQUEST_HEADERS,
    };
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(headers)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(routes.prepare()))
        .await
        .map_err(|e| Fault::new(Code::Unavailable, format!("serve the tunnel: {e}")).with_source(e))
}

/// A byte stream that reports its end and can be closed.
struct Watched<T> {
    io: T,
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
    closed: CancellationToken,
}

impl<T> Watched<T> {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.stopped.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the tunnel was closed"))
            }
            Poll::Pending => Ok(()),
        }
    }

    fn note<R>(&self, result: io::Result<R>) -> io::Result<R> {
        result.inspect_err(|_| self.closed.cancel())
    }
}

impl<T> Drop for Watched<T> {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Watched<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        meter::SESSION_RECEIVED.add((buf.filled().len() - before) as u64);
        if result.is_ok() && buf.filled().len() == before && buf.remaining() > 0 {
            self.closed.cancel();
        }
        Poll::Ready(self.note(result))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        meter::SESSION_SENT.add(*result.as_ref().unwrap_or(&0) as u64);
        Poll::Ready(self.note(result))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
        meter::SESSION_SENT.add(*result.as_ref().unwrap_or(&0) as u64);
        Poll::Ready(self.note(result))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.io).poll_flush(cx));
        Poll::Ready(self.note(result))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use shipway_proto::grpc::health::v1::{
        HealthCheckRequest, HealthCheckResponse,
        health_client::HealthClient,
        health_server::{Health, HealthServer},
    };
    use tonic::{Request, Response, Status};

    use super::*;

    struct Fine;

    /// Calls that hang.
    static HANGING: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

    #[tonic::async_trait]
    impl Health for Fine {
        type WatchStream = tokio_stream::Empty<Result<HealthCheckResponse, Status>>;

        async fn check(
            &self,
            request: Request<HealthCheckRequest>,
        ) -> Result<Response<HealthCheckResponse>, Status> {
            match &*request.into_inner().service {
                // A status whose details exceed the usual header limits must arrive whole.
                "big" => Err(crate::status_of(
                    &Fault::unknown("x")
                        .detail(shipway_fault::Detail::Vertex("v".repeat(300 << 10))),
                )),
                "hang" => {
                    HANGING.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    std::future::pending().await
                }
                _ => Ok(Response::new(HealthCheckResponse { status: 1 })),
            }
        }

        async fn watch(
            &self,
            _: Request<HealthCheckRequest>,
        ) -> Result<Response<Self::WatchStream>, Status> {
            Ok(Response::new(tokio_stream::empty()))
        }
    }

    async fn pair_with(peer: TunnelPeer) -> (TunnelChannel, tokio::task::JoinHandle<Result<()>>) {
        let (a, b) = tokio::io::duplex(64 << 10);
        let server = shipway_task::spawn(
            "test",
            serve_tunnel(b, Routes::new(HealthServer::new(Fine)), peer),
        );
        (TunnelChannel::connect(a).await.expect("connect"), server)
    }

    async fn pair() -> (TunnelChannel, tokio::task::JoinHandle<Result<()>>) {
        pair_with(TunnelPeer::Daemon).await
    }

    /// Asks with headers of `size` bytes.
    async fn ask(channel: Channel, size: usize) -> Result<(), Status> {
        let mut request = Request::new(HealthCheckRequest::default());
        for n in 0..size / 1024 {
            let name =
                format!("x-filler-{n}").parse::<tonic::metadata::MetadataKey<_>>().expect("a key");
            request.metadata_mut().insert(name, "v".repeat(1000).parse().expect("a value"));
        }
        HealthClient::new(channel).check(request).await.map(drop)
    }

    #[tokio::test]
    async fn headers_of_requests_are_limited_but_not_those_to_a_session() {
        let (tunnel, _server) = pair_with(TunnelPeer::Stranger).await;
        assert!(ask(tunnel.channel(), 32 << 10).await.is_ok());
        assert!(ask(tunnel.channel(), 1 << 20).await.is_err());
        let (tunnel, _server) = pair().await;
        assert!(ask(tunnel.channel(), 1 << 20).await.is_ok());
    }

    #[tokio::test]
    async fn a_server_limits_headers_and_still_sends_big_errors() {
        let dir = tempfile::tempdir().expect("dir");
        let address = crate::Address::Unix(dir.path().join("s"));
        let listener = crate::Listener::bind(&address, &crate::ListenOptions::default())
            .await
            .expect("bind")
            .remove(0);
        let serving =
            server().add_service(HealthServer::new(Fine)).serve_with_incoming(listener.incoming());
        let serving = shipway_task::spawn("test", serving);
        let channel = crate::dial(&address, None).await.expect("dial");
        assert!(ask(channel.clone(), 64 << 10).await.is_ok());
        assert!(ask(channel.clone(), 1 << 20).await.is_err());
        let status = HealthClient::new(channel.clone())
            .check(HealthCheckRequest { service: "big".into() })
            .await
            .expect_err("fails");
        assert_eq!(crate::fault_of(&status).details().len(), 1);
        // Calls beyond the limit wait for others to end.
        let calls: Vec<_> = (0..MAX_STREAMS)
            .map(|_| {
                let mut client = HealthClient::new(channel.clone());
                shipway_task::spawn("test", async move {
                    client.check(HealthCheckRequest { service: "hang".into() }).await
                })
            })
            .collect();
        while HANGING.load(std::sync::atomic::Ordering::SeqCst) < MAX_STREAMS {
            tokio::task::yield_now().await;
        }
        let mut one_more = Box::pin(ask(channel, 0));
        assert!(futures::poll!(one_more.as_mut()).is_pending());
        calls[0].abort();
        assert!(one_more.await.is_ok());
        serving.abort();
    }

    #[tokio::test]
    async fn calls_cross_a_tunnel_and_big_errors_too() {
        let (tunnel, _server) = pair().await;
        let mut client = HealthClient::new(tunnel.channel());
        assert_eq!(
            client.check(HealthCheckRequest::default()).await.expect("ok").into_inner().status,
            1
        );
        let status =
            client.check(HealthCheckRequest { service: "big".into() }).await.expect_err("fails");
        let fault = crate::fault_of(&status);
        assert_eq!(
            fault.details(),
            [shipway_fault::Detail::Vertex("v".repeat(300 << 10))],
            "{fault:?}"
        );
    }

    #[tokio::test]
    async fn either_end_can_close_and_the_other_notices() {
        let (tunnel, server) = pair().await;
        let mut client = HealthClient::new(tunnel.channel());
        let hanging = shipway_task::spawn("test", async move {
            client.check(HealthCheckRequest { service: "hang".into() }).await
        });
        HealthClient::new(tunnel.channel()).check(HealthCheckRequest::default()).await.expect("ok");
        tunnel.close();
        assert!(hanging.await.expect("no panic").is_err());
        let _ = server.await.expect("server ends");

        let (tunnel, server) = pair().await;
        server.abort();
        tunnel.closed().await;
        let status = HealthClient::new(tunnel.channel())
            .check(HealthCheckRequest::default())
            .await
            .expect_err("closed");
        assert_eq!(status.code(), tonic::Code::Unavailable);
    }
}
