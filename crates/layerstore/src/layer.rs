//! A layer: its files, and which of its data is good.

use crate::{
    Error, Result,
    about::{ABOUT, About, Changing, Fixed, LayerKey, LayerNumber, State},
    bits::Bits,
    digests::{DIGEST, DIGESTS, Digests, ENTRIES},
    disk,
    fetch::Extents,
    index::{self, Chunk, ChunkId, Chunks, Index, PageCache, blocks_of},
    lock,
    spans::{Decompressed, OpenSpans, SPANS},
};
use parking_lot::Mutex;
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};
use shipway_estargz::{Codec, DATA_BLOCK, Landmark, Record};
use shipway_oci::{DiffId, Digest, Hasher};
use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

pub(crate) const META: &str = "meta";
pub(crate) const DATA: &str = "data";
pub(crate) const INDEX: &str = "index";
pub(crate) const CLAIMS: &str = "claims";
/// An empty file that is there if the layer is whole: to take it away needs no space.
pub(crate) const WHOLE: &str = "whole";

/// Bytes of data that are given up together; each piece has a time of use.
pub const SEGMENT: u64 = 4 << 20;
/// Bytes that are read at once from the disk.
const BUFFER: usize = 256 << 10;
/// A time of use is written to the disk when it is so much later than the one there.
const USED: Duration = Duration::from_secs(60);

/// What all layers of a store share.
pub(crate) struct Common {
    pub pages: Arc<PageCache>,
    /// From when on times of segments count.
    pub start: Instant,
}

impl Common {
    /// Seconds of this life, from 1.
    fn now(&self) -> u32 {
        u32::try_from(self.start.elapsed().as_secs()).unwrap_or(u32::MAX - 1) + 1
    }
}

/// A layer on the disk. Its files are opened when something of them is needed first.
pub struct Layer {
    directory: PathBuf,
    fixed: Fixed,
    known: Mutex<Known>,
    common: Arc<Common>,
    /// Whether what an earlier process of this boot said of the data can be believed.
    restorable: bool,
    /// When it was used last, in seconds since 1970, and as it is on the disk.
    used: AtomicU64,
    used_on_disk: AtomicU64,
    open: OnceLock<Arc<Open>>,
    is_meta_right: OnceLock<()>,
    spans: OnceLock<OpenSpans>,
}

/// What changes of a layer, as it is on the disk.
struct Known {
    changing: Changing,
    is_whole: bool,
}

/// The files of a layer.
pub(crate) struct Open {
    pub data: File,
    pub index: Index,
    /// What was found out of chunks whose digests nobody promised.
    pub digests: Option<Digests>,
    claims: File,
    marks: Mutex<Marks>,
    /// When each segment was fetched or missed last, in seconds of this life; 0 is before.
    segments: Box<[AtomicU32]>,
}

/// What is known of the chunks.
struct Marks {
    /// Their data was checked in this boot and is on the disk, or in the kernel's cache of it.
    verified: Bits,
    /// Their data was written once.
    claimed: Bits,
    /// Blocks that somebody reads, writes or is about to serve: they are not taken away.
    held: Vec<(u64, Range<u64>)>,
    /// Number of the next hold.
    next: u64,
}

impl Marks {
    fn is_held(&self, blocks: &Range<u64>) -> bool {
        self.held.iter().any(|(_, held)| held.start < blocks.end && blocks.start < held.end)
    }
}

/// Blocks that are good: everything that touches them was checked.
///
/// As long as it lives the store does not take them away. Whoever serves blocks tells those who
/// serve them first, and drops this afterwards: else they could be told of blocks that are gone.
#[derive(Default)]
#[must_use = "whoever serves the blocks has to be told before this is dropped"]
pub struct Good {
    ranges: Vec<Range<u64>>,
    _hold: Option<Hold>,
}

impl Good {
    /// Blocks, in order, of a layer that takes none away: one in memory, as tests have.
    pub fn unheld(ranges: Vec<Range<u64>>) -> Self {
        Self { ranges, _hold: None }
    }

