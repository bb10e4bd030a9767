//! Build history on the wire (rows `ctl.hist.*`).

use crate::filter;
use prost::Message as _;
use shipway_attest::slsa;
use shipway_engine::{History, HistoryEventKind, HistoryRecord, LogFile};
use shipway_fault::{Fault, Result};
use shipway_grpc::status_of;
use shipway_oci::{Descriptor, media};
use shipway_proto::{google::rpc, moby::buildkit::v1 as wire};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Media type of a build's log (row `so.h.status`).
const LOG: &str = "application/vnd.buildkit.status.v0";
/// Media type of a build's error, spelt as clients know it (row `so.h.err`).
const FAILURE: &str = "application/vnd.googeapis.google.rpc.status+proto";

fn descriptor(d: &Descriptor) -> wire::Descriptor {
    wire::Descriptor {
        media_type: d.media_type.clone(),
        digest: d.digest.to_string(),
        size: d.size as i64,
        annotations: d.annotations.clone(),
    }
}

/// What a build wrote; the first result stands in a field of its own as well, for clients from before there were several.
fn result(written: &BTreeMap<usize, Descriptor>) -> wire::BuildResultInfo {
    wire::BuildResultInfo {
        result_deprecated: written.values().next().map(descriptor),
        results: written.iter().map(|(i, d)| (*i as i64, descriptor(d))).collect(),
        attestations: Vec::new(),
    }
}

fn of_file(file: &LogFile, media_type: &str) -> wire::Descriptor {
    wire::Descriptor { media_type: media_type.into(), digest: file.digest.to_string(), size: file.size as i64, ..Default::default() }
}

fn provenance(file: &LogFile) -> wire::Descriptor {
    let annotations = [("in-toto.io/predicate-type".to_owned(), slsa::V1.to_owned())].into();
    wire::Descriptor { annotations, ..of_file(file, media::IN_TOTO) }
}

/// The results of a finished build: of the build itself, and by platform.
fn results(r: &HistoryRecord) -> (Option<wire::BuildResultInfo>, BTreeMap<String, wire::BuildResultInfo>) {
    if r.completed.is_none() {
        return Default::default();
    }
    let (mut own, mut platforms) = (result(&r.written), BTreeMap::<String, wire::BuildResultInfo>::new());
    for (platform, file) in &r.provenance {
        let info = match platform {
            None => &mut own,
            Some(id) => platforms.entry(id.clone()).or_default(),
        };
        info.attestations.push(provenance(file));
    }
    (Some(own), platforms)
}

/// A build's error in full (row `so.h.err`).
pub fn fault_blob(fault: &Fault) -> Vec<u8> {
    let status = status_of(fault);
    match status.details() {
        [] => rpc::Status { code: status.code() as i32, message: status.message().to_owned(), details: Vec::new() }.encode_to_vec(),
        // What travels as details is the whole status.
        whole => whole.to_vec(),
    }
}

fn record(r: &HistoryRecord) -> wire::BuildHistoryRecord {
    let error = r.error.as_ref().map(|f| {
        let status = status_of(f);
        // Details are in the file (row `so.h.err`).
        rpc::Status { code: status.code() as i32, message: status.message().to_owned(), details: Vec::new() }
    });
    let (own, platforms) = results(r);
    wire::BuildHistoryRecord {
        r#ref: r.id.clone(),
        frontend: r.frontend.clone(),
        frontend_attrs: r.options.clone(),
        exporters: r.exporters.iter().map(|e| wire::Exporter { r#type: e.kind.clone(), attrs: e.attrs.clone() }).collect(),
        error,
        external_error: r.failure.as_ref().map(|file| of_file(file, FAILURE)),
        created_at: Some(r.created.into()),
        completed_at: r.completed.map(Into::into),
        logs: r.log.as_ref().map(|file| of_file(file, LOG)),
        exporter_response: r.response.clone(),
        result: own,
        results: platforms,
        generation: r.generation,
        pinned: r.pinned,
        num_cached_steps: r.steps.cached,
        num_total_steps: r.steps.total,
        num_completed_steps: r.steps.completed,
        num_warnings: r.steps.warnings,
        ..Default::default()
    }
}

fn field(r: &HistoryRecord, name: &str) -> Option<String> {
    match name {
        "ref" => Some(r.id.clone()),
        "status" => Some(
            match (&r.error, r.completed) {
                (_, None) => "running",
                (Some(f), _) if f.is_cancelled() => "canceled",
                (Some(_), _) => "error",
                (None, Some(_)) => "completed",
            }
            .into(),
        ),
        "repository" => r.options.get("vcs:source").cloned(),
        _ => None,
    }
}

/// The stream of one listener.
pub fn listen(
    history: Arc<History>,
    request: wire::BuildHistoryRequest,
) -> Result<ReceiverStream<std::result::Result<wire::BuildHistoryEvent, Status>>> {
    let filters = filter::parse_all(&request.filter)?;
    let wanted = move |r: &HistoryRecord| {
        (request.r#ref.is_empty() || r.id == request.r#ref)
            && (!request.active_only || r.completed.is_none())
            && filter::any(&filters, &|name| field(r, name))
    };
    let (existing, mut changes) = history.listen();
    let (tx, rx) = mpsc::channel(64);
    tokio::spawn(async move {
        let mut existing: Vec<_> = existing.into_iter().filter(|r| wanted(r)).collect();
        if request.limit > 0 {
            let skip = existing.len().saturating_sub(request.limit as usize);
            existing.drain(..skip);
        }
        for r in existing {
            let kind = if r.completed.is_some() { wire::BuildHistoryEventType::Complete } else { wire::BuildHistoryEventType::Started };
            if tx.send(Ok(wire::BuildHistoryEvent { r#type: kind as i32, record: Some(record(&r)) })).await.is_err() {
                return;
            }
        }
        if request.early_exit {
            return;
        }
        loop {
            let event = tokio::select! {
                event = changes.recv() => event,
                () = tx.closed() => return,
            };
            let event = match event {
                Ok(event) => event,
                // A listener that fell behind misses events in the middle, as a slow client of any log does.
                Err(RecvError::Lagged(_)) => continue,
                Err(RecvError::Closed) => return,
            };
            let kind = match event.kind {
                HistoryEventKind::Started => wire::BuildHistoryEventType::Started,
                HistoryEventKind::Completed => wire::BuildHistoryEventType::Complete,
                HistoryEventKind::Deleted => wire::BuildHistoryEventType::Deleted,
            };
            let message = wire::BuildHistoryEvent { r#type: kind as i32, record: Some(record(&event.record)) };
            if (wanted(&event.record) || kind == wire::BuildHistoryEventType::Complete && request.active_only)
                && tx.send(Ok(message)).await.is_err()
            {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(rx))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_fault::Detail;

    #[test]
    fn errors_are_kept_with_their_details() {
        let decoded = |fault: &Fault| rpc::Status::decode(&fault_blob(fault)[..]).unwrap();
        let fault = Fault::not_found("no such thing").context("step");
        let plain = decoded(&fault);
        assert_eq!((plain.code, plain.message.as_str(), plain.details.len()), (5, "step: no such thing", 0));
        let full = decoded(&fault.detail(Detail::Exit(3)));
        assert_eq!((full.code, full.message.as_str(), full.details.len()), (5, "step: no such thing", 1));
    }
}
