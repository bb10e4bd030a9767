//! The traces of builds that run, as far as they fit (row `ob.recorder`).

use crate::{
    context::TraceId,
    meter,
    otlp::{self, ExportTraceServiceRequest},
    stub,
};
use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc};

/// Most spans of a trace that are kept.
const MAX_SPANS: usize = 10_000;
/// Most bytes of them, as they are kept.
const MAX_BYTES: usize = 8 << 20;

/// The traces that are recorded.
#[derive(Default)]
pub struct Traces(Mutex<HashMap<TraceId, Trace>>);

#[derive(Default)]
struct Trace {
    /// How many builds record it: those of one `bake` are in one trace.
    builds: usize,
    text: Vec<u8>,
    spans: usize,
    dropped: usize,
}

/// Records a trace as long as it lives.
pub struct TraceRecording {
    traces: Arc<Traces>,
    id: TraceId,
}

impl Traces {
    /// Begins to record a trace.
    pub fn record(self: &Arc<Self>, id: TraceId) -> TraceRecording {
        self.0.lock().entry(id).or_default().builds += 1;
        TraceRecording { traces: self.clone(), id }
    }

    /// Whether anybody records the trace.
    pub fn wants(&self, id: TraceId) -> bool {
        self.0.lock().contains_key(&id)
    }

    /// Adds the spans that a client sent, as far as their traces are recorded.
    pub fn add_all(&self, request: &ExportTraceServiceRequest) {
        let none = otlp::Resource::default();
        for of_resource in &request.resource_spans {
            let resource = of_resource.resource.as_ref().unwrap_or(&none);
            for of_scope in &of_resource.scope_spans {
                let scope = of_scope.scope.as_ref().map_or("", |s| &s.name);
                of_scope.spans.iter().for_each(|span| self.add(span, resource, scope));
            }
        }
    }

    /// Adds a span.
    pub(crate) fn add(&self, span: &otlp::Span, resource: &otlp::Resource, scope: &str) {
        let Ok(id) = <[u8; 16]>::try_from(&*span.trace_id) else { return };
        let id = TraceId::from_bytes(id);
        if !self.wants(id) {
            return;
        }
        let text = stub::of(span, resource, scope);
        let mut all = self.0.lock();
        let Some(trace) = all.get_mut(&id) else { return };
        if trace.spans == MAX_SPANS || trace.text.len() + text.len() > MAX_BYTES {
            trace.dropped += 1;
            meter::SPANS_DROPPED.add(1);
            return;
        }
        trace.spans += 1;
        trace.text.extend_from_slice(text.as_bytes());
    }
}

impl TraceRecording {
    /// What there is so far: JSON documents, one a line; the last says how many spans are missing,
    /// if some are.
    pub fn text(&self) -> Vec<u8> {
        let all = self.traces.0.lock();
        let Some(trace) = all.get(&self.id) else { return Vec::new() };
        let mut text = trace.text.clone();
        if trace.dropped > 0 {
            text.extend_from_slice(stub::dropped(self.id, trace.dropped).as_bytes());
        }
        text
    }
}

impl Drop for TraceRecording {
    fn drop(&mut self) {
        let mut all = self.traces.0.lock();
        if let Some(trace) = all.get_mut(&self.id) {
            trace.builds -= 1;
            if trace.builds == 0 {
                all.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn span(id: TraceId, name: &str) -> otlp::Span {
        otlp::Span {
            trace_id: id.to_bytes().to_vec(),
            span_id: vec![1; 8],
            name: name.to_owned(),
            ..otlp::Span::default()
        }
    }

    fn lines(recording: &TraceRecording) -> Vec<serde_json::Value> {
        let text = String::from_utf8(recording.text()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_trace_is_kept_while_a_build_records_it() {
        let traces = Arc::new(Traces::default());
        let (mine, other) = (TraceId::from_bytes([1; 16]), TraceId::from_bytes([2; 16]));
        let (one, two) = (traces.record(mine), traces.record(mine));
        let resource = otlp::Resource::default();
        traces.add(&span(mine, "a"), &resource, "");
        traces.add(&span(other, "b"), &resource, "");
        drop(one);
        traces.add(&span(mine, "c"), &resource, "");
        let names: Vec<_> = lines(&two).iter().map(|l| l["Name"].clone()).collect();
        assert_eq!(names, ["a", "c"]);
        drop(two);
        assert!(!traces.wants(mine) && traces.0.lock().is_empty());
    }

    #[test]
    fn a_trace_has_bounds_and_says_what_is_missing() {
        let traces = Arc::new(Traces::default());
        let id = TraceId::from_bytes([1; 16]);
        let recording = traces.record(id);
        let resource = otlp::Resource::default();
        (0..MAX_SPANS + 3).for_each(|_| traces.add(&span(id, ""), &resource, ""));
        let all = lines(&recording);
        assert_eq!(all.len(), MAX_SPANS + 1);
        assert_eq!(all[MAX_SPANS]["Name"], "3 spans were dropped");
        drop(recording);

        let recording = traces.record(id);
        let large = "x".repeat(MAX_BYTES / 2);
        // Texts of clients are cut, so many of them are needed.
        (0..3).for_each(|_| traces.add(&span(id, &large), &resource, ""));
        assert!(recording.text().len() < MAX_BYTES);
        let mut many = span(id, "");
        many.attributes =
            vec![otlp::KeyValue { key: "k".repeat(100), ..otlp::KeyValue::default() }; 100];
        (0..2000).for_each(|_| traces.add(&many, &resource, ""));
        let all = lines(&recording);
        assert!(recording.text().len() <= MAX_BYTES + 1024);
        assert!(all.last().unwrap()["Name"].as_str().unwrap().ends_with("spans were dropped"));
    }
}
