//! What callers ask of the engine.

use crate::{
    Blob, ChunkPlace, Counters, Event, LayerSpec, LayerStats, Report, Settings, Source, Target,
    Whole, WriteError,
    engine::Shared,
    layer::{Layer, locked},
    queue::Class,
    read::environment,
    whole::{bring, consume},
};
use shipway_estargz::DATA_BLOCK;
use shipway_fault::Fault;
use shipway_layerstore::{Frame, Good};
use std::{ops::Range, sync::Arc, time::Duration};
use tokio::sync::mpsc;

/// Blocks of a landmark that are looked at together.
const PIECE: u64 = (4 << 20) / DATA_BLOCK;
/// What is only likely to be read may fetch so much of a layer.
const MAX_LIKELY: u64 = 4 << 20;

/// The engine. Cheap to clone; it ends with the last clone and the requests on their way.
#[derive(Clone)]
pub struct Fetcher(Arc<Shared>);

impl Fetcher {
    /// An engine, and what it reports. Events wait without limit, but there are no more of them
    /// than misses and chunks that came. Must be called within a runtime.
    pub fn new(settings: Settings) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (shared, events) = Shared::new(settings);
        (Self(shared), events)
    }

    /// Takes a layer in.
    pub fn add(&self, spec: LayerSpec) {
        let host = spec.sources.first().map(|s| s.host().to_owned()).unwrap_or_default();
        self.insert(&host, Arc::new(Layer::new(spec, self.0.pauses.clone())));
    }

    fn insert(&self, host: &str, layer: Arc<Layer>) {
        self.0.with(|s| {
            let line = s.line(host);
            s.queue.add(layer.number, line);
            s.layers.insert(layer.number, layer);
        });
    }

    /// Another place to fetch a layer from.
    pub fn add_source(&self, layer: u32, source: Arc<dyn Source>) {
        if let Some(layer) = self.0.layer(layer) {
            layer.add_source(source);
        }
    }

    /// Forgets a layer. Nothing is reported about it any more.
    pub fn remove(&self, layer: u32) {
        self.0.with(|s| {
            s.layers.remove(&layer);
            s.misses.of_layer(layer);
            s.feeding.remove(&layer);
            s.streams.remove(&layer);
            s.frames.retain(|key, _| key.0 != layer);
            s.queue.remove(layer);
        });
    }

    /// The counters of a layer.
    pub fn stats(&self, layer: u32) -> Option<Arc<LayerStats>> {
        self.0.layer(layer).map(|l| l.stats.clone())
    }

    /// The round trip to a host as others measured it, for example with the first request for a
    /// table of contents.
    pub fn round_trip(&self, host: &str, rtt: Duration) {
        self.0.with(|s| {
            let line = s.line(host);
            s.queue.round_trip(line, rtt);
        });
    }

    /// Opens `connections` to the first source of a layer ahead.
    pub fn warm(&self, layer: u32, connections: usize) {
        let Some(layer) = self.0.layer(layer) else { return };
        let Ok((_, source)) = layer.pick(None, self.0.now()) else { return };
        for _ in 0..connections.min(self.0.settings.connections) {
            let (source, digest) = (source.clone(), layer.blob.digest);
            shipway_task::spawn("connect ahead", async move { source.warm(digest).await });
        }
    }

    /// Somebody waits for blocks of a layer. [`Event::Progress`] will tell that they are good, in
    /// parts and in any order, or [`Event::Failed`] why not.
    pub fn miss(&self, layer: u32, blocks: Range<u64>) {
        match self.0.layer(layer) {
            Some(found) => {
                let since = self.0.now();
                // It lasts until the miss is served or has failed, so no task may run in it: what
                // is fetched besides would be part of it.
                let span = tracing::info_span!(
                    parent: None,
                    "miss",
                    layer,
                    block = blocks.start,
                    blocks = blocks.end - blocks.start,
                    otel.status_code = tracing::field::Empty,
                    otel.status_description = tracing::field::Empty,
                );
                let work = self.0.clone().demand(found, blocks, since, span);
                shipway_task::spawn("queue a miss", work);
            }
            None => {
                let fault = Fault::not_found(format!("there is no layer {layer}"));
                self.0.report(Event::Failed { layer, blocks, fault });
            }
        }
    }

    /// A block was read for the first time, local or not.
    pub fn touched(&self, layer: u32, block: u64) {
        let Some(layer) = self.0.layer(layer) else { return };
        if self.0.is_learned(&layer) {
            return;
        }
        let this = self.0.clone();
        shipway_task::spawn("look for strides", async move {
            this.read(&layer, block).await;
            this.pump();
        });
    }

    /// Blocks that will be read, in this order.
    pub fn learned(&self, layer: u32, blocks: impl IntoIterator<Item = Range<u64>>) {
        let Some(found) = self.0.layer(layer) else { return };
        locked(&found.ahead).learned.extend(blocks);
        self.0.with(|s| s.feeding.insert(layer));
        self.0.pump();
    }

    /// Blocks that are likely to be read, in this order, though nobody knows: what is known goes
    /// first, and of what is longer only the beginning is fetched.
    pub fn likely(&self, layer: u32, blocks: Vec<Range<u64>>) {
        let Some(found) = self.0.layer(layer) else { return };
        let this = self.0.clone();
        shipway_task::spawn("queue what is likely to be read", async move {
            this.prefetch(&found, blocks, Class::Ahead, MAX_LIKELY).await;
            this.pump();
        });
    }

    /// All before the place `end` in the blob will be read.
    pub fn landmark(&self, layer: u32, end: u64) {
        let Some(found) = self.0.layer(layer) else { return };
        let this = self.clone();
        shipway_task::spawn("queue what comes before a landmark", async move {
            let target = found.target.clone();
            match shipway_task::blocking("read a layer's data", move || target.before(end)).await {
                Ok(blocks) => {
                    // In pieces, so that the first are on their way before all are looked at.
                    let starts = (blocks.start..blocks.end).step_by(PIECE as usize);
                    this.learned(layer, starts.map(|at| at..blocks.end.min(at + PIECE)));
                }
                Err(fault) => found.stats.error(&fault),
            }
        });
    }

    /// Brings the whole layer: its blob is read once, in order, and given to what `whole` makes,
    /// which writes what is missing and tells of it. Begins at once, or some time after the last
    /// miss. [`Event::Whole`] tells the end.
    pub fn background(&self, layer: u32, whole: impl FnOnce(Report) -> Box<dyn Whole>) {
        let Some(found) = self.0.layer(layer) else { return };
        let (parts, receiver) = mpsc::unbounded_channel();
        let size = found.blob.size;
        let begun = self.0.with(|s| {
            if s.streams.contains_key(&layer) {
                return false;
            }
            let start = s.last_miss.map_or(Duration::ZERO, |t| t + self.0.settings.quiet);
            s.streams.insert(layer, parts);
            s.queue.stream(layer, 0..size, start);
            true
        });
        if begun {
            let shared = Arc::downgrade(&self.0);
            let report: Report = Arc::new(move |good| {
                if let Some(shared) = shared.upgrade() {
                    shared.brought(layer, good);
                }
            });
            let whole = whole(report);
            shipway_task::spawn(
                "bring a layer whole",
                bring(self.0.clone(), found, receiver, whole),
            );
            self.0.pump();
        }
    }

    /// Reads a blob that is not a layer yet, once and in order, for a caller who waits: in parts
    /// that are asked for ahead of `whole`, which takes them, from any of the sources. What
    /// containers read goes first. Returns the counters as well; dropping the future ends it.
    pub async fn pull(
        &self,
        blob: Blob,
        sources: Vec<Arc<dyn Source>>,
        whole: Box<dyn Whole>,
    ) -> (Counters, Result<(), Fault>) {
        let host = sources.first().map(|s| s.host().to_owned()).unwrap_or_default();
        let number = self.0.with(|s| {
            let number = s.next_pull;
            s.next_pull -= 1;
            number
        });
        let target = Arc::new(NoLayer { number, blob });
        let spec = LayerSpec { target, sources, spans: None };
        let mut layer = Layer::new(spec, self.0.pauses.clone());
        layer.is_pull = true;
        let layer = Arc::new(layer);
        self.insert(&host, layer.clone());
        let _removed = Removed { fetcher: self, number };
        let (parts, receiver) = mpsc::unbounded_channel();
        self.0.with(|s| {
            s.streams.insert(number, parts);
            s.queue.stream_now(number, 0..blob.size);
        });
        self.0.pump();
        let read = consume(self.0.clone(), layer.clone(), receiver, whole).await;
        let gone = || Err(environment("the blob is not pulled any more".to_owned()));
        (layer.stats.read(), read.unwrap_or_else(gone))
    }

    /// Bytes of answers that are in memory or on their way.
    pub fn in_flight(&self) -> u64 {
        self.0.with(|s| s.queue.reserved())
    }
}

/// A blob that is pulled; nothing of it is known but where it is.
struct NoLayer {
    number: u32,
    blob: Blob,
}

impl Target for NoLayer {
    fn number(&self) -> u32 {
        self.number
    }

    fn blob(&self) -> Blob {
        self.blob
    }

    fn verify(&self, _: Range<u64>) -> Result<Good, Fault> {
        Ok(Good::default())
    }

    fn frames(&self, _: Range<u64>) -> Result<Vec<Frame>, Fault> {
        Ok(Vec::new())
    }

    fn is_missing(&self, _: &Frame) -> bool {
        false
    }

    fn write(&self, _: &Frame, _: &[u8], _: &mut dyn FnMut(Good)) -> Result<(), WriteError> {
        Ok(())
    }

    fn chunk_at(&self, _: u64) -> Result<Option<ChunkPlace>, Fault> {
        Ok(None)
    }

    fn before(&self, _: u64) -> Result<Range<u64>, Fault> {
        Ok(0..0)
    }
}

/// Forgets what is pulled, also when nobody waits any more.
struct Removed<'a> {
    fetcher: &'a Fetcher,
    number: u32,
}

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        self.fetcher.remove(self.number);
    }
}