    /// The blocks, in order.
    pub fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether all of `blocks` are among them.
    pub fn has(&self, blocks: &Range<u64>) -> bool {
        blocks.is_empty()
            || self.ranges.iter().any(|r| r.start <= blocks.start && blocks.end <= r.end)
    }
}

impl std::fmt::Debug for Good {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.ranges.fmt(f)
    }
}

/// Blocks that are not taken away as long as this lives.
struct Hold {
    open: Arc<Open>,
    number: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        lock(&self.open.marks).held.retain(|(number, _)| *number != self.number);
    }
}

/// What a layer takes on the disk, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of its data as far as it is there.
    pub data: u64,
    /// Of everything else.
    pub other: u64,
}

impl Usage {
    /// Both.
    pub fn total(&self) -> u64 {
        self.data + self.other
    }
}

impl Open {
    fn hold(self: &Arc<Self>, blocks: Range<u64>) -> Hold {
        let mut marks = lock(&self.marks);
        let number = marks.next;
        marks.next += 1;
        marks.held.push((number, blocks));
        Hold { open: self.clone(), number }
    }

    pub fn next_unverified(&self, ids: &Range<u32>) -> u32 {
        lock(&self.marks).verified.next(ids.clone(), false)
    }

    pub fn is_verified(&self, id: u32) -> bool {
        lock(&self.marks).verified.get(id)
    }

    fn claim(&self, marks: &mut Marks, id: u32, on: bool) {
        if marks.claimed.get(id) != on {
            marks.claimed.set(id, on);
            // What cannot be written here is fetched again after the next boot, and that is all.
            _ = self.claims.write_all_at(&[marks.claimed.byte_of(id)], u64::from(id / 8));
        }
    }

    /// Notes that a chunk is on the disk and right; returns which of its blocks are good by that.
    fn mark(&self, id: u32, record: &Record) -> Result<Range<u64>> {
        {
            let mut marks = lock(&self.marks);
            marks.verified.set(id, true);
            self.claim(&mut marks, id, true);
        }
        let mut good = blocks_of(record);
        let first = good.start..good.start + 1;
        let last = good.end - 1..good.end;
        let is_good = |block: &Range<u64>| -> Result<bool> {
            let chunks = self.index.touching(block)?;
            Ok(lock(&self.marks).verified.has_all(chunks))
        };
        if !record.data.is_multiple_of(DATA_BLOCK) && !is_good(&first)? {
            good.start += 1;
        }
        if good.start < good.end
            && !(record.data + record.size).is_multiple_of(DATA_BLOCK)
            && !is_good(&last)?
        {
            good.end -= 1;
        }
        Ok(good)
    }

    /// Where what belongs to a chunk ends: the rest of a file's last block is zeros.
    pub fn padded_end(&self, id: u32, record: &Record) -> Result<u64> {
        let end = record.data + record.size;
        let block = end.next_multiple_of(DATA_BLOCK);
        let is_last =
            end == block || id + 1 == self.index.count || self.index.get(id + 1)?.data >= block;
        Ok(if is_last { block } else { end })
    }

