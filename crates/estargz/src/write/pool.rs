//! The threads that compress: jobs go to whichever is free, results come back in order.

use super::ChunkPlace;
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
/// Longer members are sampled before they are compressed, in so many places, with so many bytes
/// each.
const SAMPLED: usize = 256 << 10;
const SAMPLES: usize = 4;
const SAMPLE: usize = 4 << 10;
/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// A member or frame to be.
pub struct Job {
    pub bytes: Arc<Vec<u8>>,
    /// Chunks whose digests are wanted.
    pub chunks: Vec<(ChunkPlace, Range<usize>)>,
}

/// A finished member or frame.
pub struct Done {
    pub compressed: Vec<u8>,
    pub digests: Vec<(ChunkPlace, Digest)>,
}

pub struct Pool {
    jobs: Option<SyncSender<(usize, Job)>>,
    /// All bytes, to be hashed.
    tar: Option<SyncSender<Arc<Vec<u8>>>>,
    results: Receiver<(usize, Result<Done>)>,
    early: BTreeMap<usize, Done>,
    workers: Vec<JoinHandle<()>>,
    hashing: Option<JoinHandle<(Hasher, u64)>>,
    /// Jobs that were given, and results that went out in order.
    given: usize,
    taken: usize,
    most: usize,
}

impl Pool {
    pub fn new(codec: Codec, level: Option<i32>, threads: NonZero<usize>) -> Result<Self> {
        let most = threads.get() * 2;
        let (jobs, work) = sync_channel(most);
        let (done, results) = channel();
        let (tar, bytes) = sync_channel::<Arc<Vec<u8>>>(most);
        let work = Arc::new(Mutex::new(work));
        let mut workers = Vec::new();
        for _ in 0..threads.get() {
            let mut compressor = Compressor::new(codec, level)?;
            let (work, done) = (work.clone(), done.clone());
            let worker = move || run(&mut compressor, &work, &done);
            workers.push(thread::Builder::new().name("estargz".into()).spawn(worker)?);
        }
        let hash = move || {
            bytes.iter().fold((Hasher::new(), 0), |(mut hasher, size), bytes| {
                hasher.update(&*bytes);
                (hasher, size + bytes.len() as u64)
            })
        };
        let hashing = Some(thread::Builder::new().name("estargz-tar".into()).spawn(hash)?);
        let (jobs, tar) = (Some(jobs), Some(tar));
        Ok(Self {
            jobs,
            tar,
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

    pub fn submit(&mut self, job: Job) -> Result<()> {
        let hashed = self.tar.as_ref().is_some_and(|tar| tar.send(job.bytes.clone()).is_ok());
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send((self.given, job)).is_ok());
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

    /// The hash of all bytes and their number.
    pub fn finish(&mut self) -> Result<(Hasher, u64)> {
        self.tar = None;
        self.hashing.take().and_then(|hashing| hashing.join().ok()).ok_or_else(died)
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
    work: &Mutex<Receiver<(usize, Job)>>,
    done: &Sender<(usize, Result<Done>)>,
) {
    loop {
        let job = work.lock().recv();
        let Ok((number, job)) = job else { return };
        let digests = job
            .chunks
            .iter()
            .map(|(place, range)| (*place, Digest::of(&job.bytes[range.clone()])))
            .collect();
        let compressed = compressor
            .compress(&job.bytes)
            .map(|bytes| Done { compressed: bytes.to_vec(), digests });
        if done.send((number, compressed)).is_err() {
            return;
        }
    }
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
                let gzip = if shrinks(normal, bytes, &mut self.scratch)? { normal } else { stored };
                gzip.gzip_compress(bytes, &mut self.scratch).map_err(io::Error::other)?
            }
            Algorithm::Zstd(zstd) => zstd.compress_to_buffer(bytes, &mut self.scratch)?,
        };
        Ok(&self.scratch[..n])
    }
}

/// Whether deflate is worth its time, by samples of `bytes`: to try what does not shrink takes
/// longest. zstd finds that out by itself.
fn shrinks(gzip: &mut libdeflater::Compressor, bytes: &[u8], scratch: &mut [u8]) -> Result<bool> {
    if bytes.len() < SAMPLED {
        return Ok(true);
    }
    let mut sum = 0;
    for n in 0..SAMPLES {
        let at = (bytes.len() - SAMPLE) / SAMPLES * n;
        sum += gzip.deflate_compress(&bytes[at..at + SAMPLE], scratch).map_err(io::Error::other)?;
    }
    Ok(sum < SAMPLE * SAMPLES / 100 * 98)
}
