//! gRPC over a byte stream that exists already, with either end as the client (row `ctl.session`).

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use shipway_fault::{Code, Fault, Result};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::{
    service::Routes,
    transport::{Channel, Endpoint, Server},
};

const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const MAX_FRAME: u32 = 1 << 20;
/// Errors carry whole Dockerfiles in their headers, and sessions announce their methods there.
const MAX_HEADERS: u32 = shipway_proto::MAX_MESSAGE as u32;
const MAX_STREAMS: u32 = 10_000;

/// A server with the windows and limits that all our servers have. Message sizes are set per service:
/// `max_decoding_message_size(shipway_proto::MAX_MESSAGE)` and its twin.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .http2_max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS)
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
        let io = Watched { io, stopped: Box::pin(stop.clone().cancelled_owned()), closed: closed.clone() };
        let once = Arc::new(Mutex::new(Some(TokioIo::new(io))));
        let connector = tower::service_fn(move |_: http::Uri| {
            let io = once.lock().unwrap_or_else(|e| e.into_inner()).take();
            async move { io.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the client has gone away")) }
        });
        let channel = tuned(Endpoint::from_static("http://localhost"))
            .connect_with_connector(connector)
            .await
            .map_err(|e| Fault::unavailable(format!("start HTTP/2 in the tunnel: {e}")).with_source(e))?;
        Ok(Self { channel, stop, closed })
    }

    /// The channel to make tonic clients of.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Resolves when the byte stream has ended, whoever ended it.
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

/// Serves `routes` over `io`, as HTTP/2's server, until the stream ends.
pub async fn serve_tunnel(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, routes: Routes) -> Result<()> {
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(io), TowerToHyperService::new(routes.prepare()))
        .await
        .map_err(|e| Fault::new(Code::Unavailable, format!("serve the tunnel: {e}")).with_source(e))
}

/// A byte stream that tells when it ends and can be told to end.
struct Watched<T> {
    io: T,
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
    closed: CancellationToken,
}

impl<T> Watched<T> {
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.stopped.as_mut().poll(cx) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the tunnel was closed")),
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
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut self.io).poll_read(cx, buf));
        if result.is_ok() && buf.filled().len() == before && buf.remaining() > 0 {
            self.closed.cancel();
        }
        Poll::Ready(self.note(result))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Watched<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        Poll::Ready(self.note(result))
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
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

    #[tonic::async_trait]
    impl Health for Fine {
        type WatchStream = tokio_stream::Empty<Result<HealthCheckResponse, Status>>;

        async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
            match &*request.into_inner().service {
                // A status whose details exceed the usual header limits must arrive whole.
                "big" => Err(crate::status_of(&Fault::unknown("x").detail(shipway_fault::Detail::Vertex("v".repeat(300 << 10))))),
                "hang" => std::future::pending().await,
                _ => Ok(Response::new(HealthCheckResponse { status: 1 })),
            }
        }

        async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
            Ok(Response::new(tokio_stream::empty()))
        }
    }

    async fn pair() -> (TunnelChannel, tokio::task::JoinHandle<Result<()>>) {
        let (a, b) = tokio::io::duplex(64 << 10);
        let server = tokio::spawn(serve_tunnel(b, Routes::new(HealthServer::new(Fine))));
        (TunnelChannel::connect(a).await.expect("connect"), server)
    }

    #[tokio::test]
    async fn calls_cross_a_tunnel_and_big_errors_too() {
        let (tunnel, _server) = pair().await;
        let mut client = HealthClient::new(tunnel.channel());
        assert_eq!(client.check(HealthCheckRequest::default()).await.expect("ok").into_inner().status, 1);
        let status = client.check(HealthCheckRequest { service: "big".into() }).await.expect_err("fails");
        let fault = crate::fault_of(&status);
        assert_eq!(fault.details(), [shipway_fault::Detail::Vertex("v".repeat(300 << 10))], "{fault:?}");
    }

    #[tokio::test]
    async fn either_end_can_close_and_the_other_notices() {
        let (tunnel, server) = pair().await;
        let mut client = HealthClient::new(tunnel.channel());
        let hanging = tokio::spawn(async move { client.check(HealthCheckRequest { service: "hang".into() }).await });
        HealthClient::new(tunnel.channel()).check(HealthCheckRequest::default()).await.expect("ok");
        tunnel.close();
        assert!(hanging.await.expect("no panic").is_err());
        let _ = server.await.expect("server ends");

        let (tunnel, server) = pair().await;
        server.abort();
        tunnel.closed().await;
        let status = HealthClient::new(tunnel.channel()).check(HealthCheckRequest::default()).await.expect_err("closed");
        assert_eq!(status.code(), tonic::Code::Unavailable);
    }
}