    /// Makes bytes of the data zeros, and whole blocks of them holes.
    fn punch(&self, bytes: &Range<u64>) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.data, flags, bytes.start, bytes.end - bytes.start).map_err(|e| {
            Error::io(format_args!("make a hole in the data of layer {}", self.index.layer), e)
        })
    }

    /// The segments that have data, and when they were used last in this life (0 is before).
    pub fn segments_with_data(&self) -> Result<Vec<(u64, u32)>> {
        let failed = |e| Error::io(format_args!("look for data of layer {}", self.index.layer), e);
        let (mut found, mut at) = (Vec::new(), 0);
        loop {
            at = match seek(&self.data, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => return Ok(found),
                at => at.map_err(failed)?,
            };
            let segment = at / SEGMENT;
            let used = self.segments.get(segment as usize);
            found.push((segment, used.map_or(0, |used| used.load(Ordering::Relaxed))));
            at = (segment + 1) * SEGMENT;
        }
    }

    /// Makes the chunks not good, unless somebody holds one of their blocks or none of them is
    /// there.
    pub fn take_back(&self, chunks: &Range<u32>, blocks: &Range<u64>) -> bool {
        let mut marks = lock(&self.marks);
        let is_there = marks.claimed.next(chunks.clone(), true) < chunks.end
            || marks.verified.next(chunks.clone(), true) < chunks.end;
        if !is_there || marks.is_held(blocks) {
            return false;
        }
        marks.verified.set_all(chunks.clone(), false);
        true
    }

    /// Makes holes of those `pieces` (chunks with the bytes that belong to them, in order) that are
    /// not good and not held.
    pub fn punch_unverified(&self, pieces: &[(u32, Range<u64>)]) -> Result<()> {
        // Under the lock, so that nobody begins to write one of them.
        let mut marks = lock(&self.marks);
        let mut hole = 0..0;
        for (id, bytes) in pieces {
            let blocks = bytes.start / DATA_BLOCK..bytes.end.div_ceil(DATA_BLOCK);
            if marks.verified.get(*id) || marks.is_held(&blocks) {
                continue;
            }
            self.claim(&mut marks, *id, false);
            if hole.end != bytes.start {
                if !hole.is_empty() {
                    self.punch(&hole)?;
                }
                hole.start = bytes.start;
            }
            hole.end = bytes.end;
        }
        if hole.is_empty() { Ok(()) } else { self.punch(&hole) }
    }

    /// Whether the data on the disk is that of the chunk.
    fn is_right(&self, id: u32, record: &Record, expected: Digest) -> Result<bool> {
        let (mut at, end) = (record.data, record.data + record.size);
        let (padded, mut hasher) = (self.padded_end(id, record)?, Hasher::new());
        let mut buffer = vec![0; BUFFER.min((padded - at) as usize)];
        while at < padded {
            let now = buffer.len().min((padded - at) as usize);
            // What the disk cannot give back may still be fetched.
            if self.data.read_exact_at(&mut buffer[..now], at).is_err() {
                return Ok(false);
            }
            let inside = now.min(end.saturating_sub(at) as usize);
            hasher.update(&buffer[..inside]);
            if buffer[inside..now].iter().any(|b| *b != 0) {
                return Ok(false);
            }
            at += now as u64;
        }
        Ok(hasher.finish() == expected)
    }

    /// The parts of `blocks` that are good.
    fn good_in(&self, blocks: &Range<u64>) -> Result<Vec<Range<u64>>> {
        let chunks = self.index.touching(blocks)?;
        let (mut at, mut missing) = (chunks.start, Vec::new());
        loop {
            let run = lock(&self.marks).verified.runs(at..chunks.end, false).next();
            let Some(run) = run else { break };
            at = run.end;
            let (first, last) = (self.index.get(run.start)?, self.index.get(run.end - 1)?);
            missing.push(blocks_of(&first).start..blocks_of(&last).end);
        }
        let (mut good, mut at) = (Vec::new(), blocks.start);
        for bad in missing {
            if at < bad.start {
                good.push(at..bad.start);
            }
            at = at.max(bad.end);
        }
        if at < blocks.end {
            good.push(at..blocks.end);
        }
        Ok(good)
    }
}

impl Layer {
    pub(crate) fn new(
        directory: PathBuf,
        about: About,
        common: Arc<Common>,
        restorable: bool,
        used: u64,
    ) -> Self {
        let is_whole = directory.join(WHOLE).exists();
        Self {
            directory,
            fixed: about.fixed,
            known: Mutex::new(Known { changing: about.changing, is_whole }),
            common,
            restorable,
            used: AtomicU64::new(used),
            used_on_disk: AtomicU64::new(used),
            open: OnceLock::new(),
            is_meta_right: OnceLock::new(),
            spans: OnceLock::new(),
        }
    }

    /// What it is found by.
    pub fn key(&self) -> LayerKey {
        self.fixed.key
    }

    /// Its number.
    pub fn number(&self) -> LayerNumber {
        self.fixed.number
    }

    /// Bytes of its blob.
    pub fn blob_size(&self) -> u64 {
        self.fixed.blob_size
    }

    /// How its blob is compressed.
    pub fn codec(&self) -> Codec {
        self.fixed.codec()
    }

    /// Gzip members or zstd frames with data.
    pub fn frames(&self) -> u32 {
        self.fixed.frames
    }

