//! Checks entries one by one, in the order of the table, and puts them together.

use super::{
    Chunk, Content, EntryId, Landmark, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, Payload, Record,
    Span, TOC_NAME, Tag, Time, Toc,
    names::{self, MAX_PATH},
    text,
};
use crate::{
    Codec, Error, Result,
    error::{Problem, Shown},
};
use shipway_oci::Digest;
use std::iter;

/// Most entries of a table, chunks counted.
pub const MAX_ENTRIES: usize = 2 << 20;
/// Most bytes of a chunk: it is in memory as a whole before its digest is known. Writers use 4 MiB.
pub const MAX_CHUNK: u64 = 64 << 20;
/// Most bytes that are skipped in a frame before a chunk.
pub const MAX_INNER: u64 = 256 << 20;
/// Most bytes of all files of a layer.
pub const MAX_DATA: u64 = 1 << 40;
/// Most extended attributes of an entry.
pub const MAX_XATTRS: usize = 256;
/// Most bytes of an attribute's value (`XATTR_SIZE_MAX`).
pub const MAX_XATTR: usize = 64 << 10;
/// Largest major number of a device that Linux knows.
pub const MAX_MAJOR: u32 = (1 << 12) - 1;
/// Largest minor number.
pub const MAX_MINOR: u32 = (1 << 20) - 1;

/// Most bytes of a block of zstd, compressed or not (RFC 8878 3.1.1.2.4).
const ZSTD_BLOCK: u64 = 128 << 10;

/// The types of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawKind {
    Entry(Tagged),
    Chunk,
}

/// A type that is no chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tagged(pub Tag);

/// An entry as it is in the JSON; the parser fills one again and again.
#[derive(Debug, Default)]
pub struct Raw {
    pub kind: Option<RawKind>,
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub size: u64,
    pub mode: u64,
    pub uid: u64,
    pub gid: u64,
    pub mtime: Time,
    pub major: u64,
    pub minor: u64,
    pub offset: u64,
    pub end_offset: u64,
    pub inner: u64,
    pub chunk_offset: u64,
    pub chunk_size: u64,
    pub digest: Option<Digest>,
    pub chunk_digest: Option<Digest>,
    pub zeros: bool,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Raw {
    pub fn clear(&mut self) {
        let (mut name, mut link, mut xattrs) = (
            std::mem::take(&mut self.name),
            std::mem::take(&mut self.link),
            std::mem::take(&mut self.xattrs),
        );
        name.clear();
        link.clear();
        xattrs.clear();
        *self = Self { name, link, xattrs, ..Self::default() };
    }
}

/// A file whose chunks are being read.
struct Open {
    id: EntryId,
    /// Position in the table, for errors.
    index: usize,
    size: u64,
    /// How much of it the chunks so far have.
    have: u64,
    digest: Option<Digest>,
    /// Where its data ends in the blob, if the table says so.
    end_offset: u64,
}

pub struct Builder {
    codec: Codec,
    /// Where the data of the layer ends in the blob.
    payload_end: u64,
    /// What was declared of the length of the whole tar.
    declared: u64,
    toc: Toc,
    /// Entries so far, chunks counted.
    index: usize,
    open: Option<Open>,
    /// The first chunk of the current frame.
    frame: usize,
    landmarks: [Option<EntryId>; 2],
}

impl Builder {
    pub fn new(codec: Codec, payload_end: u64, declared: Option<u64>) -> Self {
        let toc = Toc {
            text: Vec::new(),
            entries: Vec::new(),
            chunks: Vec::new(),
            xattrs: Vec::new(),
            by_path: Vec::new(),
            implicit: Vec::new(),
            files: Vec::new(),
            data_size: 0,
            landmark: None,
            tar_split: None,
            is_plain: false,
        };
        let declared = declared.unwrap_or(MAX_DATA).min(MAX_DATA);
        Self {
            codec,
            payload_end,
            declared,
            toc,
            index: 0,
            open: None,
            frame: 0,
            landmarks: [None; 2],
        }
    }

    /// For an ordinary layer. Where its frames end is not known before the end.
    pub fn plain(codec: Codec) -> Self {
        let mut builder = Self::new(codec, u64::MAX, None);
        builder.toc.is_plain = true;
        builder
    }

    /// Entries so far, chunks counted.
    pub fn len(&self) -> usize {
        self.index
    }

    pub fn tar_split(&mut self, digest: Digest) {
        self.toc.tar_split = Some(digest);
    }

