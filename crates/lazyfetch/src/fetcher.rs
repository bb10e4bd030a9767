//! The engine: turns misses into requests and answers into good blocks. What is asked for and when
//! is the queue's business; this is the I/O around it.

use crate::{
    Blob, ChunkStart, Counters, Hope, LayerSpec, LayerStats, Opened, Report, Settings, Source,
    SourceError, Target, Wanted, Whole, WriteError,
    assemble::Assembler,
    background::{self, Parts},
    layer::{Layer, Pauses, locked},
    misses::{Miss, Misses},
    queue::{Class, FrameKey, Limits, LineNo, Order, Queue},
    read::{self, Reading, environment},
    readahead,
    settings::Backoff,
};
use parking_lot::Mutex;
use shipway_estargz::DATA_BLOCK;
use shipway_fault::{Code, Fault};
use shipway_layerstore::{Frame, Good};
use std::{
    collections::{BTreeSet, HashMap},
    ops::Range,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::{Notify, Semaphore, mpsc},
    task::JoinSet,
    time::Instant,
};
use tracing::Span;

/// Frames that are decompressed and compared at once, each of which holds a chunk in memory.
const CHECKS: usize = 2;
/// Frames of a profile that are in the queue at least; the rest of the profile waits outside.
const FED: usize = 64;
/// Looks at blocks of which nothing is missing and which are not good, as others write them.
const LOOKS: u32 = 4;
/// Pieces of a profile that are looked at together.
const FEED: usize = 32;
/// Tries for what nobody waits for.
const QUIET_TRIES: u32 = 3;
/// A second request is sent when the first has been silent for so many times the usual.
const HEDGE: u32 = 3;
const MIN_HEDGE: Duration = Duration::from_millis(100);
/// Second requests at once.
const MAX_HEDGES: usize = 2;
/// Blocks of a landmark that are looked at together.
const PIECE: u64 = (4 << 20) / DATA_BLOCK;
/// The window around a missed file.
const WINDOW: Range<u64> = 128 << 10..1 << 20;
/// Frames of a layer that wait to be read ahead; those that are older than so many are stale.
const MAX_AHEAD: usize = 256;
/// What strides may fetch ahead at a time.
const MAX_STRIDES: u64 = 4 << 20;

/// What the engine reports.
#[derive(Debug)]
pub enum Event {
    /// Blocks of a layer are good. Whoever serves them is told before this is dropped.
    Progress {
        /// The layer.
        layer: u32,
        /// The blocks.
        good: Good,
    },
    /// Blocks that somebody waits for cannot be had for now. A later miss tries anew.
    Failed {
        /// The layer.
        layer: u32,
        /// The blocks, as in the miss.
        blocks: Range<u64>,
        /// Why.
        fault: Fault,
    },
    /// The background has read the whole blob, or cannot.
    Whole {
        /// The layer.
        layer: u32,
        /// Whether blob, table of contents and tar are as they should be.
        result: Result<(), Fault>,
    },
}

/// The engine. Cheap to clone; it ends with the last clone and the requests on their way.
#[derive(Clone)]
pub struct Fetcher(Arc<Shared>);

pub(crate) struct Shared {
    pub settings: Settings,
    events: mpsc::UnboundedSender<Event>,
    origin: Instant,
    state: Mutex<State>,
    /// Tells the timer that there is an earlier time.
    wake: Arc<Notify>,
    checks: Semaphore,
    hedges: Semaphore,
    pauses: Arc<Pauses>,
}

pub(crate) struct State {
    pub queue: Queue,
    misses: Misses,
    lines: HashMap<String, LineNo>,
    layers: HashMap<u32, Arc<Layer>>,
    /// Layers whose profile is not all in the queue.
    feeding: BTreeSet<u32>,
    /// Blobs that the background reads.
    pub streams: HashMap<u32, Parts>,
    /// Number of the next blob that is pulled. Those of layers count up, these down.
    next_pull: u32,
    /// What is in the queue.
    frames: HashMap<FrameKey, Frame>,
    pub backoff: Backoff,
    last_miss: Option<Duration>,
    timer: Option<Duration>,
}

