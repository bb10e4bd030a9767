//! Whole layers: the blob is read once, in order, in parts that are asked for ahead. What is good
//! already is read all the same, for only the blob as a whole shows that the table of contents
//! tells the truth about it.

use crate::{
    Event, Whole,
    background::{Part, length},
    engine::Shared,
    layer::Layer,
    read::environment,
};
use shipway_fault::Fault;
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::mpsc;

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
