//! From a directory to blobs.

use crate::{
    Archive, Limits, Place,
    entry::{Entry, Kind, Tree},
    format::{Blob, MountRecord, PACK, TREE},
    pack::{CHUNK, Packer, Sink},
    scan::{Scan, Scanned},
};
use fastcdc::v2020::StreamCDC;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Digest, timestamp};
use std::{
    collections::HashSet,
    fs::File,
    io::Read as _,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};
use tokio::sync::mpsc;

/// Packs on their way at the same time.
const UPLOADS: usize = 4;
/// Packs that wait to be uploaded.
const WAITING: usize = 2;
/// How often a file is read that changes meanwhile.
const TRIES: usize = 2;

/// What a save did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Saved {
    /// Regular files that are saved now.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// Bytes that were written to the place.
    pub written: u64,
    /// Files that were left out because there is a limit of bytes, the oldest ones.
    pub beyond: u64,
    /// Devices, sockets, and files that could not be read or changed while they were read.
    pub left_out: u64,
}

/// How a save ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveOutcome {
    /// The artifact has the mount as it is now.
    Changed(Saved),
    /// It had it already.
    Unchanged(Saved),
}

impl SaveOutcome {
    /// What was done.
    pub fn saved(&self) -> &Saved {
        match self {
            Self::Changed(saved) | Self::Unchanged(saved) => saved,
        }
    }
}

/// Tells a thread that nobody waits for it any more.
#[derive(Default)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Puts what is in `dir` into `archive` as the mount `id`; packs that it has are used again. The
/// archive is to be published afterwards. `guard` is what keeps the directory, and is dropped as
/// soon as it was read.
pub async fn save(
    archive: &mut Archive,
    id: &str,
    dir: PathBuf,
    guard: impl Send + 'static,
    limits: &Limits,
) -> Result<SaveOutcome> {
    let place = archive.place.clone();
    let base = match archive.base(id).await {
        Ok(base) => base.unwrap_or_default(),
        // What cannot be read is written anew.
        Err(fault) => {
            tracing::info!(error = %fault, id, "failed to read a saved cache mount, saving all of it");
            Default::default()
        }
    };
    let packs: Vec<_> = base.1.iter().map(|pack| pack.descriptor(PACK)).collect();
    let present = if packs.is_empty() { HashSet::new() } else { place.present(&packs).await? };
    let (full, uploads) = mpsc::channel(WAITING);
    let stopped = Stop::default();
    let (flag, max_size) = (stopped.0.clone(), limits.max_size);
    let gather = shipway_task::blocking("read a cache mount", move || {
        let stop = || flag.load(Ordering::Relaxed);
        let mut sink = |pack: Blob, bytes: Vec<u8>| {
            // Why nobody takes it is the other side's to say.
            full.blocking_send((pack, bytes)).map_err(|_| Fault::cancelled())
        };
        let gathered = gather(dir, &base, &present, max_size, &mut sink, &stop);
        drop(guard);
        gathered
    });
    let (gathered, written) = tokio::join!(gather, upload(&*place, uploads));
    let written = written?;
    drop(stopped);
    let Gathered { tree, blob, packs, mut saved } = gathered?;
    saved.written = written;
    let known = archive.index.mounts.get(id);
    if known.is_some_and(|known| known.tree == blob && known.packs == packs) {
        return Ok(SaveOutcome::Unchanged(saved));
    }
    place.write(&blob.descriptor(TREE), tree.into()).await.context(|| "write the list of files")?;
    saved.written += blob.size;
    let record = MountRecord {
        saved: timestamp::format_whole(SystemTime::now()),
        files: saved.files,
        bytes: saved.bytes,
        tree: blob,
        packs,
    };
    archive.index.mounts.insert(id.to_owned(), record);
    Ok(SaveOutcome::Changed(saved))
}

/// Uploads packs as they come; gives their bytes.
async fn upload(place: &dyn Place, packs: mpsc::Receiver<(Blob, Vec<u8>)>) -> Result<u64> {
    let packs =
        stream::unfold(packs, |mut packs| async move { Some((packs.recv().await?, packs)) });
    let uploads = packs.map(|(pack, bytes)| async move {
        place.write(&pack.descriptor(PACK), bytes.into()).await.map(|()| pack.size)
    });
    let sizes = uploads.buffer_unordered(UPLOADS);
    sizes.try_fold(0, |sum, size| async move { Ok(sum + size) }).await
}

