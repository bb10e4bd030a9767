//! Whole layers: the blob is read once, in order, in parts that are asked for ahead. What is good
//! already is read all the same, for only the blob as a whole shows that the table of contents
//! tells the truth about it.

use crate::{
    Event, Hope, Whole,
    fetcher::Shared,
    layer::Layer,
    queue::{Order, Queue},
    read::environment,
};
use bytes::Bytes;
use shipway_fault::Fault;
use std::{collections::BTreeMap, sync::Arc};
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

fn length(pieces: &[Bytes]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}

/// Carries a request of the background out.
pub(crate) async fn fetch(shared: Arc<Shared>, layer: Arc<Layer>, order: Order) {
    let mut pieces = Vec::new();
    let outcome = match shared.open(&layer, &order, order.range.clone()).await {
        Err(failed) => Err(failed),
        Ok((source, mut reading)) => loop {
            match reading.next().await {
                Ok(Some((_, piece))) => {
                    let now = shared.now();
                    layer.stats.received(piece.len() as u64, true);
                    shared.with(|s| s.queue.arrived(order.no, piece.len() as u64, now));
                    pieces.push(piece);
                    shared.pump();
                }
                Ok(None) => {
                    layer.succeeded(source);
                    break Ok(());
                }
                Err(error) => break Err((source, error)),
            }
        },
    };
    let now = shared.now();
    shared.with(|s| {
        s.queue.end(order.no);
        let start = order.range.start;
        let Some(parts) = s.streams.get(&layer.number) else {
            return s.queue.consumed(layer.number, order.range.end - start);
        };
        let rest = start + length(&pieces)..order.range.end;
        let some = rest.start > start;
        if some {
            send(parts, layer.number, Part::Bytes { start, pieces }, &mut s.queue);
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
            send(parts, layer.number, Part::Failed(error.fault), &mut s.queue);
            return s.queue.consumed(layer.number, rest.end - rest.start);
        }
        let pause = error.hope.pause(s.backoff.pause(tried.tries));
        layer.failed(source, now, error.hope, pause);
        let until = if tried.tries < sources { now } else { now + pause };
        s.queue.stream_again(layer.number, rest, until, tried);
    });
    shared.pump();
}

/// Brings a layer whole, and reports how that ended.
pub(crate) async fn bring(
    shared: Arc<Shared>,
    layer: Arc<Layer>,
    parts: mpsc::UnboundedReceiver<Part>,
    whole: Box<dyn Whole>,
) {
    if let Some(result) = consume(shared.clone(), layer.clone(), parts, whole).await {
        shared.report(Event::Whole { layer: layer.number, result });
    }
}

/// Puts the parts of a blob in order and hands them on. `None` if the layer was removed meanwhile.
pub(crate) async fn consume(
    shared: Arc<Shared>,
    layer: Arc<Layer>,
    mut parts: mpsc::UnboundedReceiver<Part>,
    mut whole: Box<dyn Whole>,
) -> Option<Result<(), Fault>> {
    let (number, end) = (layer.number, layer.blob.size);
    let (mut at, mut early) = (0, BTreeMap::new());
    let result = 'read: {
        while at < end {
            match parts.recv().await {
                Some(Part::Bytes { start, pieces }) => drop(early.insert(start, pieces)),
                Some(Part::Failed(fault)) => break 'read Err(fault),
                // The layer was removed.
                None => break,
            }
            while let Some(pieces) = early.remove(&at) {
                let taken = length(&pieces);
                at += taken;
                let work = shipway_task::blocking("write a layer's data", move || {
                    let result = pieces.iter().try_for_each(|piece| whole.bytes(piece));
                    Ok((whole, result))
                });
                let taken_in = work.await;
                shared.with(|s| s.queue.consumed(number, taken));
                let result;
                (whole, result) = match taken_in {
                    Ok(taken_in) => taken_in,
                    Err(fault) => break 'read Err(fault),
                };
                if let Err(fault) = result {
                    break 'read Err(fault);
                }
                shared.pump();
            }
        }
        match at < end {
            true => Err(environment("the layer is gone".to_owned())),
            false => shipway_task::blocking("write a layer's data", move || whole.finish()).await,
        }
    };
    let is_known = shared.with(|s| {
        let is_known = s.streams.remove(&number).is_some();
        if is_known {
            s.queue.stop(number);
        }
        let mut left: u64 = early.values().map(|pieces| length(pieces)).sum();
        while let Ok(part) = parts.try_recv() {
            left += if let Part::Bytes { pieces, .. } = part { length(&pieces) } else { 0 };
        }
        s.queue.consumed(number, left);
        is_known
    });
    if let Err(fault) = &result
        && is_known
    {
        layer.stats.error(fault);
    }
    shared.pump();
    is_known.then_some(result)
}
