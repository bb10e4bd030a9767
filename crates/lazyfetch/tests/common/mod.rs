//! A layer in memory, and a network with a round trip and a bandwidth, in virtual time.

#![allow(dead_code, clippy::unwrap_used)]

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use shipway_estargz::Record;
use shipway_fault::{Code, Fault};
use shipway_layerstore::{Chunk, ChunkId, Frame, Good};
use shipway_lazyfetch::{
    Blob, Body, ChunkPlace, Event, Fetcher, Hope, LayerSpec, Opened, Report, Settings, Source,
    SourceError, Target, Wanted, Whole, WriteError,
};
use shipway_oci::{Digest, Hasher};
use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until},
};

pub const MS: Duration = Duration::from_millis(1);
pub const BLOCK: u64 = 4096;

/// A small generator of numbers (xorshift).
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A blob, and where everything of it goes.
pub struct Layer {
    pub number: u32,
    pub blob: Vec<u8>,
    pub digest: Digest,
    pub data: Vec<u8>,
    pub frames: Vec<Frame>,
    state: Mutex<Written>,
    /// Fails writes.
    pub disk_full: AtomicBool,
    /// What was on the disk before the boot.
    pub claimed: Mutex<Option<Vec<u8>>>,
}

struct Written {
    /// Chunks of each block that were not written.
    left: Vec<u32>,
    times: Vec<u32>,
    chunks: Vec<bool>,
}

const NOISE: usize = 4 << 20;

/// How a layer is made.
pub struct Plan {
    pub number: u32,
    /// Lengths of files, each in a frame of its own if it is not longer than `chunk`.
    pub files: Vec<u64>,
    pub chunk: u64,
    /// Chunks in a frame.
    pub packed: usize,
    /// Bytes of nothing between frames.
    pub gap: u64,
}

impl Plan {
    pub fn files(number: u32, files: impl IntoIterator<Item = u64>) -> Self {
        let files = files.into_iter().collect();
        Self { number, files, chunk: 4 << 20, packed: 1, gap: 0 }
    }

    pub fn build(self) -> Arc<Layer> {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ u64::from(self.number + 1));
        // Not compressible, and quickly made.
        let noise: Vec<u8> = (0..NOISE / 8).flat_map(|_| dice.next().to_le_bytes()).collect();
        let (mut data, mut records) = (Vec::new(), Vec::new());
        for file in &self.files {
            data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
            let mut at = 0;
            while at < *file {
                let size = self.chunk.min(file - at);
                let start = data.len();
                while data.len() < start + size as usize {
                    let from = dice.next() as usize % NOISE;
                    let length = (NOISE - from).min(start + size as usize - data.len());
                    data.extend_from_slice(&noise[from..from + length]);
                }
                records.push((start as u64, size, Digest::of(&data[start..])));
                at += size;
            }
        }
        data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        let (mut blob, mut frames, mut next) = (Vec::new(), Vec::new(), 0);
        for chunks in records.chunks(self.packed) {
            let offset = blob.len() as u64;
            let (mut inner, mut of_frame, mut plain) = (0, Vec::new(), Vec::new());
            for (start, size, digest) in chunks {
                plain.extend_from_slice(&data[*start as usize..][..*size as usize]);
                of_frame.push(Record {
                    data: *start,
                    size: *size,
                    offset,
                    compressed: 0,
                    inner,
                    digest: Some(*digest),
                });
                inner += *size as u32;
            }
            blob.extend(zstd::bulk::compress(&plain, 1).unwrap());
            let len = blob.len() as u64 - offset;
            let number = |mut record: Record| {
                record.compressed = len as u32;
                next += 1;
                Chunk { id: ChunkId(next - 1), record }
            };
            let chunks = of_frame.into_iter().map(number).collect();
            frames.push(Frame { offset, len, chunks });
            blob.resize(blob.len() + self.gap as usize, 0);
        }
        let mut left = vec![0; data.len() / BLOCK as usize];
        for chunk in frames.iter().flat_map(|f: &Frame| &f.chunks) {
            chunk.blocks().for_each(|b| left[b as usize] += 1);
        }
        let state =
            Written { times: vec![0; left.len()], left, chunks: vec![false; next as usize] };
        Arc::new(Layer {
            number: self.number,
            digest: Digest::of(&blob),
            blob,
            data,
            frames,
            state: Mutex::new(state),
            disk_full: AtomicBool::new(false),
            claimed: Mutex::default(),
        })
    }
}