    /// Chunks of its data.
    pub fn chunks(&self) -> u32 {
        self.fixed.chunks
    }

    /// What it asks of those who fetch it.
    pub fn landmark(&self) -> Option<Landmark> {
        self.fixed.landmark()
    }

    /// Blocks of the data file.
    pub fn data_blocks(&self) -> u64 {
        self.fixed.data_blocks
    }

    /// Bytes of the image.
    pub fn meta_bytes(&self) -> u64 {
        self.fixed.meta_bytes
    }

    /// Where it was seen, as `host/name`, the latest last. It may be fetched from any of them.
    pub fn repositories(&self) -> Vec<String> {
        lock(&self.known).changing.repositories.clone()
    }

    /// How much is known of its data.
    pub fn state(&self) -> State {
        let known = lock(&self.known);
        match &known.changing.lie {
            Some(difference) => State::Lying(difference.clone()),
            None if known.is_whole => State::Whole,
            None => State::Lazy,
        }
    }

    /// When it was used last, in seconds since 1970.
    pub fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The image, to be mounted with [`Layer::data_path`] as its device. Call [`Layer::meta`]
    /// first: it checks what the kernel will read.
    pub fn meta_path(&self) -> PathBuf {
        self.directory.join(META)
    }

    /// The data file.
    pub fn data_path(&self) -> PathBuf {
        self.directory.join(DATA)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The image, opened for reading, if its bytes are those that were written.
    pub fn meta(&self) -> Result<File> {
        let path = self.meta_path();
        let damaged = |why| Error::Damaged { layer: self.number(), file: META, why };
        let mut file = File::open(&path).map_err(Error::at("open", &path))?;
        if self.is_meta_right.get().is_none() {
            let mut hasher = DigestOf(Hasher::new(), 0);
            io::copy(&mut file, &mut hasher).map_err(Error::at("read", &path))?;
            if hasher.1 != self.fixed.meta_bytes || hasher.0.finish() != self.fixed.meta_digest {
                return Err(damaged("its digest is another"));
            }
            _ = self.is_meta_right.set(());
            io::Seek::rewind(&mut file).map_err(Error::at("read", &path))?;
        }
        Ok(file)
    }

    /// The data file, for whoever serves it. It is the same open file for all, so that those do not
    /// count as users of a mount when data is taken away ([`crate::LayerStore::punch`]). One that
    /// an earlier process opened does.
    pub fn data(&self) -> Result<File> {
        let path = self.data_path();
        self.open()?.data.try_clone().map_err(Error::at("open", &path))
    }

    /// Whether it was made of a blob without a table of contents.
    pub fn is_plain(&self) -> bool {
        self.fixed.is_plain()
    }

    /// Whether its blob cannot be decompressed from the middle: all of its data is there as long as
    /// the layer is, and nothing of it can be given up alone.
    pub fn is_sealed(&self) -> bool {
        self.fixed.is_sealed()
    }

    /// Whether it was made of somebody else's index ([`crate::Indexed`]), so that the digests of
    /// its chunks are not known before they are there.
    pub fn is_indexed(&self) -> bool {
        self.fixed.entries.is_some()
    }

    /// Length and digest of the file of entries, if it has one.
    pub(crate) fn entries_file(&self) -> Option<(u64, Digest)> {
        self.fixed.entries
    }

    /// Digest of its tar, which is known of plain layers. If the layer [is
    /// indexed](Layer::is_indexed) it is what the image's config says, until the layer is whole.
    pub fn diff_id(&self) -> Option<DiffId> {
        self.fixed.diff_id
    }

    /// Checks the file of spans of a plain layer, if that was not done: who is about to use the
    /// layer can still do without it.
    pub fn check_spans(&self) -> Result<()> {
        self.spans().map(drop)
    }

    /// The spans of a plain layer.
    fn spans(&self) -> Result<Option<&OpenSpans>> {
        let Some(digest) = self.fixed.spans_digest else { return Ok(None) };
        if let Some(spans) = self.spans.get() {
            return Ok(Some(spans));
        }
        let spans = OpenSpans::open(&self.directory, self.number(), &self.key().blob, digest)?;
        Ok(Some(self.spans.get_or_init(|| spans)))
    }

    /// Decompresses the frame that begins at `offset` in the blob.
    pub(crate) fn decompress<R: io::BufRead>(
        &self,
        offset: u64,
        compressed: R,
    ) -> Result<Decompressed<R>> {
        match self.spans()? {
            Some(spans) => spans.decompress(offset, compressed),
            None => Decompressed::frames(self.codec(), compressed)
                .map_err(|e| Error::Frame { layer: self.number(), why: e.to_string() }),
        }
    }

    /// Opens the files, if they are not open.
    pub(crate) fn open(&self) -> Result<&Arc<Open>> {
        if let Some(open) = self.open.get() {
            return Ok(open);
        }
        let open = |name: &str, writes: bool| {
            let path = self.directory.join(name);
            File::options().read(true).write(writes).open(&path).map_err(Error::at("open", &path))
        };
        let count = self.fixed.chunks;
        let index = Index {
            file: open(INDEX, false)?,
            layer: self.number(),
            key: self.key(),
            count,
            cache: self.common.pages.clone(),
        };
        let claims = open(CLAIMS, true)?;
        let mut claimed = vec![0; Bits::bytes(count) as usize];
        claims
            .read_exact_at(&mut claimed, 0)
            .map_err(Error::at("read", &self.directory.join(CLAIMS)))?;
        let mut verified = Bits::new(count);
        if self.state() == State::Whole {
            verified.set_all(0..count, true);
        }
        let claimed = Bits::from_bytes(count, &claimed);
        let marks = Mutex::new(Marks { verified, claimed, held: Vec::new(), next: 0 });
        let segments = (self.data_blocks() * DATA_BLOCK).div_ceil(SEGMENT);
        let segments = (0..segments).map(|_| AtomicU32::new(0)).collect();
        let digests = self.is_indexed().then(|| open(DIGESTS, true)).transpose()?.map(Digests);
        let open = Open { data: open(DATA, true)?, index, digests, claims, marks, segments };
        Ok(self.open.get_or_init(|| Arc::new(open)))
    }

    /// Whether the files are there, by their lengths.
    pub(crate) fn check_lengths(&self) -> Result<()> {
        for (file, length) in [
            (META, self.fixed.meta_bytes),
            (DATA, self.data_blocks() * DATA_BLOCK),
            (INDEX, index::bytes(self.fixed.chunks)),
            (CLAIMS, Bits::bytes(self.fixed.chunks)),
            (SPANS, self.fixed.spans_bytes),
            (ENTRIES, self.fixed.entries.map_or(0, |(bytes, _)| bytes)),
            (DIGESTS, self.digests_bytes()),
        ] {
            let is_absent = match file {
                SPANS => self.fixed.spans_digest.is_none(),
                ENTRIES | DIGESTS => !self.is_indexed(),
                _ => false,
            };
            if is_absent {
                continue;
            }
            let path = self.directory.join(file);
            let found = path.symlink_metadata();
            if !found.is_ok_and(|found| found.is_file() && found.len() == length) {
                let why = "it is not there or has another length";
                return Err(Error::Damaged { layer: self.number(), file, why });
            }
        }
        if self.is_plain() && self.diff_id().is_none() {
            let why = "it does not say what the digest of the tar is";
            return Err(Error::Damaged { layer: self.number(), file: ABOUT, why });
        }
        if self.is_sealed() && self.state() != State::Whole {
            let why = "the layer cannot be fetched in parts";
            return Err(Error::Damaged { layer: self.number(), file: WHOLE, why });
        }
        Ok(())
    }

    fn digests_bytes(&self) -> u64 {
        if self.is_indexed() { u64::from(self.fixed.chunks) * DIGEST as u64 } else { 0 }
    }

    /// What it takes on the disk now.
    pub fn usage(&self) -> Result<Usage> {
        let path = self.data_path();
        let data = match self.open.get() {
            Some(open) => open.data.metadata(),
            None => path.symlink_metadata(),
        };
        let data = match data {
            // It was removed meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Usage::default()),
            data => data.map_err(Error::at("stat", &path))?.blocks() * 512,
        };
        let chunks = self.fixed.chunks;
        let about = DATA_BLOCK;
        let Fixed { meta_bytes, spans_bytes, .. } = self.fixed;
        let indexed = [self.fixed.entries.map_or(0, |(bytes, _)| bytes), self.digests_bytes()];
        let other = [meta_bytes, spans_bytes, index::bytes(chunks), Bits::bytes(chunks), about];
        let other = [&other[..], &indexed].concat();
        let other = other.iter().map(|bytes| bytes.next_multiple_of(DATA_BLOCK)).sum();
        Ok(Usage { data, other })
    }

    /// The chunks that touch some of `blocks`, in order.
    pub fn chunks_touching(&self, blocks: Range<u64>) -> Result<Chunks<'_>> {
        let index = &self.open()?.index;
        Ok(index.chunks(index.touching(&blocks)?))
    }

