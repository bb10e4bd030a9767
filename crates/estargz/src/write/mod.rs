//! Writes indexed layers.
//!
//! The tar stays as it is, to the byte: the writer gets its bytes in order and only decides where
//! members or frames begin. A chunk of a file begins one of its own; what follows it (padding,
//! headers of entries without data) goes on in the same member in eStargz, as other writers have
//! it, and in a frame of its own in zstd:chunked, for containers/storage wants frames that hold
//! nothing but the chunk. Where they begin depends on the tar and the options alone, so the blob is
//! the same for any number of threads.

mod order;
mod pool;
mod sample;
mod tarsplit;
mod toc;

pub use order::Order;
pub use sample::is_hard;

use crate::{
    Annotated, Codec, Error, Expected, Layout, MAX_CHUNK, Result, TarEntry, TarKind, Toc,
    TocDigest, annotations,
    error::{Problem, Shown},
    footer,
    tar::{BLOCK, own_header, padding},
    toc::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME, Time},
};
use pool::{Batch, Compressor, Pool};
use shipway_oci::{DiffId, Digest, Hasher};
use std::{collections::BTreeMap, io, num::NonZero, ops::Range};
use tarsplit::TarSplit;
use toc::{ChunkRow, Row};

/// Bytes of a chunk where the options say nothing.
const CHUNK: u64 = 4 << 20;
/// A run of headers is cut after so many bytes.
const HEADERS: usize = 4 << 20;
/// Members and frames are handed to the threads that compress when they have so many bytes.
const BATCH: usize = 512 << 10;
/// What is in a landmark.
const LANDMARK: &[u8] = &[0x0f];

/// A format of indexed layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// eStargz with the table of contents at its end.
    Estargz,
    /// eStargz whose table of contents is stored elsewhere, so that the layer's tar is the one that
    /// was given.
    EstargzExternal,
    /// zstd:chunked. The blob is read by stargz-snapshotter and, if chunks are not packed, by
    /// containers/storage.
    ZstdChunked,
}

impl Output {
    /// How it is compressed.
    pub fn codec(self) -> Codec {
        if self == Self::ZstdChunked { Codec::Zstd } else { Codec::Gzip }
    }
}

/// How to write a layer.
#[derive(Clone, Debug)]
pub struct WriterOptions {
    /// The format.
    pub output: Output,
    /// Level as the algorithm counts it (gzip 0 to 12, zstd 1 to 22); `None` for the fastest that
    /// is worth it.
    pub level: Option<i32>,
    /// Bytes of a chunk, at most [`MAX_CHUNK`].
    pub chunk_size: u64,
    /// Uncompressed bytes that a member or frame should have at least: small files are packed
    /// together, which makes the blob smaller and each read of one fetch its neighbors. 0 packs
    /// nothing. Readers before stargz-snapshotter 0.13, and containers/storage, do not know packed
    /// chunks.
    pub min_chunk_size: u64,
    /// Whether a zstd:chunked blob has the tar-split, without which containers/storage does not use
    /// the index.
    pub tar_split: bool,
    /// Threads that compress.
    pub threads: NonZero<usize>,
}