impl Layer {
    pub fn blocks(&self) -> u64 {
        self.data.len() as u64 / BLOCK
    }

    /// Blocks of the `n`-th frame.
    pub fn blocks_of_frame(&self, n: usize) -> Range<u64> {
        let chunks = &self.frames[n].chunks;
        chunks[0].blocks().start..chunks.last().unwrap().blocks().end
    }

    /// Whether blocks are good.
    pub fn is_good(&self, mut blocks: Range<u64>) -> bool {
        let state = self.state.lock();
        blocks.all(|b| state.left[b as usize] == 0)
    }

    /// Times that the block was written.
    pub fn written(&self, block: u64) -> u32 {
        self.state.lock().times[block as usize]
    }

    pub fn spec(self: &Arc<Self>, sources: Vec<Arc<dyn Source>>) -> LayerSpec {
        LayerSpec { target: self.clone(), sources, spans: None }
    }

    fn put(&self, chunk: &Chunk, data: &[u8]) -> Good {
        let mut state = self.state.lock();
        let record = &chunk.record;
        let right = &self.data[record.data as usize..][..record.size as usize];
        assert!(data == right, "wrong bytes are written");
        let mut good = Vec::new();
        if !std::mem::replace(&mut state.chunks[chunk.id.0 as usize], true) {
            for block in chunk.blocks() {
                state.times[block as usize] += 1;
                state.left[block as usize] -= 1;
                if state.left[block as usize] == 0 {
                    good.push(block..block + 1);
                }
            }
        }
        Good::unheld(good)
    }

    fn runs(&self, blocks: Range<u64>, good: bool) -> Vec<Range<u64>> {
        let state = self.state.lock();
        let end = blocks.end.min(state.left.len() as u64);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for block in (blocks.start..end).filter(|b| (state.left[*b as usize] == 0) == good) {
            match ranges.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => ranges.push(block..block + 1),
            }
        }
        ranges
    }

    /// Frames with something of some blocks.
    fn touching(&self, blocks: Range<u64>) -> impl Iterator<Item = &Frame> {
        let touches = move |chunk: &Chunk| {
            let of = chunk.blocks();
            of.start < blocks.end && blocks.start < of.end
        };
        self.frames.iter().filter(move |f| f.chunks.iter().any(&touches))
    }
}

impl Target for Layer {
    fn number(&self) -> u32 {
        self.number
    }

    fn blob(&self) -> Blob {
        Blob { digest: self.digest, size: self.blob.len() as u64 }
    }

    fn verify(&self, blocks: Range<u64>) -> Result<Good, Fault> {
        if let Some(claimed) = &*self.claimed.lock() {
            for chunk in self.touching(blocks.clone()).flat_map(|f| &f.chunks) {
                let data = &claimed[chunk.record.data as usize..][..chunk.record.size as usize];
                if chunk.record.digest == Some(Digest::of(data)) {
                    let _told_below = self.put(chunk, data);
                }
            }
        }
        Ok(Good::unheld(self.runs(blocks, true)))
    }

    fn frames(&self, blocks: Range<u64>) -> Result<Vec<Frame>, Fault> {
        Ok(self.touching(blocks).filter(|f| self.is_missing(f)).cloned().collect())
    }

    fn is_missing(&self, frame: &Frame) -> bool {
        let state = self.state.lock();
        frame.chunks.iter().any(|chunk| !state.chunks[chunk.id.0 as usize])
    }

    fn write(
        &self,
        frame: &Frame,
        compressed: &[u8],
        good: &mut dyn FnMut(Good),
    ) -> Result<(), WriteError> {
        if self.disk_full.load(SeqCst) {
            let fault = Fault::io("write", std::io::ErrorKind::StorageFull.into());
            return Err(WriteError::Failed(fault));
        }
        let wrong = |why: String| WriteError::Wrong(Fault::new(Code::DataLoss, why));
        let data =
            zstd::bulk::decompress(compressed, 64 << 20).map_err(|e| wrong(e.to_string()))?;
        for chunk in &frame.chunks {
            let bytes = data.get(chunk.record.inner as usize..).unwrap_or_default();
            let bytes = &bytes[..bytes.len().min(chunk.record.size as usize)];
            let (got, expected) = (Digest::of(bytes), chunk.record.digest.unwrap());
            if got != expected {
                return Err(wrong(format!("expected {expected}, got {got}")));
            }
            good(self.put(chunk, bytes));
        }
        Ok(())
    }