    /// The next entry.
    pub fn push(&mut self, raw: &Raw) -> Result<()> {
        let limit = MAX_ENTRIES as u64;
        if self.index >= MAX_ENTRIES {
            return Err(Error::TooLarge {
                what: "a table of contents with entries",
                size: limit + 1,
                limit,
            });
        }
        let done = match raw.kind {
            None => Err(Problem::NoType),
            Some(RawKind::Chunk) => self.chunk(raw),
            Some(RawKind::Entry(Tagged(tag))) => self.close().and_then(|()| self.entry(tag, raw)),
        };
        done.map_err(|problem| self.error(raw, problem))?;
        self.index += 1;
        Ok(())
    }

    /// The error about the entry that comes next.
    pub fn error(&self, raw: &Raw, problem: Problem) -> Error {
        // What is found missing is of the file before.
        match (&self.open, &problem) {
            (Some(open), Problem::ChunkSum) => Error::entry(
                open.index,
                text(&self.toc.text, self.toc.entries[open.id.index()].path),
                problem,
            ),
            _ => Error::entry(self.index, &raw.name, problem),
        }
    }

    fn entry(&mut self, tag: Tag, raw: &Raw) -> std::result::Result<(), Problem> {
        let id = EntryId(self.toc.entries.len() as u32);
        let path = self.put(|out| names::clean(&raw.name, out))?;
        let name = text(&self.toc.text, path);
        if name.is_empty() && tag != Tag::Directory {
            return Err(Problem::NotADirectory(Shown::new(b"/")));
        }
        // In an eStargz layer the tar has the table itself there.
        if !self.toc.is_plain && self.codec == Codec::Gzip && name == TOC_NAME.as_bytes() {
            return Err(Problem::Reserved);
        }
        for (slot, landmark) in
            self.landmarks.iter_mut().zip([PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK])
        {
            if !self.toc.is_plain && tag == Tag::File && name == landmark.as_bytes() {
                *slot = Some(id);
            }
        }
        let owner = |n: u64, what| u32::try_from(n).map_err(|_| Problem::Range(what));
        let (uid, gid) = (owner(raw.uid, "owner")?, owner(raw.gid, "group")?);
        let payload = self.payload(tag, raw)?;
        let xattrs = self.xattrs(raw)?;
        let mode = (raw.mode & 0o7777) as u16;
        let Time { seconds, nanoseconds } = raw.mtime;
        let chunks = (self.toc.chunks.len() as u32, 0);
        self.toc.entries.push(Record {
            path,
            kind: tag,
            mode,
            uid,
            gid,
            seconds,
            nanoseconds,
            payload,
            chunks,
            xattrs,
        });
        if let Payload::Size(size @ 1..) = payload {
            let total = self.toc.data_size.checked_add(size).filter(|t| *t <= self.declared);
            self.toc.data_size = total.ok_or(Problem::TooMuchData(self.declared))?;
            self.open = Some(Open {
                id,
                index: self.index,
                size,
                have: 0,
                digest: raw.digest,
                end_offset: raw.end_offset,
            });
            self.data(raw)?;
        }
        Ok(())
    }

    fn payload(&mut self, tag: Tag, raw: &Raw) -> std::result::Result<Payload, Problem> {
        Ok(match tag {
            Tag::Directory | Tag::Fifo => Payload::None,
            Tag::File => Payload::Size(raw.size),
            Tag::Symlink if raw.link.is_empty() || raw.link.contains(&0) => {
                return Err(Problem::BadName);
            }
            Tag::Symlink if raw.link.len() > MAX_PATH => return Err(Problem::NameTooLong),
            Tag::Symlink => Payload::Target(self.put(|out| {
                out.extend_from_slice(&raw.link);
                Ok(())
            })?),
            // Found when all names are known.
            Tag::HardLink => Payload::Target(self.put(|out| names::clean(&raw.link, out))?),
            Tag::Char | Tag::Block => {
                let number = |n: u64, max: u32| {
                    u32::try_from(n).ok().filter(|n| *n <= max).ok_or(Problem::Range("device"))
                };
                Payload::Device(number(raw.major, MAX_MAJOR)?, number(raw.minor, MAX_MINOR)?)
            }
        })
    }

    fn xattrs(&mut self, raw: &Raw) -> std::result::Result<(u32, u16), Problem> {
        let at = self.toc.xattrs.len() as u32;
        let bad = |(name, value): &(Vec<u8>, Vec<u8>)| {
            name.is_empty()
                || name.len() > names::MAX_NAME
                || name.contains(&0)
                || value.len() > MAX_XATTR
        };
        if raw.xattrs.len() > MAX_XATTRS || raw.xattrs.iter().any(bad) {
            return Err(Problem::Xattrs);
        }
        for (name, value) in &raw.xattrs {
            let put = |this: &mut Self, bytes: &[u8]| {
                this.put(|out| {
                    out.extend_from_slice(bytes);
                    Ok(())
                })
            };
            let pair = (put(self, name)?, put(self, value)?);
            self.toc.xattrs.push(pair);
        }
        Ok((at, raw.xattrs.len() as u16))
    }