impl WriterOptions {
    /// The usual ones for a format.
    pub fn new(output: Output) -> Self {
        let tar_split = output == Output::ZstdChunked;
        Self {
            output,
            level: None,
            chunk_size: CHUNK,
            min_chunk_size: 0,
            tar_split,
            threads: NonZero::<usize>::MIN,
        }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Written {
    /// Digest of the tar that the blob holds, which has the table of contents at its end in
    /// [`Output::Estargz`].
    pub diff_id: DiffId,
    /// Length of that tar.
    pub tar_size: u64,
    /// The hash of the tar without the table of contents: the one that was given, and landmarks.
    /// What follows that tar can be added to it.
    pub payload: Hasher,
    /// Digest of the blob.
    pub digest: Digest,
    /// Length of the blob.
    pub size: u64,
    /// Digest of the table's JSON.
    pub toc_digest: Digest,
    /// The table of contents as a blob of its own, in [`Output::EstargzExternal`].
    pub external_toc: Option<Vec<u8>>,
    zstd: Option<Places>,
}

/// Where what follows the data of a zstd:chunked blob is.
#[derive(Clone, Debug)]
struct Places {
    toc: Range<u64>,
    toc_size: u64,
    compressed: Digest,
    tar_split: Option<(Range<u64>, u64)>,
    /// Whether frames may hold several chunks.
    packed: bool,
}

/// Which reader's annotations a layer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// stargz-snapshotter's, and ours: containerd hands them to snapshotters.
    Containerd,
    /// containers/storage's. It takes no layer that has the others as well.
    Podman,
}

impl Written {
    /// Annotations for the layer's descriptor, without which the index is not used. There are none
    /// for a reader that would misread the chunks: it takes the layer as a whole.
    pub fn annotations(&self, dialect: Dialect) -> BTreeMap<String, String> {
        let mut all = BTreeMap::from([(annotations::UNCOMPRESSED_SIZE, self.tar_size.to_string())]);
        if dialect == Dialect::Containerd || self.zstd.is_none() {
            all.insert(annotations::TOC_DIGEST, self.toc_digest.to_string());
        }
        if let Some(places) =
            self.zstd.as_ref().filter(|places| dialect == Dialect::Containerd || !places.packed)
        {
            let (checksum, position) = match dialect {
                Dialect::Containerd => (annotations::STARGZ_CHECKSUM, annotations::STARGZ_POSITION),
                Dialect::Podman => (annotations::PODMAN_CHECKSUM, annotations::PODMAN_POSITION),
            };
            let place = |range: &Range<u64>, whole: u64| {
                format!("{}:{}:{whole}", range.start, range.end - range.start)
            };
            all.insert(checksum, places.compressed.to_string());
            all.insert(
                position,
                format!("{}:{}", place(&places.toc, places.toc_size), footer::TYPE_CRFS),
            );
            if let (Dialect::Podman, Some((range, whole))) = (dialect, &places.tar_split) {
                all.insert(annotations::PODMAN_TAR_SPLIT, place(range, *whole));
            }
        }
        all.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }
}

/// Writes a layer: for each entry of the tar [`Writer::entry`], then [`Writer::data`] until its
/// data is complete, with every byte of the tar in order; at the end [`Writer::finish`].
pub struct Writer<S> {
    options: WriterOptions,
    pool: Pool,
    out: Out<S>,
    rows: Vec<Row>,
    units: Units,
    /// The hash of the tar, if it was taken before.
    known: Option<Hasher>,
    file: Option<Current>,
    tar_split: Option<TarSplit>,
}

/// The members or frames that are being filled.
#[derive(Default)]
struct Units {
    batch: Batch,
    /// Where the open one begins in the batch.
    start: usize,
    /// Number of the open one.
    number: usize,
}

impl Units {
    /// Bytes of the tar in the open one.
    fn len(&self) -> usize {
        self.batch.bytes().len() - self.start
    }

    /// Ends the open one, and hands all to the threads if that is enough.
    fn flush<S: FnMut(&[u8]) -> io::Result<()>>(
        &mut self,
        pool: &mut Pool,
        out: &mut Out<S>,
        rows: &mut [Row],
    ) -> Result<()> {
        if self.len() == 0 {
            return Ok(());
        }
        self.number += 1;
        self.start = self.batch.bytes().len();
        self.batch.units.push(self.start);
        if self.start < BATCH { Ok(()) } else { self.submit(pool, out, rows) }
    }

    /// Hands all that were ended to the threads, and writes what they have done if enough is on its
    /// way.
    fn submit<S: FnMut(&[u8]) -> io::Result<()>>(
        &mut self,
        pool: &mut Pool,
        out: &mut Out<S>,
        rows: &mut [Row],
    ) -> Result<()> {
        if self.batch.units.is_empty() {
            return Ok(());
        }
        while pool.is_full() {
            receive(pool, out, rows)?;
        }
        self.start = 0;
        let empty = pool.batch();
        pool.submit(std::mem::replace(&mut self.batch, empty))
    }
}

/// A chunk of an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChunkPlace {
    row: usize,
    chunk: usize,
}