    fn chunk_at(&self, block: u64) -> Result<Option<ChunkPlace>, Fault> {
        let frame = self.touching(block..block + 1).next();
        let starts = frame.map(|f| (f.offset, f.chunks.iter().map(Chunk::blocks)));
        Ok(starts.and_then(|(frame, mut chunks)| {
            let blocks = chunks.find(|blocks| blocks.contains(&block))?;
            Some(ChunkPlace { blocks, frame })
        }))
    }

    fn before(&self, end: u64) -> Result<Range<u64>, Fault> {
        let count = self.frames.iter().filter(|f| f.offset < end).count();
        Ok(0..if count == 0 { 0 } else { self.blocks_of_frame(count - 1).end })
    }
}

/// How a network behaves.
#[derive(Clone, Copy)]
pub struct Way {
    pub rtt: Duration,
    /// Bytes per second.
    pub rate: f64,
    /// Whether answers share the line piece by piece, as connections do, or follow each other.
    pub fair: bool,
    /// For so long of each 150 ms nothing is read of what has come, as on a busy machine.
    pub busy: Duration,
}

impl Way {
    pub fn new(rtt_ms: u32, mb_per_s: u32) -> Self {
        let rate = f64::from(mb_per_s) * 1e6;
        Self { rtt: rtt_ms * MS, rate, fair: true, busy: Duration::ZERO }
    }
}

const PIECE: usize = 16 << 10;

type Answer = (VecDeque<Bytes>, mpsc::UnboundedSender<(Instant, Bytes)>);

/// A line that many answers share.
pub struct Link {
    way: Way,
    answers: mpsc::UnboundedSender<Answer>,
}

impl Link {
    pub fn new(way: Way) -> Arc<Self> {
        let (answers, mut receiver) = mpsc::unbounded_channel::<Answer>();
        shipway_task::spawn("test", async move {
            let mut active: VecDeque<Answer> = VecDeque::new();
            let start = Instant::now();
            let mut at = start;
            loop {
                if active.is_empty() {
                    let Some(answer) = receiver.recv().await else { return };
                    active.push_back(answer);
                    at = at.max(Instant::now());
                }
                while let Ok(answer) = receiver.try_recv() {
                    active.push_back(answer);
                }
                let Some((mut pieces, to)) = active.pop_front() else { continue };
                // Who went away gets no more.
                let Some(piece) = pieces.pop_front().filter(|_| !to.is_closed()) else { continue };
                at += Duration::from_secs_f64(piece.len() as f64 / way.rate);
                sleep_until(at).await;
                let mut seen = at + way.rtt / 2;
                let round = (seen - start).as_micros() as u64 % 150_000;
                seen += way.busy.saturating_sub(Duration::from_micros(round));
                let _ = to.send((seen, piece));
                match way.fair {
                    true => active.push_back((pieces, to)),
                    false => active.push_front((pieces, to)),
                }
            }
        });
        Arc::new(Self { way, answers })
    }

    fn send(&self, bytes: &[u8]) -> mpsc::UnboundedReceiver<(Instant, Bytes)> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let pieces = bytes.chunks(PIECE).map(Bytes::copy_from_slice).collect();
        let _ = self.answers.send((pieces, sender));
        receiver
    }
}

/// What a request gets.
#[derive(Clone)]
pub enum Reply {
    /// What it asked for.
    Right,
    /// The same with a wrong byte in the middle.
    Flipped,
    /// The same with the byte at this place of the blob wrong.
    FlippedAt(u64),
    /// Not more than so many bytes, and then the end.
    Short(usize),
    /// So many bytes and then nothing any more.
    Stall(usize),
    /// A byte each second.
    Drip,
    /// No answer.
    Hang,
    /// An answer after so long.
    Late(Duration),
    /// The whole blob, though a part was asked for.
    All,
    /// Bytes from elsewhere.
    Elsewhere,
    /// A refusal.
    Refuse(Hope),
    /// No connection.
    Down,
}

/// A request as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub range: Range<u64>,
    pub fresh: bool,
    pub at: Duration,
}

type Script = dyn Fn(usize, &Asked) -> Reply + Send + Sync;

