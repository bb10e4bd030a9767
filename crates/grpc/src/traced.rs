//! A span of a trace for each call, on both sides, with the W3C context in the call's headers (row
//! `net.trace`).
//!
//! A call that answers with a stream is over, to a span, when the stream begins.

use shipway_telemetry::{
    TARGET, TraceContext, current, fail,
    meter::{Latencies, REQUESTS},
    set, traced,
};
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};
use tonic::{Code, Status, body::Body, transport::Channel};
use tower::{Layer, Service};
use tracing::{Span, field::Empty, info_span};

type Answer<E> = Pin<Box<dyn Future<Output = Result<http::Response<Body>, E>> + Send>>;

/// Calls that are asked all the time and say nothing of any build.
const UNTRACED: [&str; 2] = ["/grpc.health.v1.Health/", "/opentelemetry.proto.collector."];

fn is_traced(path: &str) -> bool {
    !UNTRACED.iter().any(|prefix| path.starts_with(prefix))
}

/// Makes of a path, `/service/Method`, both its parts.
fn parts(path: &str) -> (&str, &str) {
    path.trim_start_matches('/').rsplit_once('/').unwrap_or(("", path))
}

/// Whether the method that was called is there.
fn is_ours(response: &http::Response<Body>) -> bool {
    Status::from_header_map(response.headers()).is_none_or(|s| s.code() != Code::Unimplemented)
}

/// Notes how a call went.
fn note<E: std::fmt::Display>(span: &Span, result: &Result<http::Response<Body>, E>) {
    if span.is_disabled() {
        return;
    }
    match result {
        Err(error) => fail(span, error),
        Ok(response) => {
            // Calls that fail have it here; others behind their body.
            let status = Status::from_header_map(response.headers());
            if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
                set(span, "rpc.grpc.status_code", status.code() as i64);
                fail(span, &status.message());
            }
        }
    }
}

/// A channel whose calls are spans of the trace they are made in.
#[derive(Clone, Debug)]
pub struct TracedChannel {
    channel: Channel,
    peer: &'static str,
    latencies: Option<&'static Latencies>,
}

impl TracedChannel {
    /// Calls over `channel`, to `peer` (such as `containerd`).
    pub fn new(channel: Channel, peer: &'static str) -> Self {
        Self { channel, peer, latencies: None }
    }

    /// Counts also how long calls take, whether or not they are traced.
    pub fn timed(self, latencies: &'static Latencies) -> Self {
        Self { latencies: Some(latencies), ..self }
    }
}

impl Service<http::Request<Body>> for TracedChannel {
    type Response = http::Response<Body>;
    type Error = tonic::transport::Error;
    type Future = Answer<Self::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let (service, method) = parts(&path);
        let span = if is_traced(&path) {
            info_span!(target: TARGET, "call", otel.name = format!("{service}/{method}"), otel.kind = "client",
                peer.service = self.peer, rpc.system = "grpc", rpc.service = service, rpc.method = method)
        } else {
            Span::none()
        };
        if let Some(context) = span.in_scope(current) {
            context.inject(request.headers_mut());
        }
        let (began, latencies) = (Instant::now(), self.latencies);
        // Called within the span: the channel's own worker takes what is current.
        let call = span.in_scope(|| self.channel.call(request));
        let noted = span.clone();
        Box::pin(traced(span, async move {
            let result = call.await;
            if let Some(latencies) = latencies {
                latencies.add(path.trim_start_matches('/'), began.elapsed());
            }
            note(&noted, &result);
            result
        }))
    }
}

/// Makes a span of each request that a server gets; it goes on with the trace of the client. How
/// long it took is counted ([`REQUESTS`]).
#[derive(Clone, Copy, Debug)]
pub struct TraceRequests;

impl<S> Layer<S> for TraceRequests {
    type Service = TracedService<S>;

    fn layer(&self, inner: S) -> TracedService<S> {
        TracedService(inner)
    }
}

/// A service whose requests are spans.
#[derive(Clone, Debug)]
pub struct TracedService<S>(S);

impl<S> Service<http::Request<Body>> for TracedService<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Future: Send + 'static,
    S::Error: std::fmt::Display + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path();
        if !is_traced(path) {
            return Box::pin(self.0.call(request));
        }
        let (service, method) = parts(path);
        let (traceparent, tracestate) = TraceContext::headers(request.headers());
        let span = info_span!(target: TARGET, "request", otel.name = format!("{service}/{method}"), otel.kind = "server",
            traceparent, tracestate, rpc.system = "grpc", rpc.service = service, rpc.method = method, shipway.build = Empty);
        let (began, name) = (Instant::now(), format!("{service}/{method}"));
        let call = span.in_scope(|| self.0.call(request));
        let noted = span.clone();
        Box::pin(traced(span, async move {
            let result = call.await;
            note(&noted, &result);
            // Clients choose paths; those that are not methods of ours are not counted.
            if result.as_ref().is_ok_and(is_ours) {
                REQUESTS.add(&name, began.elapsed());
            }
            result
        }))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{HealthService, TunnelChannel};
    use shipway_proto::grpc::health::v1::health_server::HealthServer;
    use shipway_telemetry::{Outbox, Tracing};
    use std::collections::BTreeMap;
    use tokio_util::task::AbortOnDropHandle;
    use tonic::client::Grpc;
    use tonic_prost::ProstCodec;
    use tracing::Instrument as _;
    use tracing_subscriber::layer::SubscriberExt as _;

    #[tokio::test]
    async fn both_ends_of_a_call_are_in_one_trace() {
        let (outbox, mut reader) = Outbox::new();
        let layer = Tracing::new(Some(outbox)).layer.filtered();
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let serving = crate::server()
            .layer(TraceRequests)
            .add_service(HealthServer::new(HealthService::default()))
            .serve_with_incoming(tokio_stream::once(Ok::<_, std::io::Error>(theirs)));
        let _serving = AbortOnDropHandle::new(shipway_task::spawn("serve", serving));
        let tunnel = TunnelChannel::connect(ours).await.unwrap();
        let mut calls = Grpc::new(TracedChannel::new(tunnel.channel(), "a test"));
        let both = async {
            for path in ["/a.B/C", "/grpc.health.v1.Health/Check"] {
                calls.ready().await.unwrap();
                let path = http::uri::PathAndQuery::from_static(path);
                let codec = ProstCodec::<(), ()>::default();
                let _ = calls.unary(tonic::Request::new(()), path, codec).await;
            }
        };
        both.instrument(info_span!(target: TARGET, "all", otel.kind = "server")).await;
        let all = reader.take_now().resource_spans.into_iter().flat_map(|r| r.scope_spans);
        let all = all.flat_map(|s| s.spans).filter(|s| s.name != "all");
        let all: BTreeMap<i32, _> = all.map(|s| (s.kind, s)).collect();
        let (server, client) = (&all[&2], &all[&3]);
        assert_eq!((&*server.name, &*client.name), ("a.B/C", "a.B/C"));
        assert_eq!((&server.trace_id, &server.parent_span_id), (&client.trace_id, &client.span_id));
        // No such method: both say that it failed.
        assert!(all.values().all(|s| s.status.as_ref().unwrap().code == 2));
    }
}
