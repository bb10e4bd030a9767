//! The threads that compress: jobs go to whichever is free, results come back in order.

use super::{ChunkPlace, sample::is_hard};
use crate::{Codec, Error, Result};
use libdeflater::CompressionLvl;
use parking_lot::Mutex;
use shipway_oci::{Digest, Hasher};
use std::{
    collections::BTreeMap,
    io,
    num::NonZero,
    ops::Range,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::{self, JoinHandle},
};

/// What gzip does where the options say nothing, the same as for ordinary layers: blobs are waited
/// for.
const GZIP_LEVEL: i32 = 1;
/// Longer members are looked at in so many places before they are compressed.
const SAMPLED: usize = 64 << 10;
const SAMPLES: usize = 4;
/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// Members or frames to be, one after another: to hand over each by itself would cost as much as
/// compressing it, for most files are small.
#[derive(Default)]
pub struct Batch {
    /// The bytes and room for more.
    buffer: Vec<u8>,
    /// How many there are.
    len: usize,
    /// Where each member or frame ends in the bytes.
    pub units: Vec<usize>,
    /// Chunks whose digests are wanted.
    pub chunks: Vec<(ChunkPlace, Range<usize>)>,
}

impl Batch {
    /// An empty one with the memory of another.
    fn emptied(mut self) -> Self {
        self.len = 0;
        self.units.clear();
        self.chunks.clear();
        self
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.filled(bytes.len());
    }

    /// Room for `n` bytes.
    pub fn room(&mut self, n: usize) -> &mut [u8] {
        let end = self.len + n;
        if self.buffer.len() < end {
            self.buffer.resize(end.max(2 * self.buffer.len()), 0);
        }
        &mut self.buffer[self.len..end]
    }

    /// The next `n` bytes of the room are some now.
    pub fn filled(&mut self, n: usize) {
        self.len = self.buffer.len().min(self.len + n);
    }
}

/// Finished members or frames.
pub struct Done {
    pub compressed: Vec<u8>,
    /// Where each begins.
    pub units: Vec<usize>,
    pub digests: Vec<(ChunkPlace, Digest)>,
    batch: Arc<Batch>,
}

pub struct Pool {
    jobs: Option<SyncSender<(usize, Arc<Batch>)>>,
    /// All bytes, if they are to be hashed.
    tar: Option<SyncSender<Arc<Batch>>>,
    /// Number of all bytes.
    size: u64,
    /// Batches that were compressed, to be filled again.
    spare: Vec<Batch>,
    results: Receiver<(usize, Result<Done>)>,
    early: BTreeMap<usize, Done>,
    workers: Vec<JoinHandle<()>>,
    hashing: Option<JoinHandle<Hasher>>,
    /// Jobs that were given, and results that went out in order.
    given: usize,
    taken: usize,
    most: usize,
}

impl Pool {
    pub fn new(
        codec: Codec,
        level: Option<i32>,
        threads: NonZero<usize>,
        hashes: bool,
    ) -> Result<Self> {
        let most = threads.get() * 2;
        let (jobs, work) = sync_channel(most);
        let (done, results) = channel();
        let (tar, bytes) = sync_channel::<Arc<Batch>>(most);
        let work = Arc::new(Mutex::new(work));
        let mut workers = Vec::new();
        for _ in 0..threads.get() {
            let mut compressor = Compressor::new(codec, level)?;
            let (work, done) = (work.clone(), done.clone());
            let worker = move || run(&mut compressor, &work, &done);
            workers.push(thread::Builder::new().name("estargz".into()).spawn(worker)?);
        }
        let hash = move || {
            bytes.iter().fold(Hasher::new(), |mut hasher, batch: Arc<Batch>| {
                hasher.update(batch.bytes());
                hasher
            })
        };
        let thread = thread::Builder::new().name("estargz-tar".into());
        let hashing = hashes.then(|| thread.spawn(hash)).transpose()?;
        let (jobs, tar) = (Some(jobs), hashes.then_some(tar));
        Ok(Self {
            jobs,
            tar,
            size: 0,
            spare: Vec::new(),
            results,
            early: BTreeMap::new(),
            workers,
            hashing,
            given: 0,
            taken: 0,
            most,
        })
    }

    /// Whether so much is on its way that a result must be taken first.
    pub fn is_full(&self) -> bool {
        self.given - self.taken >= self.most
    }

    pub fn has_work(&self) -> bool {
        self.given > self.taken
    }

    /// An empty batch.
    pub fn batch(&mut self) -> Batch {
        self.spare.pop().unwrap_or_default()
    }