/// A registry that has one blob.
pub struct Server {
    host: String,
    blob: Vec<u8>,
    digest: Digest,
    link: Arc<Link>,
    start: Instant,
    asked: Mutex<Vec<Asked>>,
    script: Box<Script>,
    open: AtomicUsize,
    pub most_open: AtomicUsize,
    pub warmed: AtomicUsize,
    pub sent: AtomicU64,
}

impl Server {
    pub fn new(
        host: &str,
        blob: &[u8],
        link: &Arc<Link>,
        script: impl Fn(usize, &Asked) -> Reply + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            host: host.into(),
            blob: blob.to_vec(),
            digest: Digest::of(blob),
            link: link.clone(),
            start: Instant::now(),
            asked: Mutex::default(),
            script: Box::new(script),
            open: AtomicUsize::new(0),
            most_open: AtomicUsize::new(0),
            warmed: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
        })
    }

    pub fn good(blob: &[u8], way: Way) -> Arc<Self> {
        Self::new("r.io", blob, &Link::new(way), |_, _| Reply::Right)
    }

    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }

    pub fn ranges(&self) -> Vec<Range<u64>> {
        self.asked().into_iter().map(|a| a.range).collect()
    }

    async fn answer(
        self: &Arc<Self>,
        range: Range<u64>,
        fresh: bool,
    ) -> Result<Opened, SourceError> {
        let fault = |what: &'static str| Fault::new(Code::Unavailable, what);
        let (number, asked) = {
            let mut all = self.asked.lock();
            let asked = Asked { range: range.clone(), fresh, at: self.start.elapsed() };
            all.push(asked.clone());
            (all.len() - 1, asked)
        };
        let reply = (self.script)(number, &asked);
        let half = self.link.way.rtt / 2;
        if let Reply::Down = reply {
            sleep(MS).await;
            return Err(SourceError::new(Hope::Soon, fault("failed to connect")));
        }
        sleep(half).await;
        let bytes =
            |range: Range<u64>| self.blob[range.start as usize..range.end as usize].to_vec();
        let (mut start, mut body, mut then) = (range.start, bytes(range.clone()), Then::End);
        match reply {
            Reply::Flipped => {
                let middle = body.len() / 2;
                body[middle] ^= 1;
            }
            Reply::FlippedAt(at) if range.contains(&at) => body[(at - range.start) as usize] ^= 1,
            Reply::Short(n) => body.truncate(n),
            Reply::Stall(n) => {
                body.truncate(n);
                then = Then::Nothing;
            }
            Reply::Drip => then = Then::Drip,
            Reply::Hang => std::future::pending().await,
            Reply::Late(time) => sleep(time).await,
            Reply::All => (start, body) = (0, self.blob.clone()),
            Reply::Elsewhere => start += 1,
            Reply::Refuse(hope) => {
                sleep(half).await;
                return Err(SourceError::new(hope, fault("refused")));
            }
            Reply::Right | Reply::FlippedAt(_) | Reply::Down => {}
        }
        self.sent.fetch_add(body.len() as u64, SeqCst);
        let mut pieces = if let Then::Drip = then {
            let (sender, receiver) = mpsc::unbounded_channel();
            shipway_task::spawn("test", async move {
                for byte in body {
                    sleep(Duration::from_secs(1)).await;
                    if sender.send((Instant::now(), Bytes::from(vec![byte]))).is_err() {
                        return;
                    }
                }
            });
            receiver
        } else {
            self.link.send(&body)
        };
        // The head comes with the first bytes.
        let first = pieces.recv().await;
        if let Some((at, _)) = &first {
            sleep_until(*at).await;
        }
        let open = self.open.fetch_add(1, SeqCst) + 1;
        self.most_open.fetch_max(open, SeqCst);
        let server = self.clone();
        let body = Pieces { first: first.map(|(_, piece)| piece), pieces, then, server };
        Ok(Opened { start, size: Some(self.blob.len() as u64), body: Box::new(body) })
    }
}

enum Then {
    End,
    Nothing,
    Drip,
}

struct Pieces {
    first: Option<Bytes>,
    pieces: mpsc::UnboundedReceiver<(Instant, Bytes)>,
    then: Then,
    server: Arc<Server>,
}

impl Drop for Pieces {
    fn drop(&mut self) {
        self.server.open.fetch_sub(1, SeqCst);
    }
}

#[async_trait]
impl Body for Pieces {
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        match self.pieces.recv().await {
            Some((at, piece)) => {
                sleep_until(at).await;
                Ok(Some(piece))
            }
            None if matches!(self.then, Then::Nothing) => std::future::pending().await,
            None => Ok(None),
        }
    }
}