/// The file whose data is given.
struct Current {
    row: usize,
    size: u64,
    /// Bytes of finished chunks.
    have: u64,
    /// Bytes of the open chunk, and where it begins in the unit.
    chunk: u64,
    start: usize,
    /// Of all data, if there will be several chunks.
    whole: Option<Hasher>,
}

impl Current {
    /// Bytes that the open chunk will have.
    fn chunk_size(&self, options: &WriterOptions) -> u64 {
        options.chunk_size.min(self.size - self.have)
    }
}

/// The blob as far as it is written.
struct Out<S> {
    sink: S,
    hasher: Hasher,
    size: u64,
    /// Where the units begin.
    units: Vec<u64>,
}

impl<S: FnMut(&[u8]) -> io::Result<()>> Out<S> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok((self.sink)(bytes)?)
    }
}

impl<S: FnMut(&[u8]) -> io::Result<()>> Writer<S> {
    /// A writer of a blob whose bytes go to `sink` in order.
    pub fn new(options: WriterOptions, sink: S) -> Result<Self> {
        Self::make(options, None, sink)
    }

    /// The same for a tar whose hash was taken before, and which stays as it is: it is not taken
    /// again.
    pub fn of_known(options: WriterOptions, tar: Hasher, sink: S) -> Result<Self> {
        Self::make(options, Some(tar), sink)
    }

    fn make(options: WriterOptions, known: Option<Hasher>, sink: S) -> Result<Self> {
        if options.chunk_size == 0 || options.chunk_size > MAX_CHUNK {
            return Err(Error::TooLarge {
                what: "a chunk",
                size: options.chunk_size,
                limit: MAX_CHUNK,
            });
        }
        if options.min_chunk_size > MAX_CHUNK {
            return Err(Error::TooLarge {
                what: "a packed chunk",
                size: options.min_chunk_size,
                limit: MAX_CHUNK,
            });
        }
        let (codec, level) = (options.output.codec(), options.level);
        let pool = Pool::new(codec, level, options.threads, known.is_none())?;
        let tar_split =
            (options.output == Output::ZstdChunked && options.tar_split).then(TarSplit::new);
        let out = Out { sink, hasher: Hasher::new(), size: 0, units: Vec::new() };
        let rows = Vec::new();
        Ok(Self { options, pool, out, rows, units: Units::default(), known, file: None, tar_split })
    }

    /// The next entry; `header` is all bytes of the tar from the end of the last one's data to the
    /// beginning of this one's. If it is a file, its data follows.
    pub fn entry(&mut self, entry: &TarEntry, header: &[u8]) -> Result<()> {
        self.check_complete()?;
        let refuse = |problem| Err(Error::entry(self.rows.len(), &entry.path, problem));
        if let TarKind::Other(_) = entry.kind {
            return refuse(Problem::NoType);
        }
        // JSON has no other text.
        if std::str::from_utf8(&entry.path).is_err() {
            return refuse(Problem::BadName);
        }
        if let TarKind::HardLink(target) | TarKind::Symlink(target) = &entry.kind
            && std::str::from_utf8(target).is_err()
        {
            return refuse(Problem::BadName);
        }
        if entry.xattrs.iter().any(|(name, _)| std::str::from_utf8(name).is_err()) {
            return refuse(Problem::Xattrs);
        }
        self.header(header)?;
        if let Some(split) = &mut self.tar_split {
            split.entry(entry)?;
        }
        let row = self.rows.len();
        self.rows.push(Row::new(entry.clone()));
        if let TarKind::File(size @ 1..) = entry.kind {
            let whole = (size > self.options.chunk_size).then(Hasher::new);
            self.file = Some(Current { row, size, have: 0, chunk: 0, start: 0, whole });
        }
        Ok(())
    }

    /// A landmark, between two entries: what comes before it should be fetched at once, or nothing.
    pub fn landmark(&mut self, prefetch: bool) -> Result<()> {
        let path = if prefetch { PREFETCH_LANDMARK } else { NO_PREFETCH_LANDMARK };
        let kind = TarKind::File(LANDMARK.len() as u64);
        let entry = TarEntry {
            path: path.into(),
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: Vec::new(),
        };
        self.entry(&entry, &own_header(path, LANDMARK.len() as u64))?;
        // Its place is what it is for.
        self.flush()?;
        self.data(LANDMARK)?;
        self.raw(&[0; BLOCK][..padding(LANDMARK.len() as u64)])
    }

