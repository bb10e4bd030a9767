//! Tables of contents of tars that have none.

use crate::{
    Codec, Content, Error, Result, TarEntry, TarKind, Toc,
    error::Problem,
    toc::{Builder, Raw, RawKind, Tag, Tagged},
};

/// Makes the table of contents of an ordinary layer, whose *frames* are pieces of it that somebody
/// can decompress by themselves. It is checked as one from a registry is. Landmarks and tables of
/// contents in the tar are files like others.
pub struct TocMaker {
    builder: Builder,
    /// The file that came last, if it has contents that did not come.
    file: Option<Raw>,
    chunk: Raw,
    /// How much of its contents came.
    have: u64,
}

/// A piece of a file's contents in one frame.
#[derive(Clone, Copy, Debug)]
pub struct TocPiece {
    /// Where in the blob the frame begins.
    pub offset: u64,
    /// Bytes to skip after decompression.
    pub inner: u64,
    /// Length of the piece, which is not zero.
    pub size: u64,
    /// What it holds.
    pub content: Content,
}

impl TocMaker {
    /// For a layer that is compressed with `codec`.
    pub fn new(codec: Codec) -> Self {
        let chunk = Raw { kind: Some(RawKind::Chunk), ..Raw::default() };
        Self { builder: Builder::plain(codec), file: None, chunk, have: 0 }
    }

    /// The next entry.
    pub fn entry(&mut self, entry: &TarEntry) -> Result<()> {
        let mut raw = Raw {
            name: entry.path.clone(),
            mode: entry.mode.into(),
            uid: entry.uid.into(),
            gid: entry.gid.into(),
            mtime: entry.mtime,
            xattrs: entry.xattrs.clone(),
            ..Raw::default()
        };
        let tag = match &entry.kind {
            TarKind::Directory => Tag::Directory,
            TarKind::File(size) => {
                raw.size = *size;
                Tag::File
            }
            TarKind::Symlink(target) => {
                raw.link.clone_from(target);
                Tag::Symlink
            }
            TarKind::HardLink(target) => {
                raw.link.clone_from(target);
                Tag::HardLink
            }
            TarKind::CharDevice(major, minor) => {
                (raw.major, raw.minor) = ((*major).into(), (*minor).into());
                Tag::Char
            }
            TarKind::BlockDevice(major, minor) => {
                (raw.major, raw.minor) = ((*major).into(), (*minor).into());
                Tag::Block
            }
            TarKind::Fifo => Tag::Fifo,
            TarKind::Other(_) => return Err(self.builder.error(&raw, Problem::NoType)),
        };
        self.ended()?;
        raw.kind = Some(RawKind::Entry(Tagged(tag)));
        self.have = 0;
        match raw.size {
            0 => self.builder.push(&raw),
            // Its first piece belongs to it.
            _ => {
                self.file = Some(raw);
                Ok(())
            }
        }
    }

    /// The next piece of the file that came last.
    pub fn piece(&mut self, piece: &TocPiece) -> Result<()> {
        let file = self.file.take();
        let raw = match file {
            Some(file) => &mut { file },
            None => &mut self.chunk,
        };
        (raw.offset, raw.inner) = (piece.offset, piece.inner);
        (raw.chunk_offset, raw.chunk_size) = (self.have, piece.size);
        (raw.chunk_digest, raw.zeros) = match piece.content {
            Content::Data(digest) => (Some(digest), false),
            Content::Zeros => (None, true),
        };
        self.have += piece.size;
        self.builder.push(raw)
    }

    fn ended(&self) -> Result<()> {
        match &self.file {
            Some(file) => Err(Error::entry(self.builder.len(), &file.name, Problem::ChunkSum)),
            None => Ok(()),
        }
    }

    /// The table. `end_of` gives, for the place where a frame begins in the blob, the place where
    /// it ends.
    pub fn finish(self, end_of: impl Fn(u64) -> u64) -> Result<Toc> {
        self.ended()?;
        let mut toc = self.builder.finish()?;
        toc.end_chunks(end_of);
        Ok(toc)
    }
}
