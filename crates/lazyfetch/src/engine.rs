//! The engine: turns misses into requests and answers into good blocks. What is asked for and when
//! is the queue's business; this is the I/O around it.

use crate::{
    Hope, Opened, Settings, Source, SourceError, Wanted, WriteError,
    assemble::Assembler,
    background::{Ended, Parts},
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
const FED: usize = 16;
/// Looks at blocks of which nothing is missing and which are not good, as others write them.
const LOOKS: u32 = 4;
/// Pieces of a profile that are looked at together.
const FEED: usize = 16;
/// Tries for what nobody waits for.
const QUIET_TRIES: u32 = 3;
/// A second request is sent when the first has been silent for so many times the usual.
const HEDGE: u32 = 3;
const MIN_HEDGE: Duration = Duration::from_millis(100);
/// Second requests at once.
const MAX_HEDGES: usize = 2;
/// The window around a missed file.
const WINDOW: Range<u64> = 128 << 10..1 << 20;
/// Frames of a layer that wait to be read ahead; those that are older than so many are stale.
const MAX_AHEAD: usize = 256;
/// A chunk so many times as long as those that were read is not what a stride leads to.
const MUCH_LONGER: u64 = 4;
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

/// The engine, as its tasks share it.
pub(crate) struct Shared {
    pub settings: Settings,
    events: mpsc::UnboundedSender<Event>,
    origin: Instant,
    state: Mutex<State>,
    /// Tells the timer that there is an earlier time.
    wake: Arc<Notify>,
    checks: Semaphore,
    hedges: Semaphore,
    pub pauses: Arc<Pauses>,
}

/// What it knows at the moment.
pub(crate) struct State {
    pub queue: Queue,
    pub misses: Misses,
    lines: HashMap<String, LineNo>,
    pub layers: HashMap<u32, Arc<Layer>>,
    /// Layers whose profile is not all in the queue.
    pub feeding: BTreeSet<u32>,
    /// Blobs that the background reads.
    pub streams: HashMap<u32, Parts>,
    /// Number of the next blob that is pulled. Those of layers count up, these down.
    pub next_pull: u32,
    /// What is in the queue.
    pub frames: HashMap<FrameKey, Frame>,
    backoff: Backoff,
    pub last_miss: Option<Duration>,
    timer: Option<Duration>,
}

/// Why a frame did not come.
enum Trouble {
    Source(usize, SourceError),
    Wrong(usize, Fault),
    Disk(Fault),
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
    /// The line to a host.
    pub(crate) fn line(&mut self, host: &str) -> LineNo {
        let Self { queue, lines, .. } = self;
        *lines.entry(host.to_owned()).or_insert_with(|| queue.line())
    }

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
    /// An engine, and what it reports.
    pub(crate) fn new(settings: Settings) -> (Arc<Self>, mpsc::UnboundedReceiver<Event>) {
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
        let shared = Arc::new(Self {
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
        (shared, receiver)
    }

    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut locked(&self.state))
    }

    pub(crate) fn layer(&self, number: u32) -> Option<Arc<Layer>> {
        locked(&self.state).layers.get(&number).cloned()
    }

    pub(crate) fn report(&self, event: Event) {
        // Nobody may listen any more.
        let _ = self.events.send(event);
    }

    /// Blocks became good.
    fn good(&self, layer: u32, good: Good) {
        if !good.is_empty() {
            self.report(Event::Progress { layer, good });
        }
    }

    /// The background made blocks good, which somebody may wait for.
    pub(crate) fn brought(&self, layer: u32, good: Good) {
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
                    shipway_task::spawn("fetch ahead", self.clone().stream(layer, order));
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
    pub(crate) async fn prefetch(
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
    pub(crate) async fn demand(
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
    pub(crate) fn is_learned(&self, layer: &Layer) -> bool {
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
    pub(crate) async fn read(&self, layer: &Arc<Layer>, block: u64) -> bool {
        let target = layer.target.clone();
        let look = move || target.chunk_at(block);
        let chunk = shipway_task::blocking("read a layer's data", look).await;
        let Ok(Some(chunk)) = chunk else { return false };
        let (expected, sure, longest) = {
            let mut ahead = locked(&layer.ahead);
            ahead.windows.read(chunk.frame);
            let length = chunk.blocks.end - chunk.blocks.start;
            ahead.longest = length.max(ahead.longest - ahead.longest / 8);
            match self.settings.strides {
                true => {
                    let expected = ahead.deltas.access(chunk.blocks.start);
                    (expected, ahead.deltas.is_sure(), ahead.longest)
                }
                false => (Vec::new(), false, 0),
            }
        };
        if !expected.is_empty() {
            let pieces = self.of_like_length(layer, longest, expected).await;
            self.prefetch(layer, pieces, Class::Ahead, MAX_STRIDES).await;
        }
        sure
    }

    /// Those of some blocks that are of chunks not much longer than `longest`: a stride ends with
    /// the files that it leads along, and what it would hit beyond may be of any length.
    async fn of_like_length(
        &self,
        layer: &Layer,
        longest: u64,
        blocks: Vec<u64>,
    ) -> Vec<Range<u64>> {
        let target = layer.target.clone();
        let look = move || {
            let mut pieces = Vec::with_capacity(blocks.len());
            for block in blocks {
                if let Some(chunk) = target.chunk_at(block)?
                    && chunk.blocks.end - chunk.blocks.start <= longest.saturating_mul(MUCH_LONGER)
                {
                    pieces.push(block..block.saturating_add(1));
                }
            }
            Ok(pieces)
        };
        shipway_task::blocking("read a layer's data", look).await.unwrap_or_default()
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

    /// Carries a request of the background out.
    async fn stream(self: Arc<Self>, layer: Arc<Layer>, order: Order) {
        let mut pieces = Vec::new();
        let outcome = match self.open(&layer, &order, order.range.clone()).await {
            Err(failed) => Err(failed),
            Ok((source, mut reading)) => loop {
                match reading.next().await {
                    Ok(Some((_, piece))) => {
                        let now = self.now();
                        layer.stats.received(piece.len() as u64, true);
                        self.with(|s| s.queue.arrived(order.no, piece.len() as u64, now));
                        pieces.push(piece);
                        self.pump();
                    }
                    Ok(None) => {
                        layer.succeeded(source);
                        break Ok(());
                    }
                    Err(error) => break Err((source, error)),
                }
            },
        };
        let now = self.now();
        self.with(|State { queue, streams, backoff, .. }| {
            queue.end(order.no);
            match streams.get(&layer.number) {
                Some(parts) => {
                    let request = Ended { layer: &layer, order: &order, pieces, outcome };
                    request.settle(parts, queue, backoff, now);
                }
                None => queue.consumed(layer.number, order.range.end - order.range.start),
            }
        });
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
    async fn open(
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
