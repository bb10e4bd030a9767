//! Progress events on the wire (rows `ctl.status.*`, `so.st.*`).

use prost::Message as _;
use shipway_fault::Span;
use shipway_progress::{Event, SourceSpan, StatusUpdate, VertexUpdate, WarningUpdate};
use shipway_proto::{
    moby::buildkit::v1::{StatusResponse, Vertex, VertexLog, VertexStatus, VertexWarning},
    pb,
};
use std::collections::BTreeMap;

/// Logs of one message stay near this size (row `so.st.split`).
const BATCH: usize = 1 << 20;

fn vertex(v: &VertexUpdate) -> Vertex {
    Vertex {
        digest: v.digest.to_string(),
        inputs: v.inputs.iter().map(ToString::to_string).collect(),
        name: v.name.clone(),
        cached: v.cached,
        started: v.started.map(Into::into),
        completed: v.completed.map(Into::into),
        error: v.error.clone().unwrap_or_default(),
        progress_group: v.group.as_ref().map(|g| pb::ProgressGroup { id: g.id.clone(), name: g.name.clone(), weak: g.weak }),
    }
}

fn status(s: &StatusUpdate) -> VertexStatus {
    VertexStatus {
        id: s.id.clone(),
        vertex: s.vertex.to_string(),
        name: s.name.clone(),
        current: s.current,
        total: s.total,
        timestamp: Some(s.time.into()),
        started: s.started.map(Into::into),
        completed: s.completed.map(Into::into),
    }
}

fn range(s: &Span) -> pb::Range {
    let position = |p: shipway_fault::Position| Some(pb::Position { line: p.line, character: p.character });
    pb::Range { start: position(s.start), end: position(s.end) }
}

fn source(s: &SourceSpan) -> (pb::SourceInfo, Vec<pb::Range>) {
    let info = pb::SourceInfo {
        filename: s.file.filename.clone(),
        data: s.file.data.clone(),
        definition: s.file.definition.as_deref().and_then(|d| pb::Definition::decode(d).ok()),
        language: s.file.language.clone(),
    };
    (info, s.spans.iter().map(range).collect())
}

fn warning(w: &WarningUpdate) -> VertexWarning {
    let (info, ranges) = w.source.as_ref().map(source).map_or((None, Vec::new()), |(i, r)| (Some(i), r));
    VertexWarning {
        vertex: w.vertex.to_string(),
        level: w.level,
        short: w.short.clone().into_bytes(),
        detail: w.detail.iter().map(|d| d.clone().into_bytes()).collect(),
        url: w.url.clone(),
        info,
        ranges,
    }
}

/// A batch of events as messages. Within a batch only the last state of a counter is sent.
pub fn messages(events: &[Event]) -> Vec<StatusResponse> {
    let mut all = Vec::new();
    let mut current = StatusResponse::default();
    let mut counters: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut size = 0;
    for event in events {
        match event {
            Event::Vertex(v) => current.vertexes.push(vertex(v)),
            Event::Status(s) => match counters.get(&(s.vertex.to_string(), s.id.clone())) {
                Some(i) => current.statuses[*i] = status(s),
                None => {
                    counters.insert((s.vertex.to_string(), s.id.clone()), current.statuses.len());
                    current.statuses.push(status(s));
                }
            },
            Event::Log(log) => {
                size += log.bytes.len();
                current.logs.push(VertexLog {
                    vertex: log.vertex.to_string(),
                    timestamp: Some(log.time.into()),
                    stream: log.stream as i64,
                    msg: log.bytes.to_vec(),
                });
            }
            Event::Warning(w) => current.warnings.push(warning(w)),
        }
        if size >= BATCH || current.vertexes.len() >= 1000 {
            all.push(std::mem::take(&mut current));
            counters.clear();
            size = 0;
        }
    }
    if current != StatusResponse::default() {
        all.push(current);
    }
    all
}

/// A whole build's events as the log blob: little-endian length, then message, repeated (row `so.h.status`).
pub fn log_blob(events: &[Event]) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages(events) {
        out.extend_from_slice(&(message.encoded_len() as u32).to_le_bytes());
        out.extend_from_slice(&message.encode_to_vec());
    }
    out
}

/// Reads a log blob back; stops at the first thing that is no message.
pub fn read_blob(mut bytes: &[u8]) -> Vec<StatusResponse> {
    let mut all = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*head) as usize;
        let Some((message, rest)) = rest.split_at_checked(length) else { break };
        let Ok(message) = StatusResponse::decode(message) else { break };
        all.push(message);
        bytes = rest;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;
    use shipway_progress::{Journal, LogStream};

    #[test]
    fn a_log_blob_reads_back() {
        let journal = Journal::new();
        let r = journal.reporter(Digest::of("v"), "v");
        r.started();
        r.status("s", 1, 2, false);
        r.status("s", 2, 2, true);
        r.log(LogStream::Stderr, b"hello");
        r.completed(None);
        let all = read_blob(&log_blob(&journal.events()));
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].vertexes.len(), all[0].statuses.len(), all[0].logs[0].stream), (3, 1, 2));
        assert!(read_blob(&[9, 9, 9]).is_empty());
    }
}