    /// Bytes of the tar that belong to no entry: padding, and the end of the archive. Padding may
    /// as well come with the next header.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.check_complete()?;
        self.header(bytes)
    }

    fn header(&mut self, bytes: &[u8]) -> Result<()> {
        if self.units.len() >= HEADERS {
            self.flush()?;
        }
        if let Some(split) = &mut self.tar_split {
            split.segment(bytes);
        }
        self.units.batch.push(bytes);
        Ok(())
    }

    fn check_complete(&self) -> Result<()> {
        match &self.file {
            Some(file) => {
                Err(Error::entry(file.row, &self.rows[file.row].entry.path, Problem::ChunkSum))
            }
            None => Ok(()),
        }
    }

    /// Data of the last entry, in order.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let room = self.room(bytes.len())?;
            let (now, later) = bytes.split_at(room.len());
            room.copy_from_slice(now);
            self.filled(now.len())?;
            bytes = later;
        }
        Ok(())
    }

    /// Whether data of the last entry is still to come.
    pub fn wants_data(&self) -> bool {
        self.file.is_some()
    }

    /// Room for the next data of the last entry, at most `most` bytes and as far as its chunk goes,
    /// so that it can be read into its place; [`Writer::filled`] says how much was.
    pub fn room(&mut self, most: usize) -> Result<&mut [u8]> {
        let Some(file) = &mut self.file else {
            return Err(Error::Io(io::Error::other(
                "a layer's file has more data than its header says",
            )));
        };
        if file.chunk == 0 {
            // The landmark has flushed already.
            if self.units.len() as u64 >= self.options.min_chunk_size {
                self.units.flush(&mut self.pool, &mut self.out, &mut self.rows)?;
            }
            file.start = self.units.len();
        }
        let left = file.chunk_size(&self.options) - file.chunk;
        Ok(self.units.batch.room(most.min(usize::try_from(left).unwrap_or(usize::MAX))))
    }

    /// The first `n` bytes of the room are data, the rest of it is given back.
    pub fn filled(&mut self, n: usize) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let batch = &mut self.units.batch;
        let start = batch.bytes().len();
        batch.filled(n);
        let data = &batch.bytes()[start..];
        if let Some(whole) = &mut file.whole {
            whole.update(data);
        }
        if let Some(split) = &mut self.tar_split {
            split.data(data);
        }
        let size = file.chunk_size(&self.options);
        file.chunk += data.len() as u64;
        if file.chunk < size {
            return Ok(());
        }
        let row = &mut self.rows[file.row];
        let place = ChunkPlace { row: file.row, chunk: row.chunks.len() };
        row.chunks.push(ChunkRow {
            unit: self.units.number,
            inner: file.start as u64,
            file_offset: file.have,
            size,
            digest: None,
        });
        batch.chunks.push((place, self.units.start + file.start..batch.bytes().len()));
        file.have += size;
        file.chunk = 0;
        if file.have < file.size {
            return Ok(());
        }
        row.digest = file.whole.take().map(Hasher::finish);
        self.file = None;
        if let Some(split) = &mut self.tar_split {
            split.end();
        }
        // A frame holds the chunk and nothing else.
        if self.options.output == Output::ZstdChunked && self.options.min_chunk_size == 0 {
            self.flush()?;
        }
        Ok(())
    }

    /// Ends the current member or frame.
    fn flush(&mut self) -> Result<()> {
        self.units.flush(&mut self.pool, &mut self.out, &mut self.rows)
    }

    /// Writes what is left, the table of contents and the footer.
    ///
    /// The table is read again as any other would be, so what is written can be read.
    pub fn finish(mut self) -> Result<Written> {
        self.check_complete()?;
        self.flush()?;
        self.units.submit(&mut self.pool, &mut self.out, &mut self.rows)?;
        while self.pool.has_work() {
            receive(&mut self.pool, &mut self.out, &mut self.rows)?;
        }
        let payload_end = self.out.size;
        self.out.units.push(payload_end);
        let (hashed, mut tar_size) = self.pool.finish()?;
        let payload = hashed.or(self.known.take()).unwrap_or_default();
        let mut tar = payload.clone();
        let codec = self.options.output.codec();
        let mut compressor = Compressor::new(codec, self.options.level)?;
        let split = self.tar_split.take().map(|split| split.finish(&mut compressor)).transpose()?;
        let json = toc::json(
            &self.rows,
            &self.out.units,
            codec,
            split.as_ref().map(|split| split.digest),
        )?;
        let toc_digest = Digest::of(&json);
        let (mut zstd, mut external_toc) = (None, None);
        let compressed = match self.options.output {
            Output::Estargz | Output::EstargzExternal => {
                let header = own_header(TOC_NAME, json.len() as u64);
                let member =
                    [&header[..], &json, &vec![0; padding(json.len() as u64) + 2 * BLOCK]].concat();
                let compressed = compressor.compress(&member)?.to_vec();
                if self.options.output == Output::Estargz {
                    tar.update(&member);
                    tar_size += member.len() as u64;
                    self.out.put(&compressed)?;
                    self.out.put(&footer::write_gzip(payload_end))?;
                } else {
                    self.out.put(&footer::write_external())?;
                    external_toc = Some(compressed.clone());
                }
                compressed
            }
            Output::ZstdChunked => {
                let compressed = compressor.compress(&json)?.to_vec();
                let start = payload_end + footer::FRAME_HEADER as u64;
                let toc = start..start + compressed.len() as u64;
                self.out.put(&footer::skippable(&compressed))?;
                let tar_split = match split {
                    Some(split) => {
                        let start = self.out.size + footer::FRAME_HEADER as u64;
                        self.out.put(&footer::skippable(&split.compressed))?;
                        Some((start..start + split.compressed.len() as u64, split.size))
                    }
                    None => None,
                };
                let packed = self.options.min_chunk_size > 0;
                // containers/storage goes by annotations alone, so the footer is
                // stargz-snapshotter's.
                let numbers =
                    [toc.start, compressed.len() as u64, json.len() as u64, footer::TYPE_CRFS];
                let content: Vec<u8> = numbers
                    .iter()
                    .flat_map(|n| n.to_le_bytes())
                    .chain(*footer::MAGIC_STARGZ)
                    .collect();
                self.out.put(&footer::skippable(&content))?;
                zstd = Some(Places {
                    toc,
                    toc_size: json.len() as u64,
                    compressed: Digest::of(&compressed),
                    tar_split,
                    packed,
                });
                compressed
            }
        };
        let expected =
            Expected { digest: TocDigest::Json(toc_digest), uncompressed_size: Some(tar_size) };
        let layout = Layout {
            codec,
            payload_end,
            toc: None,
            toc_size: zstd.as_ref().map(|places| places.toc_size),
            tar_split: None,
        };
        Toc::read(&compressed, &layout, &expected)?;
        let diff_id = DiffId(tar.finish());
        let (digest, size) = (self.out.hasher.finish(), self.out.size);
        Ok(Written { diff_id, tar_size, payload, digest, size, toc_digest, external_toc, zstd })
    }
}

/// Takes one result, and writes those whose turn it is.
fn receive<S: FnMut(&[u8]) -> io::Result<()>>(
    pool: &mut Pool,
    out: &mut Out<S>,
    rows: &mut [Row],
) -> Result<()> {
    for mut done in pool.receive()? {
        out.units.extend(done.units.iter().map(|start| out.size + *start as u64));
        out.put(&done.compressed)?;
        for (place, digest) in done.digests.drain(..) {
            rows[place.row].chunks[place.chunk].digest = Some(digest);
        }
        pool.recycle(done);
    }
    Ok(())
}

impl Annotated {
    /// What the annotations of a layer that was just written say.
    pub fn of(written: &Written, dialect: Dialect) -> Result<Self> {
        Self::read(&written.annotations(dialect))?
            .ok_or(Error::Annotation { key: annotations::TOC_DIGEST, value: Shown::new(b"") })
    }
}