    /// Puts something into the buffer of names, which cannot be longer than the JSON it comes from.
    fn put(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> std::result::Result<(), Problem>,
    ) -> std::result::Result<Span, Problem> {
        let at = self.toc.text.len();
        write(&mut self.toc.text)?;
        Ok(Span { at: at as u32, len: (self.toc.text.len() - at) as u32 })
    }

    fn chunk(&mut self, raw: &Raw) -> std::result::Result<(), Problem> {
        let Some(open) = self.open.as_mut().filter(|open| open.have > 0) else {
            return Err(Problem::StrayChunk);
        };
        if open.have == open.size {
            return Err(Problem::StrayChunk);
        }
        if raw.chunk_offset != open.have {
            return Err(Problem::ChunkGap);
        }
        open.end_offset = raw.end_offset.max(open.end_offset);
        let file = self.toc.entries[open.id.index()].path;
        if !raw.name.is_empty() {
            let mut name = Vec::new();
            names::clean(&raw.name, &mut name)?;
            if name != text(&self.toc.text, file) {
                return Err(Problem::StrayChunk);
            }
        }
        self.data(raw)
    }

    /// A chunk of the open file.
    fn data(&mut self, raw: &Raw) -> std::result::Result<(), Problem> {
        let Some(open) = &mut self.open else { return Err(Problem::StrayChunk) };
        let left = open.size - open.have;
        if raw.chunk_offset != open.have {
            return Err(Problem::ChunkGap);
        }
        // Zero means: to the end of the file.
        let size = if raw.chunk_size == 0 { left } else { raw.chunk_size };
        if size > left {
            return Err(Problem::ChunkSum);
        }
        let is_only = size == open.size;
        let content = match (raw.zeros, raw.chunk_digest, open.digest) {
            (true, ..) => Content::Zeros,
            (false, Some(chunk), Some(file)) if is_only && chunk != file => {
                return Err(Problem::Digests);
            }
            (false, Some(digest), _) => Content::Data(digest),
            // Older writers and containers/storage give a file in one piece a digest of its own
            // only.
            (false, None, Some(digest)) if is_only => Content::Data(digest),
            (false, None, _) => return Err(Problem::Undigested),
        };
        if size > MAX_CHUNK && content != Content::Zeros {
            return Err(Problem::ChunkTooLarge(size));
        }
        if raw.offset >= self.payload_end {
            return Err(Problem::Outside);
        }
        if raw.inner > MAX_INNER {
            return Err(Problem::Range("place in a frame"));
        }
        // A blob begins with the header of a file, never with its data.
        if raw.offset == 0 && raw.inner == 0 {
            return Err(Problem::Order);
        }
        if let Some(last) = self.toc.chunks.last() {
            if raw.offset < last.offset
                || (raw.offset == last.offset && raw.inner < last.inner + last.size)
            {
                return Err(Problem::Order);
            }
            if raw.offset > last.offset {
                end_frame(self.codec, &mut self.toc.chunks[self.frame..], raw.offset);
                self.frame = self.toc.chunks.len();
            }
        }
        let (file_offset, file) = (open.have, open.id);
        open.have += size;
        let end = if open.have == open.size { open.end_offset } else { 0 };
        self.toc.chunks.push(Chunk {
            file,
            file_offset,
            size,
            offset: raw.offset,
            end,
            inner: raw.inner,
            content,
        });
        self.toc.entries[file.index()].chunks.1 += 1;
        Ok(())
    }

    /// Ends the file whose chunks were read, if there is one.
    fn close(&mut self) -> std::result::Result<(), Problem> {
        let Some(open) = &self.open else { return Ok(()) };
        if open.have != open.size {
            return Err(Problem::ChunkSum);
        }
        if let (Some(digest), 2..) = (open.digest, self.toc.entries[open.id.index()].chunks.1) {
            self.toc.files.push((open.id, digest));
        }
        self.open = None;
        Ok(())
    }

    /// The table, when all entries are in.
    pub fn finish(mut self) -> Result<Toc> {
        self.close().map_err(|problem| self.error(&Raw::default(), problem))?;
        end_frame(self.codec, &mut self.toc.chunks[self.frame..], self.payload_end);
        self.sort()?;
        self.link()?;
        self.parents()?;
        let start = |id: EntryId| match &self.toc.chunks
            [super::range(self.toc.entries[id.index()].chunks)]
        {
            [first, ..] => first.offset,
            [] => 0,
        };
        // stargz-snapshotter looks in this order, too.
        self.toc.landmark = match self.landmarks {
            [_, Some(_)] => Some(Landmark::NoPrefetch),
            [Some(id), None] => Some(Landmark::Prefetch { end: start(id) }),
            [None, None] => None,
        };
        self.toc.text.shrink_to_fit();
        self.toc.entries.shrink_to_fit();
        self.toc.chunks.shrink_to_fit();
        Ok(self.toc)
    }

