//! The trace of a build, from its record (row `so.h.trace`).

use futures::TryStreamExt as _;
use shipway_fault::{Fault, Result};
use shipway_grpc::fault_of;
use shipway_proto::{
    MAX_MESSAGE,
    containerd::services::content::v1::{ReadContentRequest, content_client::ContentClient},
    moby::buildkit::v1 as wire,
};

use crate::Client;

/// Longest trace that is read, in bytes.
const MAX_TRACE: usize = 256 << 20;

impl Client {
    /// The spans of the build `reference`: JSON documents of Go's `SpanStub`, one after another. A
    /// build that just ended is waited for until its trace is whole.
    pub async fn history_trace(&self, reference: &str) -> Result<Vec<u8>> {
        let failed = |status| fault_of(&status).context("failed to read the trace of the build");
        let finalize = wire::UpdateBuildHistoryRequest {
            r#ref: reference.to_owned(),
            finalize: true,
            ..Default::default()
        };
        self.control().update_build_history(finalize).await.map_err(failed)?;
        let request = wire::BuildHistoryRequest {
            early_exit: true,
            r#ref: reference.to_owned(),
            ..Default::default()
        };
        let events = self.control().listen_build_history(request).await.map_err(failed)?;
        let records: Vec<_> =
            events.into_inner().map_ok(|event| event.record).try_collect().await.map_err(failed)?;
        let record = records.into_iter().flatten().next().ok_or_else(|| {
            Fault::not_found(format!("no build {reference} in the history"))
                .hint("`shipway history ls` lists the builds there are")
        })?;
        if record.completed_at.is_none() {
            return Err(Fault::invalid(format!("build {reference} is still running")));
        }
        let trace = record.trace.ok_or_else(|| {
            Fault::not_found(format!("build {reference} has no trace"))
                .hint("the daemon keeps none with `[otel] history = false`")
        })?;
        let request = ReadContentRequest { digest: trace.digest, ..Default::default() };
        let mut content = ContentClient::new(self.calls()).max_decoding_message_size(MAX_MESSAGE);
        let mut pieces = content.read(request).await.map_err(failed)?.into_inner();
        let mut all = Vec::new();
        while let Some(piece) = pieces.message().await.map_err(failed)? {
            if all.len() + piece.data.len() > MAX_TRACE {
                return Err(Fault::invalid(format!("the trace is longer than {MAX_TRACE} bytes")));
            }
            all.extend_from_slice(&piece.data);
        }
        Ok(all)
    }
}
