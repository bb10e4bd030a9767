//! Whether a layer's tar says the same as its table of contents.

use crate::{
    Codec, Content, EntryId, Kind, TOC_NAME, TarEntry, TarKind, Time, Toc,
    error::Shown,
    toc::{self, Entry},
};
use shipway_oci::Hasher;
use std::fmt;

/// Compares a tar with a table of contents, entry by entry, in one pass.
///
/// The caller reads the whole blob as a tar ([`crate::Frames`] decompresses it), tells each entry
/// and then the data of files, holes as zeros. After the first difference nothing more is looked
/// at. Names of owners count for nothing, and neither does a part of a second where the table has
/// whole seconds, as eStargz has them.
#[derive(Debug)]
pub struct Comparison<'a> {
    toc: &'a Toc,
    codec: Codec,
    seen: Vec<bool>,
    file: Option<File<'a>>,
    difference: Option<Difference>,
}

/// The first difference between a tar and a table of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The entry.
    pub path: Shown,
    /// What differs.
    pub mismatch: Mismatch,
}

/// What differs between a tar and a table of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// The tar has an entry that the table has not.
    NotInToc,
    /// The table has an entry that the tar has not.
    NotInTar,
    /// The tar has the entry twice.
    Twice,
    /// What it is.
    Kind,
    /// Length of a file, or the tar's data ends early.
    Size,
    /// Target of a link.
    Target,
    /// Number of a device.
    Device,
    /// Permissions.
    Mode,
    /// Owner or group.
    Owner,
    /// Time of the last change.
    Time,
    /// Extended attributes.
    Xattrs,
    /// Data of a file, in the chunk that begins there.
    Data {
        /// Where the chunk begins.
        file_offset: u64,
    },
    /// Digest of a file's whole data.
    Digest,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        let what = match self.mismatch {
            Mismatch::NotInToc => {
                return write!(f, "{path} is in the tar and not in the table of contents");
            }
            Mismatch::NotInTar => {
                return write!(f, "{path} is in the table of contents and not in the tar");
            }
            Mismatch::Twice => return write!(f, "{path} is twice in the tar"),
            Mismatch::Data { file_offset } => {
                return write!(
                    f,
                    "the data of {path} at {file_offset} differs between the tar and the table of contents"
                );
            }
            Mismatch::Kind => "type",
            Mismatch::Size => "size",
            Mismatch::Target => "target",
            Mismatch::Device => "device",
            Mismatch::Mode => "mode",
            Mismatch::Owner => "owner",
            Mismatch::Time => "time",
            Mismatch::Xattrs => "extended attributes",
            Mismatch::Digest => "digest",
        };
        write!(f, "{path} has another {what} in the tar than in the table of contents")
    }
}

/// A file whose data is being told.
#[derive(Debug)]
struct File<'a> {
    entry: Entry<'a>,
    /// Chunks that are not finished.
    chunks: &'a [crate::Chunk],
    /// Data of the first of them.
    hasher: ChunkHasher,
    /// Bytes of that.
    have: u64,
    /// All data, where the table has a digest of that.
    whole: Option<Whole>,
}

/// A digest that is being made.
struct Whole(Box<Hasher>);

impl Whole {
    fn new() -> Self {
        Self(Box::default())
    }
}

impl fmt::Debug for Whole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Whole")
    }
}

/// The data of a chunk as far as it matters.
#[derive(Debug)]
enum ChunkHasher {
    Data(Whole),
    Zeros { only: bool },
}

impl ChunkHasher {
    fn new(chunk: Option<&crate::Chunk>) -> Self {
        match chunk.map(|c| c.content) {
            Some(Content::Zeros) => Self::Zeros { only: true },
            _ => Self::Data(Whole::new()),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Data(whole) => whole.0.update(bytes),
            Self::Zeros { only } => *only &= bytes.iter().all(|b| *b == 0),
        }
    }

    fn is(self, content: Content) -> bool {
        match (self, content) {
            (Self::Data(whole), Content::Data(digest)) => whole.0.finish() == digest,
            (Self::Zeros { only }, Content::Zeros) => only,
            _ => false,
        }
    }
}

impl<'a> Comparison<'a> {
    /// A comparison with `toc`, of a layer that is compressed with `codec`.
    pub fn new(toc: &'a Toc, codec: Codec) -> Self {
        Self { toc, codec, seen: vec![false; toc.len()], file: None, difference: None }
    }

    /// The first difference so far: nothing that follows it is of interest.
    pub fn difference(&self) -> Option<&Difference> {
        self.difference.as_ref()
    }

