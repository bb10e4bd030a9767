//! The queue to a collector: bounded in spans and bytes; what does not fit is dropped and counted,
//! for no build waits for a collector.

use crate::{
    meter,
    otlp::{ExportTraceServiceRequest, ResourceSpans},
};
use prost::Message as _;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;

/// Most messages that wait (the default of `OTEL_BSP_MAX_QUEUE_SIZE`).
const MAX_WAITING: usize = 2048;
/// Most bytes that wait: a message of a client may be large.
const MAX_BYTES: usize = 16 << 20;
/// Most messages of one request (the default of `OTEL_BSP_MAX_EXPORT_BATCH_SIZE`).
const MAX_BATCH: usize = 512;

/// Where spans are put. Clones share it.
#[derive(Clone)]
pub struct Outbox {
    queue: mpsc::Sender<(ResourceSpans, usize)>,
    waiting: Arc<AtomicUsize>,
}

/// Where they are taken from.
pub struct OutboxReader {
    queue: mpsc::Receiver<(ResourceSpans, usize)>,
    waiting: Arc<AtomicUsize>,
    /// What was taken out for a request that was not made yet.
    taken: Vec<(ResourceSpans, usize)>,
}

impl Outbox {
    /// Both ends.
    pub fn new() -> (Self, OutboxReader) {
        let (sender, receiver) = mpsc::channel(MAX_WAITING);
        let waiting = Arc::new(AtomicUsize::new(0));
        (
            Self { queue: sender, waiting: waiting.clone() },
            OutboxReader { queue: receiver, waiting, taken: Vec::new() },
        )
    }

    /// Puts spans in, if there is room.
    pub fn send(&self, spans: ResourceSpans) {
        let (bytes, count) = (spans.encoded_len(), count(&spans));
        let before = self.waiting.fetch_add(bytes, Ordering::Relaxed);
        if before + bytes > MAX_BYTES || self.queue.try_send((spans, bytes)).is_err() {
            self.waiting.fetch_sub(bytes, Ordering::Relaxed);
            meter::SPANS_DROPPED.add(count as u64);
        }
    }
}

fn count(spans: &ResourceSpans) -> usize {
    spans.scope_spans.iter().map(|s| s.spans.len()).sum()
}

impl OutboxReader {
    /// The next spans, some time after the first of them ended, so that there are more; `None` when
    /// nothing can come any more. Dropping the future loses nothing.
    pub async fn next(&mut self, delay: Duration) -> Option<ExportTraceServiceRequest> {
        if self.taken.is_empty() && self.queue.recv_many(&mut self.taken, MAX_BATCH).await == 0 {
            return None;
        }
        let more = async {
            loop {
                let room = MAX_BATCH.saturating_sub(self.taken.len());
                if room == 0 || self.queue.recv_many(&mut self.taken, room).await == 0 {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(delay, more).await;
        Some(self.request())
    }

    /// What is there, without waiting.
    pub fn take_now(&mut self) -> ExportTraceServiceRequest {
        while let Ok(next) = self.queue.try_recv() {
            self.taken.push(next);
        }
        self.request()
    }

    fn request(&mut self) -> ExportTraceServiceRequest {
        let all = std::mem::take(&mut self.taken);
        let bytes = all.iter().map(|(_, bytes)| bytes).sum();
        self.waiting.fetch_sub(bytes, Ordering::Relaxed);
        let mut resource_spans: Vec<ResourceSpans> = Vec::new();
        for (spans, _) in all {
            // Our own come one by one.
            match resource_spans.last_mut() {
                Some(last) if last.resource == spans.resource => {
                    for scope in spans.scope_spans {
                        match last.scope_spans.last_mut() {
                            Some(known) if known.scope == scope.scope => {
                                known.spans.extend(scope.spans);
                            }
                            _ => last.scope_spans.push(scope),
                        }
                    }
                }
                _ => resource_spans.push(spans),
            }
        }
        ExportTraceServiceRequest { resource_spans }
    }
}

/// How many spans a request has.
pub(crate) fn spans_of(request: &ExportTraceServiceRequest) -> usize {
    request.resource_spans.iter().map(count).sum()
}

impl OutboxReader {
    /// Counts the spans of a request that no collector took.
    pub fn lost(request: &ExportTraceServiceRequest) {
        meter::SPANS_DROPPED.add(spans_of(request) as u64);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::otlp::{ScopeSpans, Span};

    fn spans(name: &str) -> ResourceSpans {
        let span = Span { name: name.to_owned(), ..Span::default() };
        let scope = ScopeSpans { spans: vec![span], ..ScopeSpans::default() };
        ResourceSpans { scope_spans: vec![scope], ..ResourceSpans::default() }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_dropped_and_room_comes_back() {
        let (outbox, mut reader) = Outbox::new();
        (0..MAX_WAITING + 5).for_each(|_| outbox.send(spans("a")));
        assert_eq!(spans_of(&reader.take_now()), MAX_WAITING);
        let large = "x".repeat(MAX_BYTES / 2);
        (0..3).for_each(|_| outbox.send(spans(&large)));
        assert_eq!(spans_of(&reader.take_now()), 1);
        assert_eq!(reader.waiting.load(Ordering::Relaxed), 0);
        outbox.send(spans("b"));
        drop(outbox);
        let next = reader.next(Duration::from_secs(600)).await.unwrap();
        assert_eq!(spans_of(&next), 1);
        assert!(reader.next(Duration::ZERO).await.is_none());
    }
}