struct Gathered {
    /// The list of files.
    tree: Vec<u8>,
    blob: Blob,
    packs: Vec<Blob>,
    saved: Saved,
}

fn gather(
    dir: PathBuf,
    (base, packs): &(Tree, Vec<Blob>),
    present: &HashSet<Digest>,
    max_size: u64,
    sink: &mut Sink<'_>,
    stop: &dyn Fn() -> bool,
) -> Result<Gathered> {
    let mut scan = Scan::of(&dir, stop)?;
    let mut saved = Saved { left_out: scan.left_out, ..Saved::default() };
    let all = std::mem::take(&mut scan.entries);
    let beyond = oldest_beyond(&all, max_size);
    saved.beyond = beyond.len() as u64;
    let mut packer = Packer::new(base, packs, present, sink);
    let mut entries: Vec<Entry> = Vec::with_capacity(all.len());
    let mut files: HashSet<Vec<u8>> = HashSet::new();
    for (number, Scanned { entry, .. }) in all.into_iter().enumerate() {
        if stop() {
            return Err(Fault::cancelled());
        }
        match entry.kind {
            Kind::File if beyond.contains(&number) => {}
            Kind::File => match file(&scan, &entry, max_size - saved.bytes, &mut packer)? {
                Some((entry, size)) => {
                    files.insert(entry.path.0.clone());
                    entries.push(entry);
                    saved.files += 1;
                    saved.bytes += size;
                }
                None => saved.left_out += 1,
            },
            Kind::Link if entry.target.as_ref().is_none_or(|t| !files.contains(&t.0)) => {
                saved.left_out += 1;
            }
            Kind::Link | Kind::Dir | Kind::Symlink => entries.push(entry),
        }
    }
    let packs = packer.finish(&mut entries)?;
    let (tree, length) = Tree(entries).encode()?;
    let blob = Blob { digest: Digest::of(&tree), size: tree.len() as u64, length };
    Ok(Gathered { tree, blob, packs, saved })
}

/// The files, by number, that are not saved so that the others have at most `max_size` bytes.
fn oldest_beyond(all: &[Scanned], max_size: u64) -> HashSet<usize> {
    let mut total: u64 = all.iter().map(|s| s.size).sum();
    let mut files: Vec<usize> =
        (0..all.len()).filter(|n| all[*n].entry.kind == Kind::File && all[*n].size > 0).collect();
    files.sort_by_key(|n| all[*n].entry.time);
    let mut beyond = HashSet::new();
    for number in files {
        if total <= max_size {
            break;
        }
        total -= all[number].size;
        beyond.insert(number);
    }
    beyond
}

/// A file's entry with its chunks, and its size; `None` for one that is not there as a file of at
/// most `room` bytes, or not for long enough to be read.
fn file(
    scan: &Scan,
    entry: &Entry,
    room: u64,
    packer: &mut Packer<'_>,
) -> Result<Option<(Entry, u64)>> {
    for _ in 0..TRIES {
        let Some((file, mut found, size)) = scan.open(entry).filter(|(.., size)| *size <= room)
        else {
            return Ok(None);
        };
        found.chunks = match chunks(&file, size, packer) {
            Ok(chunks) => chunks?,
            Err(_) => return Ok(None),
        };
        let read: u64 = found.chunks.iter().map(|c| c.length()).sum();
        let after = scan.open(entry).map(|(_, after, size)| (after.time, size));
        if read == size && after == Some((found.time, size)) {
            return Ok(Some((found, size)));
        }
    }
    Ok(None)
}

/// The chunks of the first `size` bytes of a file; the outer error is that of reading.
fn chunks(
    mut file: &File,
    size: u64,
    packer: &mut Packer<'_>,
) -> std::io::Result<Result<Vec<crate::entry::Chunk>>> {
    let (least, usual, largest) = CHUNK;
    let mut all = Vec::new();
    if size <= least as u64 {
        let mut bytes = Vec::with_capacity(size as usize);
        file.take(size).read_to_end(&mut bytes)?;
        if !bytes.is_empty() {
            match packer.add(&bytes) {
                Ok(chunk) => all.push(chunk),
                Err(fault) => return Ok(Err(fault)),
            }
        }
        return Ok(Ok(all));
    }
    let reader = std::io::Read::by_ref(&mut file).take(size);
    for chunk in StreamCDC::new(reader, least, usual, largest) {
        match packer.add(&chunk?.data) {
            Ok(chunk) => all.push(chunk),
            Err(fault) => return Ok(Err(fault)),
        }
    }
    Ok(Ok(all))
}
