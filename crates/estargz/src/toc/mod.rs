//! The table of contents as a model that has been checked.
//!
//! A [`Toc`] exists only if its digest is the expected one and everything in it can be: names are
//! relative to the root without `.` and `..`, no two are the same, what is above an entry is a
//! directory, hard links lead to entries before them, and the chunks of a file follow each other
//! without overlap or gap and lie inside the blob. Records have a fixed size and names are in one
//! buffer, so a million entries take some 200 MB and seventeen thousand less than 4.

mod builder;
mod gate;
mod names;
mod parse;

pub(crate) use builder::{Builder, Raw, RawKind, Tagged};
pub(crate) use names::clean;
pub use names::{MAX_DEPTH, MAX_NAME, MAX_PATH};
pub use {
    builder::{
        MAX_CHUNK, MAX_DATA, MAX_ENTRIES, MAX_INNER, MAX_MAJOR, MAX_MINOR, MAX_XATTR, MAX_XATTRS,
    },
    gate::MAX_STRING,
    parse::Expected,
};

use shipway_oci::Digest;
use std::{iter, ops::Range};

/// Name of the file whose place ends what a node should fetch at once.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// Name of the file that says that nothing should be fetched ahead.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// Name that the table of contents has in the tar of an eStargz layer.
pub const TOC_NAME: &str = "stargz.index.json";

/// A piece of the buffer of names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Span {
    at: u32,
    len: u32,
}

/// An entry, by its position among the entries of a [`Toc`] (chunks not counted).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId(u32);

impl EntryId {
    /// The position.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A checked table of contents. See the module.
#[derive(Debug)]
pub struct Toc {
    /// Names, link targets, names and values of attributes.
    text: Vec<u8>,
    entries: Vec<Record>,
    chunks: Vec<Chunk>,
    xattrs: Vec<(Span, Span)>,
    /// Entries by path, where `/` comes before every other byte: parents before what is in them.
    by_path: Vec<EntryId>,
    /// Directories that have no entry of their own, in the same order.
    implicit: Vec<Span>,
    /// Digests of files that have several chunks, by entry.
    files: Vec<(EntryId, Digest)>,
    data_size: u64,
    landmark: Option<Landmark>,
    tar_split: Option<Digest>,
    /// Whether it is of an ordinary layer, in which no file is the format's.
    is_plain: bool,
}

/// An entry in memory.
#[derive(Clone, Copy, Debug)]
struct Record {
    path: Span,
    kind: Tag,
    mode: u16,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanoseconds: u32,
    /// Size of a file; target of a symbolic link; entry of a hard link; device.
    payload: Payload,
    chunks: (u32, u32),
    xattrs: (u32, u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tag {
    Directory,
    File,
    Symlink,
    HardLink,
    Char,
    Block,
    Fifo,
}

#[derive(Clone, Copy, Debug)]
enum Payload {
    None,
    Size(u64),
    Target(Span),
    Entry(EntryId),
    Device(u32, u32),
}

/// A piece of a file's data, and where it is in the blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// The file.
    pub file: EntryId,
    /// Where in the file it begins.
    pub file_offset: u64,
    /// Its length, uncompressed.
    pub size: u64,
    /// Where in the blob the gzip member or zstd frame begins that it is in.
    pub offset: u64,
    /// A place in the blob before which all of it is. It may be later than necessary, but not by
    /// much.
    pub end: u64,
    /// Bytes to skip after decompression: several chunks may be in one frame.
    pub inner: u64,
    /// What it holds.
    pub content: Content,
}

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Data with this digest.
    Data(Digest),
    /// Zeros: nothing need be fetched.
    Zeros,
}

/// What a layer asks of those who fetch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landmark {
    /// To fetch everything before this place in the blob at once.
    Prefetch {
        /// The place.
        end: u64,
    },
    /// To fetch nothing ahead.
    NoPrefetch,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A directory.
    Directory,
    /// A file.
    File {
        /// Its length.
        size: u64,
        /// Its data, in order, without gap.
        chunks: &'a [Chunk],
    },
    /// A symbolic link.
    Symlink {
        /// Its target as it was written.
        target: &'a [u8],
    },
    /// Another name of an entry that comes before it and is no hard link itself.
    HardLink {
        /// The entry.
        target: EntryId,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A time: seconds since 1970, and nanoseconds after them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds, which may be negative.
    pub seconds: i64,
    /// Nanoseconds, below 10⁹.
    pub nanoseconds: u32,
}

/// A view of an entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    toc: &'a Toc,
    id: EntryId,
}

/// A directory or other entry, as [`Toc::tree`] gives it.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Path relative to the root, which is empty.
    pub path: &'a [u8],
    /// The entry; `None` for a directory that is only in the names of others. What unpacking gives
    /// there depends on the layers below: a directory that exists keeps its attributes, and a
    /// symbolic link is followed.
    pub entry: Option<Entry<'a>>,
}

