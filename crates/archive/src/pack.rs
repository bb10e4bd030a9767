//! The stream of a layer and the threads it flows through: one walks and reads, one hashes the tar,
//! some compress blocks, and the caller's puts them in order, hashes them and hands them on.

use crate::{
    Compression, CompressionKind, EntryKind, Hashed, LayerEntry, LayerTree, Loss, Packed, Tar,
    block::{BLOCK, BlockCompressor, joined},
    decompress, header, indexed,
    indexed::{FormatFiles, ReadFirst},
    tar::block::padding,
};
use bytes::Bytes;
use libdeflater::Crc;
use parking_lot::Mutex;
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{DiffId, Digest, Hasher};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::File,
    io::Read as _,
    mem,
    num::NonZero,
    os::unix::ffi::OsStrExt,
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

/// Hashes the tar of `tree`. Blocks: call it off the async threads.
pub fn tar_of(tree: &LayerTree) -> Result<Hashed> {
    thread::scope(|scope| {
        let (blocks, hashed) = sync_channel::<Bytes>(8);
        let hashing = scope.spawn(move || hash(hashed, None));
        let written = Writer::new(|block| blocks.send(block).is_ok()).write(tree);
        drop(blocks);
        let tar = joined(hashing.join())?;
        Ok(Hashed { loss: written?, tar: tar? })
    })
}

/// Packs `tree` as `compression` says and hands the bytes to `sink` in order. The bytes are the
/// same for any number of `threads` (`None`: as many as there are processors). If the tar is
/// `known`, it is not hashed again, only checked by its checksum. Blocks: call it off the async
/// threads.
pub fn pack(
    tree: &LayerTree,
    compression: Compression,
    known: Option<Tar>,
    threads: Option<NonZero<usize>>,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let produce = |emit: &mut dyn FnMut(Bytes) -> bool| Writer::new(emit).write(tree);
    flow(compression, (known, FormatFiles::Refused), threads, produce, sink)
}

/// One tar of several trees, each below a directory of its own (`""`: none) that is made with the
/// time `mtime`. Uncompressed; otherwise as [`pack`].
pub fn pack_below(
    trees: &[(String, LayerTree)],
    mtime: i64,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let plain = Compression { kind: CompressionKind::Uncompressed, ..Compression::default() };
    let produce = |emit: &mut dyn FnMut(Bytes) -> bool| {
        let mut writer = Writer::new(emit);
        for (i, (dir, tree)) in trees.iter().enumerate() {
            // Several trees may share a directory.
            if !dir.is_empty() && trees[..i].iter().all(|(other, _)| other != dir) {
                writer.directory(dir, mtime)?;
            }
            writer.tree(tree, dir)?;
        }
        writer.finish().map(|()| None)
    };
    flow(plain, (None, FormatFiles::Refused), None, produce, sink)
}

/// Compresses anew the layer that `input` gives piece by piece and that is compressed as `from`
/// says; its tar stays the same to the byte, but for a table of contents and landmarks that it has
/// already where it gets others. Otherwise as [`pack`].
pub fn recompress(
    input: &mut (dyn FnMut() -> Result<Option<Bytes>> + Send),
    from: CompressionKind,
    compression: Compression,
    threads: Option<NonZero<usize>>,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let produce = |emit: &mut dyn FnMut(Bytes) -> bool| decompressed(input, from, emit);
    flow(compression, (None, FormatFiles::LeftOut), threads, produce, sink)
}

/// The same for an indexed kind, with what is read `first` at the beginning and a landmark behind
/// it, so that it is fetched at once: another tar, which unpacks to the same files.
pub fn recompress_in_order(
    input: &mut (dyn FnMut() -> Result<Option<Bytes>> + Send),
    from: CompressionKind,
    compression: Compression,
    first: ReadFirst<'_>,
    threads: Option<NonZero<usize>>,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let produce = |emit: &mut dyn FnMut(Bytes) -> bool| decompressed(input, from, emit);
    let (how, threads) = ((None, FormatFiles::LeftOut), workers(threads));
    indexed::flow(compression, how, Some(first), threads, produce, sink)
}