    /// The blocks whose data lies before a place in the blob, such as that of a landmark.
    pub fn blocks_before(&self, offset: u64) -> Result<Range<u64>> {
        let index = &self.open()?.index;
        let end = index.partition_point(|record| record.offset < offset)?;
        Ok(0..match end.checked_sub(1) {
            Some(last) => blocks_of(&index.get(last)?).end,
            None => 0,
        })
    }

    /// The chunks that touch some of `blocks` and have to be fetched: they have data, and it was
    /// not checked in this boot. What is on the disk and not checked yet is among them:
    /// [`Layer::verify_blocks`] first.
    pub fn missing(&self, blocks: Range<u64>) -> Result<impl Iterator<Item = Result<Chunk>>> {
        let open = self.open()?;
        let chunks = open.index.chunks(open.index.touching(&blocks)?);
        Ok(chunks.filter(|chunk| {
            chunk.as_ref().map_or(true, |chunk| {
                chunk.record.digest.is_some() && !open.is_verified(chunk.id.0)
            })
        }))
    }

    /// What to fetch for `blocks`: see [`Extents`].
    pub fn extents(&self, blocks: Range<u64>) -> Result<Extents<'_>> {
        let open = self.open()?;
        Ok(Extents::new(open, open.index.touching(&blocks)?))
    }

    /// Whether the chunk `id` was checked in this boot.
    pub fn is_verified(&self, id: ChunkId) -> Result<bool> {
        Ok(self.open()?.is_verified(id.0))
    }

    /// Stores the data of a chunk, if it is right, and returns which blocks are good by that.
    /// A chunk that is there is left alone, and gives no blocks.
    ///
    /// Any number of threads may write at the same time, the same chunk as well.
    pub fn write(&self, chunk: &Chunk, bytes: &[u8]) -> Result<Good> {
        match self.is_indexed() {
            // No digest of a chunk is promised.
            true => Err(Error::Foreign("chunk")),
            false => self.put(chunk, bytes),
        }
    }

    /// The same, for a chunk out of a frame whose own digest was right if there is none of chunks.
    pub(crate) fn put(&self, chunk: &Chunk, bytes: &[u8]) -> Result<Good> {
        let open = self.open()?;
        let (id, record) = (chunk.id.0, &chunk.record);
        if id >= open.index.count || open.index.get(id)? != *record {
            return Err(Error::Foreign("chunk"));
        }
        let Some(expected) = record.digest else {
            return Ok(self.verify_local(chunk)?.unwrap_or_default());
        };
        if open.is_verified(id) {
            return Ok(Good::default());
        }
        let layer = self.number();
        let actual = Digest::of(bytes);
        let is_right = open.digests.is_some() || actual == expected;
        if !is_right || bytes.len() as u64 != record.size {
            return Err(Error::Digest { layer, chunk: chunk.id, expected, actual });
        }
        if let Some(digests) = &open.digests {
            digests.learn(chunk.id, &actual).map_err(|e| {
                Error::io(format_args!("write what is known of the data of layer {layer}"), e)
            })?;
        }
        let hold = open.hold(chunk.blocks());
        let (end, padded) = (record.data + record.size, open.padded_end(id, record)?);
        if bytes.iter().all(|b| *b == 0) {
            open.punch(&(record.data..padded))?;
        } else {
            let zeros = [0; DATA_BLOCK as usize];
            open.data
                .write_all_at(bytes, record.data)
                .and_then(|()| open.data.write_all_at(&zeros[..(padded - end) as usize], end))
                .map_err(|e| Error::io(format_args!("write data of layer {layer}"), e))?;
        }
        self.use_segments(open, &chunk.blocks());
        let good = open.mark(id, record)?;
        Ok(Good::one(good, hold))
    }

    /// Checks a chunk that was written once: if its data is on the disk and right, returns which
    /// blocks are good by that. `None` if it has to be fetched. Chunks of zeros are always there.
    pub fn verify_local(&self, chunk: &Chunk) -> Result<Option<Good>> {
        let open = self.open()?;
        let (id, record) = (chunk.id.0, &chunk.record);
        if id >= open.index.count || open.index.get(id)? != *record {
            return Err(Error::Foreign("chunk"));
        }
        let hold = open.hold(chunk.blocks());
        {
            let marks = lock(&open.marks);
            if marks.verified.get(id) {
                return Ok(Some(Good::default()));
            }
            if record.digest.is_some() && !marks.claimed.get(id) {
                return Ok(None);
            }
        }
        match record.digest {
            None => open.punch(&(record.data..open.padded_end(id, record)?))?,
            Some(expected) => {
                // One that cannot be read is found not to be right.
                let learned = open.digests.as_ref().map(|digests| digests.get(chunk.id));
                let expected = learned.and_then(Result::ok).unwrap_or(expected);
                if !open.is_right(id, record, expected)? {
                    let mut marks = lock(&open.marks);
                    // Somebody else may have written it meanwhile.
                    if !marks.verified.get(id) {
                        open.claim(&mut marks, id, false);
                    }
                    return Ok(None);
                }
            }
        }
        Ok(Some(Good::one(open.mark(id, record)?, hold)))
    }

    /// Makes of `blocks` good what can be made so without fetching, and returns all parts of them
    /// that are good now, whoever made them so.
    ///
    /// What was claimed before the last boot is read and hashed, and held meanwhile: who goes
    /// through a whole layer does it piece by piece.
    pub fn verify_blocks(&self, blocks: Range<u64>) -> Result<Good> {
        let open = self.open()?;
        let hold = open.hold(blocks.clone());
        for chunk in open.index.chunks(open.index.touching(&blocks)?) {
            let chunk = chunk?;
            if !open.is_verified(chunk.id.0) {
                drop(self.verify_local(&chunk)?);
            }
        }
        Ok(Good { ranges: open.good_in(&blocks)?, _hold: Some(hold) })
    }

    /// All blocks that are good.
    pub fn good(&self) -> Result<Good> {
        let (open, all) = (self.open()?, 0..self.data_blocks());
        let hold = open.hold(all.clone());
        Ok(Good { ranges: open.good_in(&all)?, _hold: Some(hold) })
    }

    /// Holds the whole layer, if [`State::Whole`]: as long as the result lives nothing of it is
    /// taken away, and it can be mounted without anybody who fetches.
    pub fn hold_whole(&self) -> Result<Option<Good>> {
        let (open, all) = (self.open()?, 0..self.data_blocks());
        let hold = open.hold(all.clone());
        let is_verified = lock(&open.marks).verified.has_all(0..open.index.count);
        let is_whole = is_verified && self.state() == State::Whole;
        Ok(is_whole.then(|| Good { ranges: vec![all], _hold: Some(hold) }))
    }

    /// Takes over what an earlier process knew to be good: `map` has a bit for each block, the
    /// first in the lowest bit of the first byte.
    ///
    /// The map must have been made in this boot, by who was told of good blocks and of their end,
    /// and be taken over before anything of the layer is given up. In the first life of a boot
    /// there can be no such map ([`crate::LayerStore::is_first_of_boot`]), so it is passed over;
    /// returns whether it was not. Chunks that reach into blocks that are not in the map are
    /// checked again when they are needed.
    pub fn restore(&self, map: &[u8]) -> Result<bool> {
        if !self.restorable {
            return Ok(false);
        }
        let open = self.open()?;
        // Both are bounded: blocks have 32 bits in images.
        let blocks = u32::try_from(self.data_blocks()).unwrap_or(u32::MAX);
        let map = Bits::from_bytes(blocks, map);
        for run in map.runs(0..blocks, true) {
            let chunks = open.index.within(&(run.start.into()..run.end.into()))?;
            lock(&open.marks).verified.set_all(chunks, true);
        }
        Ok(true)
    }

    /// Notes that the layer is in use.
    pub fn touch(&self) {
        let now = SystemTime::now();
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.used.store(seconds, Ordering::Relaxed);
        let on_disk = self.used_on_disk.load(Ordering::Relaxed);
        if seconds.abs_diff(on_disk) >= USED.as_secs() {
            self.used_on_disk.store(seconds, Ordering::Relaxed);
            // It only decides about the order in which layers are given up.
            _ = File::open(self.directory.join(crate::about::ABOUT))
                .and_then(|file| file.set_modified(now));
        }
    }

    /// Notes that `blocks` were missed or read.
    pub fn touch_blocks(&self, blocks: &Range<u64>) {
        if let Some(open) = self.open.get() {
            self.use_segments(open, blocks);
        }
    }

    fn use_segments(&self, open: &Open, blocks: &Range<u64>) {
        let now = self.common.now();
        let first = (blocks.start * DATA_BLOCK / SEGMENT) as usize;
        let last = (blocks.end * DATA_BLOCK).div_ceil(SEGMENT) as usize;
        let last = last.min(open.segments.len());
        for segment in open.segments.get(first..last).unwrap_or_default() {
            segment.store(now, Ordering::Relaxed);
        }
    }

    /// Remembers another repository that the layer was seen in, `host/name`.
    pub fn add_repository(&self, repository: &str) -> Result<()> {
        let mut known = lock(&self.known);
        let mut new = known.changing.clone();
        if new.add(repository)? {
            self.save(&mut known, new, false)?;
        }
        Ok(())
    }

    /// Remembers that the layer is another than its table of contents says.
    pub(crate) fn mark_lying(&self, difference: &str) -> Result<()> {
        let mut known = lock(&self.known);
        let mut new = known.changing.clone();
        new.lies(difference);
        self.save(&mut known, new, true)
    }

    fn save(&self, known: &mut Known, changing: Changing, durable: bool) -> Result<()> {
        let about = About { fixed: self.fixed.clone(), changing };
        about.save(&self.directory, durable)?;
        known.changing = about.changing;
        Ok(())
    }

    /// Notes that all data is there and right, after it is on the disk.
    pub(crate) fn mark_whole(&self) -> Result<()> {
        let open = self.open()?;
        let _hold = open.hold(0..self.data_blocks());
        if !lock(&open.marks).verified.has_all(0..open.index.count) {
            return Err(Error::Evicted(self.number()));
        }
        // Whatever the options say: it will be believed after the next boot.
        disk::sync(&self.data_path(), &open.data)?;
        let mut known = lock(&self.known);
        let path = self.directory.join(WHOLE);
        disk::sync(&path, &disk::create(&path)?)?;
        disk::sync_directory(&self.directory)?;
        known.is_whole = true;
        Ok(())
    }

    /// Notes that not all data is there, before it is so, also on the disk.
    pub(crate) fn mark_lazy(&self) -> Result<()> {
        let mut known = lock(&self.known);
        let path = self.directory.join(WHOLE);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(Error::at("remove", &path))?,
        }
        disk::sync_directory(&self.directory)?;
        known.is_whole = false;
        Ok(())
    }
}

impl Good {
    fn one(blocks: Range<u64>, hold: Hold) -> Self {
        Self {
            ranges: (!blocks.is_empty()).then_some(blocks).into_iter().collect(),
            _hold: Some(hold),
        }
    }
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer")
            .field("number", &self.number())
            .field("key", &self.key())
            .finish_non_exhaustive()
    }
}

/// Hashes and counts what is written to it.
pub(crate) struct DigestOf(pub Hasher, pub u64);

impl io::Write for DigestOf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        self.1 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