    /// The next entry of the tar. Returns what the table has there, if that is the same but for the
    /// data, which is told next.
    pub fn entry(&mut self, entry: &TarEntry) -> Option<EntryId> {
        self.end_file();
        if self.difference.is_some() {
            return None;
        }
        let mut path = Vec::new();
        let known = match toc::clean(&entry.path, &mut path) {
            // The table is not in itself.
            Ok(())
                if self.codec == Codec::Gzip
                    && path == TOC_NAME.as_bytes()
                    && matches!(entry.kind, TarKind::File(_)) =>
            {
                return None;
            }
            Ok(()) => self.toc.find(&path),
            Err(_) => None,
        };
        let Some(known) = known else {
            self.differ(&entry.path, Mismatch::NotInToc);
            return None;
        };
        let is_new = !std::mem::replace(&mut self.seen[known.id().index()], true);
        let mismatch = if is_new { self.compare(known, entry) } else { Some(Mismatch::Twice) };
        if let Some(mismatch) = mismatch {
            self.differ(known.path(), mismatch);
            return None;
        }
        if let Kind::File { chunks: chunks @ [first, ..], .. } = known.kind() {
            let has_whole = chunks.len() > 1 || first.content == Content::Zeros;
            let whole = known.digest().filter(|_| has_whole).map(|_| Whole::new());
            self.file = Some(File {
                entry: known,
                chunks,
                hasher: ChunkHasher::new(Some(first)),
                have: 0,
                whole,
            });
        }
        Some(known.id())
    }

    fn compare(&self, known: Entry<'_>, entry: &TarEntry) -> Option<Mismatch> {
        let kind = match (known.kind(), &entry.kind) {
            (Kind::Directory, TarKind::Directory) | (Kind::Fifo, TarKind::Fifo) => None,
            (Kind::File { size, .. }, TarKind::File(other)) => {
                (size != *other).then_some(Mismatch::Size)
            }
            (Kind::Symlink { target }, TarKind::Symlink(other)) => {
                (target != other).then_some(Mismatch::Target)
            }
            (Kind::HardLink { target }, TarKind::HardLink(other)) => {
                (!self.leads_to(other, target)).then_some(Mismatch::Target)
            }
            (Kind::CharDevice { major, minor }, TarKind::CharDevice(a, b))
            | (Kind::BlockDevice { major, minor }, TarKind::BlockDevice(a, b)) => {
                ((major, minor) != (*a, *b)).then_some(Mismatch::Device)
            }
            _ => Some(Mismatch::Kind),
        };
        let differs = |differs: bool, mismatch| differs.then_some(mismatch);
        kind.or_else(|| differs(u32::from(known.mode()) != entry.mode & 0o7777, Mismatch::Mode))
            .or_else(|| {
                differs((known.uid(), known.gid()) != (entry.uid, entry.gid), Mismatch::Owner)
            })
            .or_else(|| differs(!is_same_time(known.mtime(), entry.mtime), Mismatch::Time))
            .or_else(|| differs(!has_xattrs(known, &entry.xattrs), Mismatch::Xattrs))
    }

    fn leads_to(&self, link: &[u8], target: EntryId) -> bool {
        let mut path = Vec::new();
        toc::clean(link, &mut path).is_ok()
            && self.toc.find(&path).is_some_and(|entry| entry.resolved().id() == target)
    }

    /// Data of the entry that was told last, in order.
    pub fn data(&mut self, mut bytes: &[u8]) {
        while let (Some(file), false) = (&mut self.file, bytes.is_empty()) {
            let [chunk, rest @ ..] = file.chunks else {
                let path = file.entry.path();
                return self.differ(path, Mismatch::Size);
            };
            let left = usize::try_from(chunk.size - file.have).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(left.min(bytes.len()));
            file.hasher.update(now);
            if let Some(whole) = &mut file.whole {
                whole.0.update(now);
            }
            file.have += now.len() as u64;
            bytes = later;
            if file.have == chunk.size {
                let hasher = std::mem::replace(&mut file.hasher, ChunkHasher::new(rest.first()));
                (file.chunks, file.have) = (rest, 0);
                if !hasher.is(chunk.content) {
                    let path = file.entry.path();
                    return self.differ(path, Mismatch::Data { file_offset: chunk.file_offset });
                }
            }
        }
    }

    fn end_file(&mut self) {
        let Some(file) = self.file.take() else { return };
        if !file.chunks.is_empty() {
            self.differ(file.entry.path(), Mismatch::Size);
        } else if let Some(whole) = file.whole
            && Some(whole.0.finish()) != file.entry.digest()
        {
            self.differ(file.entry.path(), Mismatch::Digest);
        }
    }

    fn differ(&mut self, path: &[u8], mismatch: Mismatch) {
        self.file = None;
        self.difference.get_or_insert(Difference { path: Shown::new(path), mismatch });
    }

    /// The first difference, when the tar has ended; `None` if they say the same.
    pub fn finish(mut self) -> Option<Difference> {
        self.end_file();
        if self.difference.is_none()
            && let Some(entry) = self.toc.entries().find(|entry| !self.seen[entry.id().index()])
        {
            self.differ(entry.path(), Mismatch::NotInTar);
        }
        self.difference
    }
}

fn is_same_time(toc: Time, tar: Time) -> bool {
    let rounded = tar.seconds + i64::from(tar.nanoseconds >= 500_000_000);
    toc == tar || (toc.nanoseconds == 0 && toc.seconds == rounded)
}

fn has_xattrs(known: Entry<'_>, xattrs: &[(Vec<u8>, Vec<u8>)]) -> bool {
    let mut a: Vec<_> = known.xattrs().collect();
    let mut b: Vec<_> = xattrs.iter().map(|(name, value)| (&name[..], &value[..])).collect();
    a.sort_unstable();
    b.sort_unstable();
    a == b
}