impl Toc {
    /// The number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entry `id`, which must be of this table.
    pub fn entry(&self, id: EntryId) -> Entry<'_> {
        Entry { toc: self, id }
    }

    /// All entries, in the order of the archive.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = Entry<'_>> {
        (0..self.entries.len() as u32).map(|n| self.entry(EntryId(n)))
    }

    /// All entries and the directories without entry, parents before what is in them. The root is
    /// there only if it has an entry.
    pub fn tree(&self) -> impl Iterator<Item = Node<'_>> {
        let entries = self
            .by_path
            .iter()
            .map(|id| Node { path: self.entry(*id).path(), entry: Some(self.entry(*id)) });
        let implicit =
            self.implicit.iter().map(|span| Node { path: self.text(*span), entry: None });
        let (mut entries, mut implicit) = (entries.peekable(), implicit.peekable());
        iter::from_fn(move || match (entries.peek(), implicit.peek()) {
            (Some(a), Some(b)) if names::compare(b.path, a.path).is_lt() => implicit.next(),
            (None, _) => implicit.next(),
            _ => entries.next(),
        })
    }

    /// The entry at `path`, which is relative to the root and clean.
    pub fn find(&self, path: &[u8]) -> Option<Entry<'_>> {
        let found =
            self.by_path.binary_search_by(|id| names::compare(self.entry(*id).path(), path));
        found.ok().map(|at| self.entry(self.by_path[at]))
    }

    /// Paths of the directories that have no entry of their own.
    pub fn implicit_directories(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.implicit.iter().map(|span| self.text(*span))
    }

    /// All chunks, in the order of the archive: by place in the blob, then within the frame.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Sets where chunks end, by where their frames do; see [`Chunk::end`].
    pub(crate) fn end_chunks(&mut self, end_of: impl Fn(u64) -> u64) {
        for chunk in &mut self.chunks {
            chunk.end = end_of(chunk.offset);
        }
    }

    /// The chunks by frame: each slice is in one gzip member or zstd frame.
    pub fn frames(&self) -> impl Iterator<Item = &[Chunk]> {
        self.chunks.chunk_by(|a, b| a.offset == b.offset)
    }

    /// The length of all files' data.
    pub fn data_size(&self) -> u64 {
        self.data_size
    }

    /// What the layer asks of those who fetch it; `None` if nothing.
    pub fn landmark(&self) -> Option<Landmark> {
        self.landmark
    }

    /// The digest of the compressed tar-split, which the table vouches for.
    pub fn tar_split(&self) -> Option<Digest> {
        self.tar_split
    }

    fn text(&self, span: Span) -> &[u8] {
        text(&self.text, span)
    }
}

fn text(all: &[u8], span: Span) -> &[u8] {
    &all[span.at as usize..][..span.len as usize]
}

impl<'a> Entry<'a> {
    fn record(&self) -> &'a Record {
        &self.toc.entries[self.id.index()]
    }

    /// Its position.
    pub fn id(&self) -> EntryId {
        self.id
    }

    /// Its path relative to the root, without `.`, `..` or slashes at either end; empty for the
    /// root itself.
    pub fn path(&self) -> &'a [u8] {
        self.toc.text(self.record().path)
    }

    /// What it is.
    pub fn kind(&self) -> Kind<'a> {
        let record = self.record();
        match (record.kind, record.payload) {
            (Tag::File, Payload::Size(size)) => {
                Kind::File { size, chunks: &self.toc.chunks[range(record.chunks)] }
            }
            (Tag::Symlink, Payload::Target(target)) => {
                Kind::Symlink { target: self.toc.text(target) }
            }
            (Tag::HardLink, Payload::Entry(target)) => Kind::HardLink { target },
            (Tag::Char, Payload::Device(major, minor)) => Kind::CharDevice { major, minor },
            (Tag::Block, Payload::Device(major, minor)) => Kind::BlockDevice { major, minor },
            (Tag::Fifo, _) => Kind::Fifo,
            _ => Kind::Directory,
        }
    }

    /// The entry that has the data and attributes: itself, or what a hard link leads to. Unpacking
    /// gives an inode the attributes of its last name, so those of a hard link are kept, too; usual
    /// writers make them equal.
    pub fn resolved(&self) -> Entry<'a> {
        match self.record().payload {
            Payload::Entry(id) => self.toc.entry(id),
            _ => *self,
        }
    }

    /// Permission bits with set-uid, set-gid and sticky.
    pub fn mode(&self) -> u16 {
        self.record().mode
    }

    /// Owner.
    pub fn uid(&self) -> u32 {
        self.record().uid
    }

    /// Group.
    pub fn gid(&self) -> u32 {
        self.record().gid
    }

    /// Time of the last change.
    pub fn mtime(&self) -> Time {
        let Record { seconds, nanoseconds, .. } = *self.record();
        Time { seconds, nanoseconds }
    }

    /// Extended attributes: names and values.
    pub fn xattrs(&self) -> impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let (toc, (at, n)) = (self.toc, self.record().xattrs);
        toc.xattrs[range((at, n.into()))]
            .iter()
            .map(|(name, value)| (toc.text(*name), toc.text(*value)))
    }

    /// The digest of a file's whole data, where the table has it; for an empty file that of
    /// nothing.
    pub fn digest(&self) -> Option<Digest> {
        match self.kind() {
            Kind::File { size: 0, .. } => Some(Digest::of([])),
            Kind::File { chunks: [Chunk { content: Content::Data(digest), .. }], .. } => {
                Some(*digest)
            }
            Kind::File { .. } => self
                .toc
                .files
                .binary_search_by_key(&self.id, |f| f.0)
                .ok()
                .map(|at| self.toc.files[at].1),
            _ => None,
        }
    }

    /// Whether it is one of the format's own files, which are not part of what the layer's author
    /// made.
    pub fn is_landmark(&self) -> bool {
        !self.toc.is_plain && self.record().kind == Tag::File && is_landmark(self.path())
    }
}

/// Whether a file at `path` is a landmark.
pub(crate) fn is_landmark(path: &[u8]) -> bool {
    path == PREFETCH_LANDMARK.as_bytes() || path == NO_PREFETCH_LANDMARK.as_bytes()
}

fn range((at, n): (u32, u32)) -> Range<usize> {
    at as usize..at as usize + n as usize
}