/// Why a frame did not come.
enum Trouble {
    Source(usize, SourceError),
    Wrong(usize, Fault),
    Disk(Fault),
}

impl Fetcher {
    /// An engine, and what it reports. Events wait without limit, but there are no more of them
    /// than misses and chunks that came. Must be called within a runtime.
    pub fn new(settings: Settings) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (events, receiver) = mpsc::unbounded_channel();
        let limits = Limits { memory: settings.memory, connections: settings.connections };
        let state = State {
            queue: Queue::new(limits),
            misses: Misses::default(),
            lines: HashMap::new(),
            layers: HashMap::new(),
            feeding: BTreeSet::new(),
            streams: HashMap::new(),
            next_pull: u32::MAX,
            frames: HashMap::new(),
            backoff: Backoff::new(),
            last_miss: None,
            timer: None,
        };
        let shared = Arc::new(Shared {
            settings,
            events,
            origin: Instant::now(),
            state: Mutex::new(state),
            wake: Arc::default(),
            checks: Semaphore::new(CHECKS),
            hedges: Semaphore::new(MAX_HEDGES),
            pauses: Arc::default(),
        });
        shipway_task::spawn("time fetches", timer(Arc::downgrade(&shared), shared.wake.clone()));
        (Self(shared), receiver)
    }

    /// Takes a layer in.
    pub fn add(&self, spec: LayerSpec) {
        let host = spec.sources.first().map(|s| s.host().to_owned()).unwrap_or_default();
        self.insert(&host, Arc::new(Layer::new(spec, self.0.pauses.clone())));
    }

    fn insert(&self, host: &str, layer: Arc<Layer>) {
        let mut state = locked(&self.0.state);
        let State { queue, lines, .. } = &mut *state;
        let line = *lines.entry(host.to_owned()).or_insert_with(|| queue.line());
        queue.add(layer.number, line);
        state.layers.insert(layer.number, layer);
    }

    /// Another place to fetch a layer from.
    pub fn add_source(&self, layer: u32, source: Arc<dyn Source>) {
        if let Some(layer) = self.0.layer(layer) {
            layer.add_source(source);
        }
    }

    /// Forgets a layer. Nothing is reported about it any more.
    pub fn remove(&self, layer: u32) {
        let mut state = locked(&self.0.state);
        state.layers.remove(&layer);
        state.misses.of_layer(layer);
        state.feeding.remove(&layer);
        state.streams.remove(&layer);
        state.frames.retain(|key, _| key.0 != layer);
        state.queue.remove(layer);
    }

    /// The counters of a layer.
    pub fn stats(&self, layer: u32) -> Option<Arc<LayerStats>> {
        self.0.layer(layer).map(|l| l.stats.clone())
    }

    /// The round trip to a host as others measured it, for example with the first request for a
    /// table of contents.
    pub fn round_trip(&self, host: &str, rtt: Duration) {
        let mut state = locked(&self.0.state);
        let State { queue, lines, .. } = &mut *state;
        let line = *lines.entry(host.to_owned()).or_insert_with(|| queue.line());
        queue.round_trip(line, rtt);
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
                background::bring(self.0.clone(), found, receiver, whole),
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
        let read = background::consume(self.0.clone(), layer.clone(), receiver, whole).await;
        let gone = || Err(environment("the blob is not pulled any more".to_owned()));
        (layer.stats.read(), read.unwrap_or_else(gone))
    }

    /// Bytes of answers that are in memory or on their way.
    pub fn in_flight(&self) -> u64 {
        locked(&self.0.state).queue.reserved()
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

    fn chunk_at(&self, _: u64) -> Result<Option<ChunkStart>, Fault> {
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

impl Drop for Shared {
    fn drop(&mut self) {
        self.wake.notify_one();
    }
}

/// Acts when it is time, though nothing happens.
async fn timer(shared: Weak<Shared>, wake: Arc<Notify>) {
    loop {
        let Some(now) = shared.upgrade() else { return };
        let next = now.tick();
        let at = next.map(|t| now.origin + t);
        drop(now);
        match at {
            Some(at) => tokio::select! {
                () = wake.notified() => {}
                () = tokio::time::sleep_until(at) => {}
            },
            None => wake.notified().await,
        }
    }
}

impl State {
    /// A frame is there, or is given up.
    fn forget(&mut self, key: FrameKey) {
        self.queue.forget(key);
        self.frames.remove(&key);
    }

    /// Nobody waits for a frame any more.
    fn cancel(&mut self, key: FrameKey) {
        self.queue.cancel(key);
        match self.queue.wanted(key) {
            Some(_) => self.queue.restart(key),
            None => drop(self.frames.remove(&key)),
        }
    }
}

impl Shared {
    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut locked(&self.state))
    }

    fn layer(&self, number: u32) -> Option<Arc<Layer>> {
        locked(&self.state).layers.get(&number).cloned()
    }

    pub(crate) fn report(&self, event: Event) {
        // Nobody may listen any more.
        let _ = self.events.send(event);
    }

    /// Blocks became good.
    pub(crate) fn good(&self, layer: u32, good: Good) {
        if !good.is_empty() {
            self.report(Event::Progress { layer, good });
        }
    }

    /// The background made blocks good, which somebody may wait for.
    fn brought(&self, layer: u32, good: Good) {
        self.good(layer, good);
        let Some(layer) = self.layer(layer) else { return };
        let waited: Vec<Frame> = self.with(|s| {
            let frames = s.misses.frames(layer.number);
            frames.filter_map(|at| s.frames.get(&(layer.number, at)).cloned()).collect()
        });
        for frame in waited.iter().filter(|frame| !layer.target.is_missing(frame)) {
            self.frame_done(&layer, frame.offset);
        }
    }

    /// Lets what has waited long enough fail; when to be called again.
    fn tick(self: &Arc<Self>) -> Option<Duration> {
        let now = self.now();
        let (expired, unwanted) = self.with(|s| s.misses.expired(now));
        self.fail(expired, unwanted, None);
        self.pump();
        self.with(|s| s.timer)
    }

    /// Reports misses that failed.
    fn fail(&self, misses: Vec<Miss>, unwanted: Vec<FrameKey>, fault: Option<&Fault>) {
        self.with(|s| {
            for key in unwanted {
                if s.queue.wanted(key) == Some(Class::Demand) {
                    s.cancel(key);
                }
            }
        });
        for miss in misses {
            let Some(layer) = self.layer(miss.layer) else { continue };
            let fault = fault.cloned().unwrap_or_else(|| {
                let waited = self.now().saturating_sub(miss.since);
                let late = format!("the layer's data did not come within {waited:.0?}");
                match layer.stats.last_error() {
                    Some(last) => last.context(late),
                    None => Fault::new(Code::DeadlineExceeded, late),
                }
            });
            layer.stats.miss_failed();
            miss.span.record("otel.status_code", "ERROR");
            miss.span.record("otel.status_description", tracing::field::display(&fault));
            self.report(Event::Failed { layer: miss.layer, blocks: miss.blocks, fault });
        }
    }

    /// Sends what is to be sent now.
    pub(crate) fn pump(self: &Arc<Self>) {
        self.feed();
        let now = self.now();
        let (orders, earlier) = self.with(|s| {
            let orders: Vec<_> = s
                .queue
                .poll(now)
                .into_iter()
                .map(|order| (s.layers.get(&order.layer).cloned(), order))
                .collect();
            let next = [s.queue.next_time(now), s.misses.next_time()].into_iter().flatten().min();
            let earlier = next.is_some_and(|next| s.timer.is_none_or(|timer| next < timer));
            s.timer = next;
            (orders, earlier)
        });
        if earlier {
            self.wake.notify_one();
        }
        for (layer, order) in orders {
            match layer {
                Some(layer) if order.class == Class::Background => {
                    shipway_task::spawn(
                        "fetch ahead",
                        background::fetch(self.clone(), layer, order),
                    );
                }
                Some(layer) => drop(shipway_task::spawn("fetch", self.clone().run(layer, order))),
                None => self.with(|s| s.queue.end(order.no)),
            }
        }
    }

    /// Puts more of the profiles into the queue.
    fn feed(self: &Arc<Self>) {
        let hungry: Vec<Arc<Layer>> = self.with(|s| {
            let hungry = |n: &&u32| s.queue.waiting(**n, Class::Learned) < FED;
            let numbers = s.feeding.iter().filter(hungry);
            numbers.filter_map(|number| s.layers.get(number).cloned()).collect()
        });
        for layer in hungry {
            let pieces: Vec<Range<u64>> = {
                let mut ahead = locked(&layer.ahead);
                if ahead.feeding {
                    continue;
                }
                let count = ahead.learned.len().min(FEED);
                ahead.feeding = count > 0;
                ahead.learned.drain(..count).collect()
            };
            if pieces.is_empty() {
                self.with(|s| s.feeding.remove(&layer.number));
                continue;
            }
            let this = self.clone();
            shipway_task::spawn("queue what was learned", async move {
                this.prefetch(&layer, pieces, Class::Learned, u64::MAX).await;
                locked(&layer.ahead).feeding = false;
                this.pump();
            });
        }
    }

    /// Wants what is missing of some blocks, in order, up to so many bytes; gives where the frames
    /// begin.
    async fn prefetch(
        &self,
        layer: &Arc<Layer>,
        pieces: Vec<Range<u64>>,
        class: Class,
        most: u64,
    ) -> Vec<u64> {
        let target = layer.target.clone();
        let look = move || {
            let (mut good, mut frames) = (Vec::new(), Vec::new());
            for blocks in pieces {
                good.push(target.verify(blocks.clone())?);
                frames.extend(target.frames(blocks)?);
            }
            Ok((good, frames))
        };
        match shipway_task::blocking("read a layer's data", look).await {
            Ok((good, frames)) => {
                good.into_iter().for_each(|good| self.good(layer.number, good));
                let mut left = most;
                let frames = frames.into_iter().take_while(|f| {
                    let fits = f.len <= left;
                    left = left.saturating_sub(f.len);
                    fits
                });
                let frames: Vec<Frame> = frames.collect();
                let starts = frames.iter().map(|f| f.offset).collect();
                self.want(layer, frames, class);
                starts
            }
            Err(fault) => {
                layer.stats.error(&fault);
                Vec::new()
            }
        }
    }

    /// Puts frames into the queue.
    fn want(&self, layer: &Layer, frames: impl IntoIterator<Item = Frame>, class: Class) {
        self.with(|s| {
            for frame in frames {
                let (key, range) =
                    ((layer.number, frame.offset), frame.offset..frame.offset + frame.len);
                s.queue.want(layer.number, range, class);
                if s.queue.wanted(key).is_some() {
                    s.frames.entry(key).or_insert(frame);
                }
            }
            if class == Class::Ahead {
                for key in s.queue.trim(layer.number, class, MAX_AHEAD) {
                    s.frames.remove(&key);
                }
            }
        });
    }

    /// Serves a miss: what is on the disk, then what has to be fetched, then what may be next.
    async fn demand(
        self: Arc<Self>,
        layer: Arc<Layer>,
        blocks: Range<u64>,
        since: Duration,
        span: Span,
    ) {
        let (target, wanted) = (layer.target.clone(), blocks.clone());
        let look = move || {
            let mut looks = 0;
            loop {
                let good = target.verify(wanted.clone())?;
                if good.has(&wanted) {
                    return Ok((good, Vec::new()));
                }
                let frames = target.frames(wanted.clone())?;
                looks += 1;
                // Others may have written the last ones between the two.
                if !frames.is_empty() || looks == LOOKS {
                    return Ok((good, frames));
                }
            }
        };
        let (good, frames) = match shipway_task::blocking("read a layer's data", look).await {
            Ok(found) => found,
            Err(fault) => return self.refuse(&layer, blocks, fault),
        };
        let now = self.now();
        let is_good = good.has(&blocks);
        if is_good {
            layer.stats.found((blocks.end - blocks.start) * DATA_BLOCK);
            layer.stats.served(now.saturating_sub(since));
        } else if frames.is_empty() {
            let fault = Fault::internal(format!("nothing is known of the blocks {blocks:?}"));
            return self.refuse(&layer, blocks, fault);
        }
        self.good(layer.number, good);
        let times = (since, since + self.settings.deadline);
        self.with(|s| {
            s.last_miss = Some(now);
            s.queue.quiet_until(now + self.settings.quiet);
            if !is_good {
                let waited_for = frames.iter().map(|f| f.offset);
                span.in_scope(|| s.misses.add(layer.number, blocks.clone(), waited_for, times));
            }
        });
        drop(span);
        self.want(&layer, frames, Class::Demand);
        self.pump();
        if !self.is_learned(&layer) && !self.read(&layer, blocks.start).await {
            self.window(&layer, &blocks).await;
        }
        self.pump();
    }

    fn refuse(&self, layer: &Layer, blocks: Range<u64>, fault: Fault) {
        layer.stats.error(&fault);
        layer.stats.miss_failed();
        self.report(Event::Failed { layer: layer.number, blocks, fault });
    }

    /// Whether it is known what will be read, so that nothing is guessed: as long as it comes.
    fn is_learned(&self, layer: &Layer) -> bool {
        self.with(|s| {
            s.feeding.contains(&layer.number) || s.queue.waiting(layer.number, Class::Learned) > 0
        })
    }

    /// Reads ahead around what was missed.
    async fn window(&self, layer: &Arc<Layer>, missed: &Range<u64>) {
        let Some(spans) = layer.spans.clone().filter(|_| self.settings.window) else { return };
        let usual = self.with(|s| s.queue.bdp(layer.number)).clamp(WINDOW.start, WINDOW.end);
        let bytes = locked(&layer.ahead).windows.length(usual);
        if bytes == 0 {
            return;
        }
        let missed = missed.clone();
        let look = move || Ok(readahead::window(&missed, &spans(missed.start), bytes / DATA_BLOCK));
        if let Ok(pieces) = shipway_task::blocking("read a layer's data", look).await {
            let frames =
                self.prefetch(layer, pieces, Class::Ahead, 2 * bytes.max(WINDOW.end)).await;
            locked(&layer.ahead).windows.fetched(frames);
        }
    }

    /// A block was read, whether it was missed or not: follows strides. Whether they are so regular
    /// that nothing else need be guessed.
    async fn read(&self, layer: &Arc<Layer>, block: u64) -> bool {
        let target = layer.target.clone();
        let look = move || target.chunk_at(block);
        let chunk = shipway_task::blocking("read a layer's data", look).await;
        let Ok(Some(chunk)) = chunk else { return false };
        let (expected, sure) = {
            let mut ahead = locked(&layer.ahead);
            ahead.windows.read(chunk.frame);
            match self.settings.strides {
                true => (ahead.deltas.access(chunk.block), ahead.deltas.is_sure()),
                false => (Vec::new(), false),
            }
        };
        if !expected.is_empty() {
            let pieces = expected.into_iter().map(|at| at..at.saturating_add(1)).collect();
            self.prefetch(layer, pieces, Class::Ahead, MAX_STRIDES).await;
        }
        sure
    }

    /// A frame is good.
    fn frame_done(&self, layer: &Layer, offset: u64) {
        let key = (layer.number, offset);
        let now = self.now();
        let served = self.with(|s| {
            s.forget(key);
            s.misses.done(key)
        });
        for miss in served {
            layer.stats.served(now.saturating_sub(miss.since));
        }
    }

    /// Carries a request out.
    async fn run(self: Arc<Self>, layer: Arc<Layer>, order: Order) {
        let frames: Vec<Frame> = self.with(|s| {
            let key = |at: &u64| (layer.number, *at);
            order.frames.iter().filter_map(|at| s.frames.get(&key(at)).cloned()).collect()
        });
        // The background may have brought some in the meantime.
        let (frames, there): (Vec<_>, Vec<_>) =
            frames.into_iter().partition(|f| layer.target.is_missing(f));
        for frame in there {
            self.frame_done(&layer, frame.offset);
        }
        let failed = match frames.is_empty() {
            true => Vec::new(),
            false => self.fetch(&layer, &order, frames).await,
        };
        self.with(|s| s.queue.end(order.no));
        for (offset, trouble) in failed {
            self.settle(&layer, offset, trouble);
        }
        self.pump();
    }

    /// Gets frames; gives those that did not come.
    async fn fetch(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        order: &Order,
        frames: Vec<Frame>,
    ) -> Vec<(u64, Trouble)> {
        let start = frames.first().map_or(0, |f| f.offset);
        let end = frames.iter().map(|f| f.offset + f.len).max().unwrap_or(start);
        let mut assembler = Assembler::default();
        assembler.expect(frames);
        let mut checks = JoinSet::new();
        let (mut source, mut trouble) = (0, None);
        match self.open(layer, order, start..end).await {
            Err((no, error)) => trouble = Some((no, error)),
            Ok((no, mut reading)) => {
                source = no;
                loop {
                    match reading.next().await {
                        Ok(Some((at, piece))) => {
                            layer.stats.received(piece.len() as u64, false);
                            let now = self.now();
                            self.with(|s| s.queue.arrived(order.no, piece.len() as u64, now));
                            for (frame, bytes) in assembler.feed(at, &piece) {
                                checks.spawn(self.clone().write(layer.clone(), frame, bytes));
                            }
                            // The line may have room for others.
                            self.pump();
                        }
                        Ok(None) => {
                            layer.succeeded(source);
                            break;
                        }
                        Err(error) => {
                            trouble = Some((source, error));
                            break;
                        }
                    }
                }
            }
        }
        let mut failed = Vec::new();
        while let Some(checked) = checks.join_next().await {
            match checked {
                Ok((offset, Ok(()))) => self.frame_done(layer, offset),
                Ok((offset, Err(WriteError::Wrong(fault)))) => {
                    failed.push((offset, Trouble::Wrong(source, fault)));
                }
                Ok((offset, Err(WriteError::Failed(fault)))) => {
                    failed.push((offset, Trouble::Disk(fault)));
                }
                Err(e) => tracing::error!(error = %e, "writing a layer's data ended early"),
            }
        }
        // Also those that were being written when that ended early.
        let unknown = |offset: &u64| {
            self.with(|s| s.queue.wanted((layer.number, *offset)).is_some())
                && !failed.iter().any(|(at, _)| at == offset)
        };
        let left: Vec<u64> = order.frames.iter().copied().filter(unknown).collect();
        for offset in left {
            let (no, error) = trouble.clone().unwrap_or_else(|| {
                let fault = Fault::internal("writing a layer's data ended early");
                (source, SourceError::new(Hope::Soon, fault))
            });
            failed.push((offset, Trouble::Source(no, error)));
        }
        failed
    }

    /// Begins to read; for those who wait, a second source is asked when the first one is silent.
    pub(crate) async fn open(
        self: &Arc<Self>,
        layer: &Layer,
        order: &Order,
        wanted: Range<u64>,
    ) -> Result<(usize, Reading), (usize, SourceError)> {
        let picked = layer.pick(order.tried.avoid, self.now());
        let (no, source) = picked.map_err(|opens| match opens {
            Some(pause) => {
                let fault = environment("the registry wants to be left alone".to_owned());
                (0, SourceError::new(Hope::After(pause), layer.stats.last_error().unwrap_or(fault)))
            }
            None => {
                let fault = environment("the layer has no source".to_owned());
                (0, SourceError::new(Hope::Elsewhere, fault))
            }
        })?;
        layer.stats.request(order.tried.tries > 1);
        let ask = |no: usize, source: Arc<dyn Source>| {
            let (wanted, fresh) = (Wanted::Range(wanted.clone()), order.tried.fresh);
            let (blob, settings) = (layer.blob, self.settings.clone());
            async move {
                let blob = (blob.digest, Some(blob.size));
                match read::open(&*source, blob, wanted, fresh, &settings).await {
                    Ok(opened) => Ok((no, opened)),
                    Err(error) => Err((no, error)),
                }
            }
        };
        let (no, opened) = match self.hedge(layer, order, no) {
            None => ask(no, source).await?,
            Some((after, other, second)) => {
                race(ask(no, source), async {
                    tokio::time::sleep(after).await;
                    // A few at a time: it must not become a second flood.
                    let Ok(_permit) = self.hedges.try_acquire() else {
                        return std::future::pending().await;
                    };
                    layer.stats.request(true);
                    ask(other, second).await
                })
                .await?
            }
        };
        let now = self.now();
        self.with(|s| s.queue.first_byte(order.no, now));
        let reading = Reading::new(opened, wanted, &self.settings).map_err(|e| (no, e))?;
        Ok((no, reading))
    }

    /// When to ask whom else.
    fn hedge(
        &self,
        layer: &Layer,
        order: &Order,
        first: usize,
    ) -> Option<(Duration, usize, Arc<dyn Source>)> {
        if order.class != Class::Demand {
            return None;
        }
        let usual = self.with(|s| s.queue.usual(order.no))?;
        let (other, source) = layer.pick(Some(first), self.now()).ok()?;
        Some(((usual * HEDGE).max(MIN_HEDGE), other, source))
    }

    /// Decompresses a frame, compares it and writes it.
    async fn write(
        self: Arc<Self>,
        layer: Arc<Layer>,
        frame: Frame,
        bytes: Vec<u8>,
    ) -> (u64, Result<(), WriteError>) {
        let offset = frame.offset;
        let _permit = self.checks.acquire().await;
        let this = self.clone();
        let work = shipway_task::blocking("write a layer's data", move || {
            let number = layer.number;
            Ok(layer.target.write(&frame, &bytes, &mut |good| this.good(number, good)))
        });
        (offset, work.await.unwrap_or_else(|fault| Err(WriteError::Failed(fault))))
    }

    /// Decides what becomes of a frame that did not come.
    fn settle(&self, layer: &Layer, offset: u64, trouble: Trouble) {
        let key = (layer.number, offset);
        let now = self.now();
        let sources = layer.sources() as u32;
        let mut tried = self.with(|s| s.queue.tried(key));
        tried.tries = tried.tries.max(1);
        let (source, hope, fault) = match trouble {
            Trouble::Disk(fault) => (None, Hope::Elsewhere, fault),
            Trouble::Wrong(source, fault) => {
                layer.stats.wrong_bytes();
                tried.fresh = true;
                (Some(source), Hope::Soon, fault)
            }
            Trouble::Source(source, SourceError { hope, fault }) => (Some(source), hope, fault),
        };
        tried.avoid = source;
        tried.refused = if hope == Hope::Elsewhere { tried.refused + 1 } else { 0 };
        // All sources get a second chance.
        let hopeless = source.is_none() || tried.refused >= 2 * sources;
        tracing::debug!(layer = layer.number, offset, %fault, tries = tried.tries, "not fetched");
        layer.stats.error(&fault);
        let given_up = self.with(|s| {
            let waits = s.misses.wait_for(key);
            if hopeless || !waits && tried.tries >= QUIET_TRIES {
                s.forget(key);
                return Some(s.misses.failed(key));
            }
            if !waits && s.queue.wanted(key) == Some(Class::Demand) {
                s.forget(key);
                return None;
            }
            let pause = hope.pause(s.backoff.pause(tried.tries));
            if let Some(source) = source {
                layer.failed(source, now, hope, pause);
            }
            // With another source there is no reason to wait.
            let soon = tried.tries < sources;
            s.queue.again(key, if soon { now } else { now + pause }, tried);
            None
        });
        if let Some((misses, unwanted)) = given_up {
            self.fail(misses, unwanted, Some(&fault));
        }
    }
}

/// The first good answer; the first one's error if there is none.
async fn race(
    first: impl Future<Output = Result<(usize, Opened), (usize, SourceError)>>,
    second: impl Future<Output = Result<(usize, Opened), (usize, SourceError)>>,
) -> Result<(usize, Opened), (usize, SourceError)> {
    let (mut first, mut second) = (std::pin::pin!(first), std::pin::pin!(second));
    tokio::select! {
        biased;
        // What fails at once is not worth a second request: it is asked for again as usual.
        answer = &mut first => answer,
        answer = &mut second => match answer {
            Ok(answer) => Ok(answer),
            Err(_) => first.await,
        },
    }
}
