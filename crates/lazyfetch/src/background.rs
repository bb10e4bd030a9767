//! Requests for the parts of whole blobs: where their bytes go, and whether what did not come is
//! asked for again.

use crate::{
    Hope, SourceError,
    layer::Layer,
    queue::{Order, Queue},
    settings::Backoff,
};
use bytes::Bytes;
use shipway_fault::Fault;
use std::time::Duration;
use tokio::sync::mpsc;

/// Tries for a part before the background gives up: some minutes of an outage.
const TRIES: u32 = 60;
/// The same if somebody waits, who can still do something else: some seconds.
const PULL_TRIES: u32 = 6;
/// The same for what only another source can help with.
const REFUSALS: u32 = 4;

/// A part of a blob, or why there will be none.
pub(crate) enum Part {
    Bytes { start: u64, pieces: Vec<Bytes> },
    Failed(Fault),
}

/// Where parts of a blob go that the background reads.
pub(crate) type Parts = mpsc::UnboundedSender<Part>;

fn send(parts: &Parts, layer: u32, part: Part, queue: &mut Queue) {
    if let Err(mpsc::error::SendError(Part::Bytes { pieces, .. })) = parts.send(part) {
        queue.consumed(layer, length(&pieces));
    }
}

/// Bytes of all of them.
pub(crate) fn length(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// A request that has ended.
pub(crate) struct Ended<'a> {
    pub layer: &'a Layer,
    pub order: &'a Order,
    /// What came, from the start of what was asked for.
    pub pieces: Vec<Bytes>,
    /// Whether that is all, and else which source failed how.
    pub outcome: Result<(), (usize, SourceError)>,
}

impl Ended<'_> {
    /// Hands on what came; what did not is asked for again, or given up.
    pub(crate) fn settle(
        self,
        parts: &Parts,
        queue: &mut Queue,
        backoff: &mut Backoff,
        now: Duration,
    ) {
        let Self { layer, order, pieces, outcome } = self;
        let start = order.range.start;
        let rest = start + length(&pieces)..order.range.end;
        let some = rest.start > start;
        if some {
            send(parts, layer.number, Part::Bytes { start, pieces }, queue);
        }
        let Err((source, error)) = outcome else { return };
        layer.stats.error(&error.fault);
        let sources = layer.sources() as u32;
        let mut tried = order.tried;
        if some {
            (tried.tries, tried.refused) = (1, 0);
        }
        tried.avoid = Some(source);
        tried.refused = if error.hope == Hope::Elsewhere { tried.refused + 1 } else { 0 };
        let most = if layer.is_pull { PULL_TRIES } else { TRIES };
        if tried.tries >= most || tried.refused >= REFUSALS.max(2 * sources) {
            send(parts, layer.number, Part::Failed(error.fault), queue);
            return queue.consumed(layer.number, rest.end - rest.start);
        }
        let pause = error.hope.pause(backoff.pause(tried.tries));
        layer.failed(source, now, error.hope, pause);
        let until = if tried.tries < sources { now } else { now + pause };
        queue.stream_again(layer.number, rest, until, tried);
    }
}
