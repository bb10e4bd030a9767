//! Progress events on the wire (rows `ctl.status.*`, `so.st.*`).

use prost::Message as _;
use shipway_fault::Span;
use shipway_progress::{
    CacheChanges, CacheMiss, Event, SourceSpan, StatusUpdate, VertexUpdate, WarningUpdate,
};
use shipway_proto::{
    MAX_MESSAGE,
    moby::buildkit::v1::{self as wire, StatusResponse, Vertex, VertexLog, VertexStatus},
    pb,
};
use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
};

/// Events of a log that become messages together.
const WRITTEN_TOGETHER: usize = 1000;
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
        progress_group: v.group.as_ref().map(|g| pb::ProgressGroup {
            id: g.id.clone(),
            name: g.name.clone(),
            weak: g.weak,
        }),
        shipway_cache_miss: v.miss.as_deref().map(miss),
    }
}

fn miss(miss: &CacheMiss) -> wire::CacheMiss {
    let of = |reason: &str| wire::CacheMiss { reason: reason.into(), ..Default::default() };
    match miss {
        CacheMiss::Ignored { inputs } => {
            wire::CacheMiss { inputs: inputs.clone(), ..of("ignored") }
        }
        CacheMiss::Uncacheable { inputs } => {
            wire::CacheMiss { inputs: inputs.clone(), ..of("uncacheable") }
        }
        CacheMiss::Gone => of("gone"),
        CacheMiss::New => of("new"),
        CacheMiss::Changed(CacheChanges { operation, inputs, contents }) => wire::CacheMiss {
            inputs: inputs.clone(),
            contents: contents.clone(),
            operation: operation.is_some(),
            parts: operation.clone().unwrap_or_default(),
            ..of("changed")
        },
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
    let position =
        |p: shipway_fault::Position| Some(pb::Position { line: p.line, character: p.character });
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

fn warning(w: &WarningUpdate) -> wire::VertexWarning {
    let (info, ranges) =
        w.source.as_ref().map(source).map_or((None, Vec::new()), |(i, r)| (Some(i), r));
    wire::VertexWarning {
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
            all.push(ordered(std::mem::take(&mut current)));
            counters.clear();
            size = 0;
        }
    }
    if current != StatusResponse::default() {
        all.push(ordered(current));
    }
    all
}

/// The message with what is in it in the order of time (row `so.st.order`); what is said of one
/// vertex stays in the order in which it was said.
fn ordered(mut message: StatusResponse) -> StatusResponse {
    let time = |t: &Option<prost_types::Timestamp>| t.as_ref().map(|t| (t.seconds, t.nanos));
    message.vertexes.sort_by_key(|v| time(&v.started));
    message.statuses.sort_by_key(|s| time(&s.timestamp));
    message.logs.sort_by_key(|l| time(&l.timestamp));
    message
}

/// Writes a whole build's events as the log blob: little-endian length, then message, repeated (row
/// `so.h.status`).
pub fn log_blob(events: &[Event], out: &mut dyn Write) -> io::Result<()> {
    for message in events.chunks(WRITTEN_TOGETHER).flat_map(messages) {
        out.write_all(&(message.encoded_len() as u32).to_le_bytes())?;
        out.write_all(&message.encode_to_vec())?;
    }
    Ok(())
}

/// Reads a log blob back, message by message; ends at the first thing that is none.
pub fn read_blob(mut from: impl Read) -> impl Iterator<Item = StatusResponse> {
    std::iter::from_fn(move || {
        let mut head = [0; 4];
        from.read_exact(&mut head).ok()?;
        let length = u32::from_le_bytes(head) as usize;
        if length > MAX_MESSAGE {
            return None;
        }
        let mut message = Vec::new();
        from.by_ref().take(length as u64).read_to_end(&mut message).ok()?;
        (message.len() == length).then(|| StatusResponse::decode(&message[..]).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use shipway_oci::Digest;
    use shipway_progress::{Journal, LogStream, LogUpdate};
    use std::sync::Arc;

    #[test]
    fn a_log_blob_reads_back() {
        let journal = Journal::new();
        let r = journal.reporter(Digest::of("v"), "v");
        r.started();
        r.status("s", 1, 2, false);
        r.status("s", 2, 2, true);
        r.log(LogStream::Stderr, b"hello");
        r.completed(None);
        let mut blob = Vec::new();
        log_blob(&journal.events(), &mut blob).unwrap();
        let all: Vec<_> = read_blob(&blob[..]).collect();
        assert_eq!(all.len(), 1);
        assert_eq!(
            (all[0].vertexes.len(), all[0].statuses.len(), all[0].logs[0].stream),
            (3, 1, 2)
        );
        for broken in [&[9, 9, 9][..], &[255, 255, 255, 255], &[9, 0, 0, 0, 1]] {
            assert_eq!(read_blob(broken).count(), 0);
        }
    }

    #[test]
    fn a_vertex_has_its_group_and_its_inputs() {
        let group =
            shipway_progress::Group { id: "g".into(), name: "all of it".into(), weak: true };
        let inputs = vec![Digest::of("a"), Digest::of("b")];
        let journal = Journal::new();
        let reporter = shipway_progress::Reporter::new(
            Digest::of("v"),
            "v".into(),
            inputs.clone(),
            Some(group),
        );
        reporter.attach(&journal);
        reporter.started();
        let all = messages(&journal.events());
        let vertex = &all[0].vertexes[0];
        let group = vertex.progress_group.as_ref().map(|g| (&*g.id, &*g.name, g.weak));
        assert_eq!(
            (group, vertex.inputs.clone()),
            (Some(("g", "all of it", true)), inputs.iter().map(ToString::to_string).collect())
        );
    }

    #[test]
    fn a_vertex_says_why_it_ran() {
        let list = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let changes = CacheChanges {
            operation: Some(list(&["env A"])),
            inputs: list(&["base"]),
            contents: list(&["context"]),
        };
        let all = [
            (CacheMiss::Gone, "gone"),
            (CacheMiss::New, "new"),
            (CacheMiss::Ignored { inputs: list(&["base"]) }, "ignored"),
            (CacheMiss::Uncacheable { inputs: list(&["base"]) }, "uncacheable"),
            (CacheMiss::Changed(changes), "changed"),
        ];
        for (said, reason) in all {
            let journal = Journal::new();
            let r = journal.reporter(Digest::of("v"), "v");
            r.started();
            r.missed(said.clone());
            r.completed(None);
            let mut blob = Vec::new();
            log_blob(&journal.events(), &mut blob).unwrap();
            let vertices = read_blob(&blob[..]).flat_map(|message| message.vertexes);
            let last = vertices.last().and_then(|vertex| vertex.shipway_cache_miss).unwrap();
            assert_eq!(last.reason, reason);
            let named = matches!(
                said,
                CacheMiss::Ignored { .. } | CacheMiss::Uncacheable { .. } | CacheMiss::Changed(_)
            );
            assert_eq!(last.inputs, if named { list(&["base"]) } else { Vec::new() });
            let changed = matches!(said, CacheMiss::Changed(_));
            assert_eq!(
                (last.operation, last.parts.len(), last.contents.len()),
                match changed {
                    true => (true, 1, 1),
                    false => (false, 0, 0),
                }
            );
        }
    }

    #[test]
    fn within_a_message_times_are_in_order() {
        let at = |seconds| std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let log = |(second, text): (u64, &'static str)| {
            Event::Log(Arc::new(LogUpdate {
                vertex: Digest::of("v"),
                stream: LogStream::Stdout,
                bytes: text.as_bytes().into(),
                time: at(second),
            }))
        };
        let events: Vec<Event> = [(2, "b"), (1, "a"), (2, "c")].map(log).into();
        let logs: Vec<_> = messages(&events).remove(0).logs.into_iter().map(|l| l.msg).collect();
        assert_eq!(logs, [b"a", b"b", b"c"]);
    }
}