/// Emits the tar of a layer in blocks.
fn decompressed(
    input: &mut (dyn FnMut() -> Result<Option<Bytes>> + Send),
    from: CompressionKind,
    emit: &mut dyn FnMut(Bytes) -> bool,
) -> Result<Option<Loss>> {
    let mut tar = decompress::reader(from, input)?;
    loop {
        let mut block = Vec::with_capacity(BLOCK);
        let n = (&mut tar).take(BLOCK as u64).read_to_end(&mut block).map_err(decompress::fault)?;
        if n == 0 {
            return Ok(None);
        }
        if !emit(block.into()) {
            return Err(Fault::cancelled());
        }
    }
}

/// The number of threads that compress.
fn workers(threads: Option<NonZero<usize>>) -> usize {
    match threads {
        Some(n) => n.get(),
        None => thread::available_parallelism().map_or(1, NonZero::get),
    }
}

/// Runs the threads: `produce` gives the tar in blocks and stops when it returns that no one wants
/// them.
pub(crate) fn flow(
    compression: Compression,
    (known, format_files): (Option<Tar>, FormatFiles),
    threads: Option<NonZero<usize>>,
    produce: impl FnOnce(&mut dyn FnMut(Bytes) -> bool) -> Result<Option<Loss>> + Send,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<Packed> {
    let threads = match compression.kind {
        CompressionKind::Uncompressed => 1,
        _ => workers(threads),
    };
    if compression.kind.is_indexed() {
        return indexed::flow(compression, (known, format_files), None, threads, produce, sink);
    }
    let (to_compress, jobs) = sync_channel::<(u64, Bytes)>(threads * 2);
    let (jobs, stop) = (&Mutex::new(jobs), &AtomicBool::new(false));
    thread::scope(|scope| {
        let (to_hash, hashed) = sync_channel::<Bytes>(8);
        let (done, results) = sync_channel::<Result<(u64, Bytes)>>(threads * 2);
        let hashing = scope.spawn(move || hash(hashed, known));
        let reading = scope.spawn(move || {
            let mut next = 0;
            produce(&mut |block| {
                let sent = !stop.load(Relaxed)
                    && to_hash.send(block.clone()).is_ok()
                    && to_compress.send((next, block)).is_ok();
                next += 1;
                sent
            })
        });
        for _ in 0..threads {
            let done = done.clone();
            scope.spawn(move || work(compression, jobs, &done));
        }
        drop(done);
        let gathered = gather(results, sink);
        if gathered.is_err() {
            // The receiver of results is gone, so the workers end; the reader must not wait for
            // them.
            stop.store(true, Relaxed);
            while jobs.lock().recv().is_ok() {}
        }
        let written = joined(reading.join())?;
        let tar = joined(hashing.join())?;
        let (digest, size) = gathered?;
        Ok(Packed { loss: written?, tar: tar?, digest, size, indexed: None })
    })
}

/// What the tar of these blocks is; an error if it is not the one that was `known`.
fn hash(blocks: Receiver<Bytes>, known: Option<Tar>) -> Result<Tar> {
    let mut hasher = known.as_ref().map_or_else(Hasher::new, |tar| tar.hasher.clone());
    let (mut crc, mut size) = (Crc::new(), 0);
    for block in blocks {
        size += block.len() as u64;
        crc.update(&block);
        if known.is_none() {
            hasher.update(&block);
        }
    }
    let diff_id = known.as_ref().map_or_else(|| DiffId(hasher.clone().finish()), |tar| tar.diff_id);
    let tar = Tar { diff_id, size, crc: crc.sum(), hasher };
    tar.check(known.as_ref())?;
    Ok(tar)
}

fn work(
    compression: Compression,
    jobs: &Mutex<Receiver<(u64, Bytes)>>,
    done: &SyncSender<Result<(u64, Bytes)>>,
) {
    let mut compressor = match BlockCompressor::new(compression) {
        Ok(compressor) => compressor,
        Err(e) => {
            let _ = done.send(Err(e));
            return;
        }
    };
    loop {
        let job = jobs.lock().recv();
        let Ok((index, block)) = job else { return };
        let result = if compression.kind == CompressionKind::Uncompressed {
            Ok((index, block))
        } else {
            let mut out = Vec::with_capacity(block.len());
            compressor.compress(&block, &mut out).map(|()| (index, out.into()))
        };
        if done.send(result).is_err() {
            return;
        }
    }
}

fn gather(
    results: Receiver<Result<(u64, Bytes)>>,
    sink: &mut dyn FnMut(Bytes) -> Result<()>,
) -> Result<(Digest, u64)> {
    let (mut hasher, mut size, mut next) = (Hasher::new(), 0, 0);
    let mut early = BTreeMap::new();
    for result in results {
        let (index, bytes) = result?;
        early.insert(index, bytes);
        while let Some(bytes) = early.remove(&next) {
            next += 1;
            size += bytes.len() as u64;
            hasher.update(&bytes);
            sink(bytes)?;
        }
    }
    Ok((hasher.finish(), size))
}

/// Writes the tar stream in blocks of [`BLOCK`] bytes; the last one may be shorter.
struct Writer<F> {
    emit: F,
    block: Vec<u8>,
}

impl<F: FnMut(Bytes) -> bool> Writer<F> {
    fn new(emit: F) -> Self {
        Self { emit, block: Vec::with_capacity(BLOCK) }
    }

    fn write(mut self, tree: &LayerTree) -> Result<Option<Loss>> {
        let loss = self.tree(tree, "")?;
        self.finish().map(|()| loss)
    }

    fn directory(&mut self, path: &str, mtime: i64) -> Result<()> {
        let (path, kind) = (path.as_bytes().to_vec(), EntryKind::Directory);
        let mut head = Vec::new();
        header::write(
            &LayerEntry {
                path,
                kind,
                mode: 0o755,
                uid: 0,
                gid: 0,
                size: 0,
                mtime,
                xattrs: Vec::new(),
            },
            &mut head,
        );
        self.put(&head)
    }

    /// The entries of `tree`, below the directory `under` if that is not empty.
    fn tree(&mut self, tree: &LayerTree, under: &str) -> Result<Option<Loss>> {
        let below = |path: &mut Vec<u8>| {
            path.splice(0..0, under.bytes().chain([b'/']));
        };
        let mut head = Vec::new();
        tree.walk_open(|mut entry, file| {
            let file = file
                .filter(|_| entry.kind == EntryKind::File && entry.size > 0)
                .map(|file| (file, entry.path.clone()));
            if !under.is_empty() {
                below(&mut entry.path);
                if let EntryKind::HardLink(first) = &mut entry.kind {
                    below(first);
                }
            }
            head.clear();
            header::write(&entry, &mut head);
            self.put(&head)?;
            file.map_or(Ok(()), |(file, path)| self.file(&file, &path, entry.size))
        })
    }

    fn finish(mut self) -> Result<()> {
        self.put(&header::END)?;
        if self.block.is_empty() { Ok(()) } else { self.flush() }
    }

    fn put(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let n = bytes.len().min(BLOCK - self.block.len());
            self.block.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            self.flush_full()?;
        }
        Ok(())
    }

    fn flush_full(&mut self) -> Result<()> {
        if self.block.len() == BLOCK { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let full = mem::replace(&mut self.block, Vec::with_capacity(BLOCK));
        if (self.emit)(full.into()) { Ok(()) } else { Err(Fault::cancelled()) }
    }

    fn file(&mut self, file: &File, path: &[u8], size: u64) -> Result<()> {
        let path = Path::new(OsStr::from_bytes(path));
        let failed = |e: rustix::io::Errno| {
            Fault::io(format!("read {} of a layer", path.display()), e.into())
        };
        let mut left = size;
        while left > 0 {
            let want = (BLOCK - self.block.len()).min(usize::try_from(left).unwrap_or(usize::MAX));
            let at = self.block.len();
            let read = if want == self.block.capacity() - at {
                rustix::io::read(file, rustix::buffer::spare_capacity(&mut self.block))
            } else {
                self.block.resize(at + want, 0);
                let read = rustix::io::read(file, &mut self.block[at..]);
                self.block.truncate(at + *read.as_ref().unwrap_or(&0));
                read
            };
            let n = match read {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map_err(failed)?,
            };
            if n == 0 {
                return Err(Fault::new(
                    Code::Aborted,
                    format!("{} became shorter while it was read", path.display()),
                )
                .hint("something still writes to the file system of a step that has ended"));
            }
            left -= n as u64;
            self.flush_full()?;
        }
        self.put(&[0; 512][..padding(size)])
    }
}
