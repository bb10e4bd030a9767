//! Traces of this daemon: whether spans are made, and those that others send (rows `trace.*`).

pub mod collector;

use crate::settings::{Logging, TraceSettings};
use shipway_fault::Result;
use shipway_grpc::{Address, ListenOptions, Listener};
use shipway_telemetry::{
    Outbox, OutboxReader, Traces, Tracing,
    otlp::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
};
use std::{path::Path, sync::Arc};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

/// Largest message of spans.
const MAX_MESSAGE: usize = 4 << 20;

/// What makes spans, and where they go.
#[derive(Default)]
pub struct Telemetry {
    /// The traces of running builds, for the history.
    pub traces: Option<Arc<Traces>>,
    /// The queue to the collector.
    pub outbox: Option<Outbox>,
    /// Its other end.
    pub reader: Option<OutboxReader>,
}

impl Telemetry {
    /// Starts the log, and what makes spans beside it, if they go anywhere.
    ///
    /// # Panics
    ///
    /// When it is called a second time.
    pub fn start(logging: Logging, settings: &TraceSettings) -> Self {
        if settings.export.is_none() && !settings.history {
            shipway_daemon::start_log(logging.level, logging.format);
            return Self::default();
        }
        let (outbox, reader) = settings.export.is_some().then(Outbox::new).unzip();
        let Tracing { layer, traces } = Tracing::new(outbox.clone());
        shipway_daemon::start_log_beside(logging.level, logging.format, layer.filtered());
        Self { traces: settings.history.then_some(traces), outbox, reader }
    }
}

/// Takes the spans of clients and steps (row `trace.export`).
#[derive(Clone)]
pub struct Receiver {
    /// The traces of running builds.
    pub traces: Option<Arc<Traces>>,
    /// The queue to the collector.
    pub outbox: Option<Outbox>,
}

impl Receiver {
    /// The service.
    pub fn service(self) -> TraceServiceServer<Self> {
        TraceServiceServer::new(self).max_decoding_message_size(MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> std::result::Result<Response<ExportTraceServiceResponse>, Status> {
        if self.traces.is_none() && self.outbox.is_none() {
            return Err(Status::unavailable("trace collector not configured"));
        }
        let request = request.into_inner();
        if let Some(traces) = &self.traces {
            traces.add_all(&request);
        }
        if let Some(outbox) = &self.outbox {
            request.resource_spans.into_iter().for_each(|spans| outbox.send(spans));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// Takes spans at a socket, and nothing else, until the handle is dropped (row `trace.sock`).
pub async fn listen(socket: &Path, spans: Receiver) -> Result<AbortOnDropHandle<()>> {
    // A step may run as anybody; what can be done there is to send spans, which are bounded.
    let options = ListenOptions { mode: 0o666, ..ListenOptions::default() };
    let listeners = Listener::bind(&Address::Unix(socket.to_owned()), &options).await?;
    let serving = async move {
        for listener in listeners {
            let served = shipway_grpc::server()
                .add_service(spans.clone().service())
                .serve_with_incoming(listener.incoming());
            if let Err(error) = served.await {
                tracing::warn!(%error, "spans of steps are no longer taken");
            }
        }
    };
    Ok(AbortOnDropHandle::new(shipway_task::spawn("take spans", serving)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_telemetry::otlp::{ResourceSpans, trace_service_client::TraceServiceClient};

    #[tokio::test]
    async fn a_socket_for_steps_takes_spans() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s.sock");
        let (outbox, mut reader) = Outbox::new();
        let serving =
            listen(&socket, Receiver { traces: None, outbox: Some(outbox) }).await.unwrap();
        let channel = shipway_grpc::dial(&Address::Unix(socket.clone()), None).await.unwrap();
        let request = ExportTraceServiceRequest { resource_spans: vec![ResourceSpans::default()] };
        TraceServiceClient::new(channel.clone()).export(request.clone()).await.unwrap();
        assert_eq!(reader.take_now(), request);
        // Nothing else is there.
        let mut control =
            shipway_proto::moby::buildkit::v1::control_client::ControlClient::new(channel);
        let refused = control.info(shipway_proto::moby::buildkit::v1::InfoRequest {}).await;
        assert_eq!(refused.unwrap_err().code(), tonic::Code::Unimplemented);
        drop(serving);
    }

    #[tokio::test]
    async fn spans_are_taken_where_they_go_somewhere() {
        let request = || {
            Request::new(ExportTraceServiceRequest {
                resource_spans: vec![ResourceSpans::default()],
            })
        };
        let nowhere = Receiver { traces: None, outbox: None };
        let refused = nowhere.export(request()).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        let (outbox, mut reader) = Outbox::new();
        Receiver { traces: None, outbox: Some(outbox) }.export(request()).await.unwrap();
        assert_eq!(reader.take_now(), request().into_inner());
        let traces = Some(Arc::new(Traces::default()));
        Receiver { traces, outbox: None }.export(request()).await.unwrap();
    }
}