    pub fn submit(&mut self, batch: Batch) -> Result<()> {
        let batch = Arc::new(batch);
        self.size += batch.len as u64;
        let hashed = self.tar.as_ref().is_none_or(|tar| tar.send(batch.clone()).is_ok());
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send((self.given, batch)).is_ok());
        self.given += 1;
        if hashed && sent { Ok(()) } else { Err(died()) }
    }

    /// Waits for a result, and gives those whose turn it is then.
    pub fn receive(&mut self) -> Result<Vec<Done>> {
        let (number, done) = self.results.recv().map_err(|_| died())?;
        self.early.insert(number, done?);
        let mut next = Vec::new();
        while let Some(done) = self.early.remove(&self.taken) {
            self.taken += 1;
            next.push(done);
        }
        Ok(next)
    }

    /// Takes back what is done with.
    pub fn recycle(&mut self, done: Done) {
        // Where the tar is hashed later than compressed it is the last holder's to drop.
        if let Ok(batch) = Arc::try_unwrap(done.batch)
            && self.spare.len() < self.most
        {
            self.spare.push(batch.emptied());
        }
    }

    /// The hash of all bytes, if it was wanted, and their number.
    pub fn finish(&mut self) -> Result<(Option<Hasher>, u64)> {
        self.tar = None;
        let hashing = self.hashing.take();
        let hasher = hashing.map(|hashing| hashing.join().map_err(|_| died())).transpose()?;
        Ok((hasher, self.size))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        (self.jobs, self.tar) = (None, None);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        let _ = self.hashing.take().map(JoinHandle::join);
    }
}

fn died() -> Error {
    Error::Io(io::Error::other("a thread that compresses a layer panicked"))
}

fn run(
    compressor: &mut Compressor,
    work: &Mutex<Receiver<(usize, Arc<Batch>)>>,
    done: &Sender<(usize, Result<Done>)>,
) {
    loop {
        let job = work.lock().recv();
        let Ok((number, batch)) = job else { return };
        if done.send((number, compressed(compressor, batch))).is_err() {
            return;
        }
    }
}

fn compressed(compressor: &mut Compressor, batch: Arc<Batch>) -> Result<Done> {
    let digest = |(place, range): &(ChunkPlace, Range<usize>)| {
        (*place, Digest::of(&batch.bytes()[range.clone()]))
    };
    let digests = batch.chunks.iter().map(digest).collect();
    let mut compressed = Vec::with_capacity(batch.len / 2);
    let mut units = Vec::with_capacity(batch.units.len());
    let mut start = 0;
    for end in &batch.units {
        units.push(compressed.len());
        compressed.extend_from_slice(compressor.compress(&batch.bytes()[start..*end])?);
        start = *end;
    }
    Ok(Done { compressed, units, digests, batch })
}

/// Compresses members or frames one by one, without memory between them that could reach the
/// output.
pub struct Compressor {
    codec: Algorithm,
    scratch: Vec<u8>,
}

enum Algorithm {
    Gzip { normal: libdeflater::Compressor, stored: libdeflater::Compressor },
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Compressor {
    pub fn new(codec: Codec, level: Option<i32>) -> Result<Self> {
        // BuildKit's clients say -1 for the default.
        let level = level.filter(|level| *level >= 0);
        let codec = match codec {
            Codec::Gzip => {
                let level =
                    CompressionLvl::new(level.unwrap_or(GZIP_LEVEL).min(12)).unwrap_or_default();
                let stored = CompressionLvl::new(0).unwrap_or_default();
                Algorithm::Gzip {
                    normal: libdeflater::Compressor::new(level),
                    stored: libdeflater::Compressor::new(stored),
                }
            }
            Codec::Zstd => {
                Algorithm::Zstd(zstd::bulk::Compressor::new(level.unwrap_or(ZSTD_LEVEL).min(22))?)
            }
        };
        Ok(Self { codec, scratch: Vec::new() })
    }

    /// One member or frame with `bytes`.
    pub fn compress(&mut self, bytes: &[u8]) -> Result<&[u8]> {
        let bound = match &mut self.codec {
            Algorithm::Gzip { normal, stored } => {
                normal.gzip_compress_bound(bytes.len()).max(stored.gzip_compress_bound(bytes.len()))
            }
            Algorithm::Zstd(_) => zstd::zstd_safe::compress_bound(bytes.len()),
        };
        if self.scratch.len() < bound {
            self.scratch.resize(bound, 0);
        }
        let n = match &mut self.codec {
            Algorithm::Gzip { normal, stored } => {
                let gzip = if shrinks(bytes) { normal } else { stored };
                gzip.gzip_compress(bytes, &mut self.scratch).map_err(io::Error::other)?
            }
            Algorithm::Zstd(zstd) => zstd.compress_to_buffer(bytes, &mut self.scratch)?,
        };
        Ok(&self.scratch[..n])
    }
}

/// Whether deflate is worth its time: to try what does not shrink takes longest. zstd finds that
/// out by itself.
fn shrinks(bytes: &[u8]) -> bool {
    let part = bytes.len() / SAMPLES;
    part < SAMPLED / SAMPLES || bytes.chunks_exact(part).any(|part| !is_hard(part))
}