    /// An error about an entry by its position among entries.
    fn about(&self, id: EntryId, problem: Problem) -> Error {
        let record = &self.toc.entries[id.index()];
        // Chunks after the first of each file count, too.
        let chunks = record.chunks.0 as usize;
        let files = self.toc.entries[..id.index()].iter().filter(|e| e.chunks.1 > 0).count();
        Error::entry(id.index() + chunks - files, text(&self.toc.text, record.path), problem)
    }

    fn sort(&mut self) -> Result<()> {
        let path = |id: &EntryId| text(&self.toc.text, self.toc.entries[id.index()].path);
        let mut order: Vec<EntryId> = (0..self.toc.entries.len() as u32).map(EntryId).collect();
        order.sort_by(|a, b| names::compare(path(a), path(b)));
        if let Some(pair) = order.windows(2).find(|pair| path(&pair[0]) == path(&pair[1])) {
            return Err(self.about(pair[1], Problem::Duplicate));
        }
        self.toc.by_path = order;
        Ok(())
    }

    /// Resolves hard links, which lead to entries before them, so that there are no circles.
    fn link(&mut self) -> Result<()> {
        for id in (0..self.toc.entries.len() as u32).map(EntryId) {
            let record = self.toc.entries[id.index()];
            let (Tag::HardLink, Payload::Target(span)) = (record.kind, record.payload) else {
                continue;
            };
            let found = self.toc.find(text(&self.toc.text, span)).map(|entry| entry.resolved().id);
            let found = found.filter(|target| {
                *target < id && self.toc.entries[target.index()].kind != Tag::Directory
            });
            // One that is not resolved yet comes later.
            let found =
                found.filter(|target| self.toc.entries[target.index()].kind != Tag::HardLink);
            let Some(target) = found else {
                return Err(
                    self.about(id, Problem::LinkTarget(Shown::new(text(&self.toc.text, span))))
                );
            };
            self.toc.entries[id.index()].payload = Payload::Entry(target);
        }
        Ok(())
    }

    /// Checks that what is above an entry is a directory, and finds those without entry.
    fn parents(&mut self) -> Result<()> {
        // The directories above the current entry.
        let mut above: Vec<Span> = Vec::new();
        for at in 0..self.toc.by_path.len() {
            let id = self.toc.by_path[at];
            let record = self.toc.entries[id.index()];
            let path = text(&self.toc.text, record.path);
            let is_above = |dir: &Span| {
                let dir = text(&self.toc.text, *dir);
                dir.is_empty() || path.strip_prefix(dir).is_some_and(|rest| rest.starts_with(b"/"))
            };
            while above.last().is_some_and(|dir| !is_above(dir)) {
                above.pop();
            }
            // An entry that is no directory and has something below it comes right before that.
            if let Some(before) = at.checked_sub(1).map(|n| self.toc.by_path[n]) {
                let record = &self.toc.entries[before.index()];
                if record.kind != Tag::Directory && is_above(&record.path) {
                    let shown = Shown::new(text(&self.toc.text, record.path));
                    return Err(self.about(id, Problem::NotADirectory(shown)));
                }
            }
            let known = above.last().map_or(0, |dir| dir.len as usize);
            let missing: Vec<Span> =
                iter::successors(names::parent(path), |dir| names::parent(dir))
                    .take_while(|dir| dir.len() > known)
                    .map(|dir| Span { at: record.path.at, len: dir.len() as u32 })
                    .collect();
            for dir in missing.into_iter().rev() {
                self.toc.implicit.push(dir);
                above.push(dir);
            }
            if record.kind == Tag::Directory {
                above.push(record.path);
            }
        }
        Ok(())
    }
}

/// Sets where the chunks of a frame end, now that it is known where the next frame begins or the
/// data ends.
fn end_frame(codec: Codec, frame: &mut [Chunk], next: u64) {
    let Some((offset, bytes)) = frame.last().map(|last| (last.offset, last.inner + last.size))
    else {
        return;
    };
    // No compressor makes data longer by more than an eighth (deflate with fixed codes). So an
    // index cannot make us fetch a gigabyte for a byte. A block of zstd is decompressed as a whole,
    // with what follows the chunk in it, such as headers.
    let block = if codec == Codec::Zstd { ZSTD_BLOCK } else { 0 };
    let most = offset.saturating_add(bytes + bytes / 4 + 4096 + block);
    for chunk in frame {
        let told = Some(chunk.end).filter(|end| *end > offset).unwrap_or(next);
        chunk.end = told.min(next).min(most);
    }
}