/// A source that is a server.
pub struct At(pub Arc<Server>);

#[async_trait]
impl Source for At {
    fn host(&self) -> &str {
        &self.0.host
    }

    async fn open(
        &self,
        digest: Digest,
        _: Option<u64>,
        wanted: Wanted,
        fresh: bool,
    ) -> Result<Opened, SourceError> {
        assert_eq!(digest, self.0.digest);
        let size = self.0.blob.len() as u64;
        let range = match wanted {
            Wanted::Range(range) => range,
            Wanted::Last(n) => size.saturating_sub(n)..size,
        };
        assert!(range.start < range.end && range.end <= size, "{range:?} of {size}");
        self.0.answer(range, fresh).await
    }

    async fn warm(&self, _: Digest) {
        self.0.warmed.fetch_add(1, SeqCst);
    }
}

pub fn sources(servers: &[&Arc<Server>]) -> Vec<Arc<dyn Source>> {
    servers.iter().map(|s| Arc::new(At((*s).clone())) as Arc<dyn Source>).collect()
}

/// An engine with one layer.
pub struct Lab {
    pub fetcher: Fetcher,
    pub events: mpsc::UnboundedReceiver<Event>,
    pub layer: Arc<Layer>,
}

impl Lab {
    pub fn new(layer: &Arc<Layer>, servers: &[&Arc<Server>], settings: Settings) -> Self {
        let (fetcher, events) = Fetcher::new(settings);
        fetcher.add(layer.spec(sources(servers)));
        Self { fetcher, events, layer: layer.clone() }
    }

    /// Waits until blocks are good, or failed: how long it took, and why.
    pub async fn read(&mut self, blocks: Range<u64>) -> (Duration, Result<(), Fault>) {
        let start = Instant::now();
        self.fetcher.miss(self.layer.number, blocks.clone());
        loop {
            match self.events.recv().await.unwrap() {
                Event::Progress { .. } if self.layer.is_good(blocks.clone()) => {
                    return (start.elapsed(), Ok(()));
                }
                Event::Failed { blocks: failed, fault, .. } if failed == blocks => {
                    return (start.elapsed(), Err(fault));
                }
                _ => {}
            }
        }
    }

    /// Waits for the end of the background.
    pub async fn whole(&mut self) -> Result<(), Fault> {
        loop {
            if let Event::Whole { result, .. } = self.events.recv().await.unwrap() {
                return result;
            }
        }
    }

    pub fn counters(&self) -> shipway_lazyfetch::Counters {
        self.fetcher.stats(self.layer.number).unwrap().read()
    }
}

type Kept = Arc<Mutex<Vec<u8>>>;

/// Takes a whole blob as the store does, and keeps it.
pub struct Keep {
    layer: Arc<Layer>,
    report: Report,
    hasher: Hasher,
    kept: Kept,
    next: usize,
}

impl Keep {
    /// What makes one, and what it keeps.
    pub fn made(layer: &Arc<Layer>) -> (impl FnOnce(Report) -> Box<dyn Whole>, Kept) {
        let (layer, kept) = (layer.clone(), Arc::new(Mutex::default()));
        let of_test = kept.clone();
        let make = move |report| {
            Box::new(Self { layer, report, hasher: Hasher::new(), kept, next: 0 }) as Box<dyn Whole>
        };
        (make, of_test)
    }
}

impl Whole for Keep {
    fn bytes(&mut self, bytes: &Bytes) -> Result<(), Fault> {
        let mut kept = self.kept.lock();
        kept.extend_from_slice(bytes);
        self.hasher.update(bytes);
        while let Some(frame) = self.layer.frames.get(self.next) {
            let Some(bytes) = kept.get(frame.offset as usize..(frame.offset + frame.len) as usize)
            else {
                break;
            };
            // What is wrong shows in the digest of the blob.
            let _ = self.layer.write(frame, bytes, &mut |good| (self.report)(good));
            self.next += 1;
        }
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), Fault> {
        match self.hasher.finish() == self.layer.digest {
            true => Ok(()),
            false => Err(Fault::new(Code::DataLoss, "the blob is wrong")),
        }
    }
}

/// No guessing, so that a test sees what it asked for.
pub fn plain() -> Settings {
    Settings { window: false, strides: false, ..Settings::default() }
}
