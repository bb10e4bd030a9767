//! The table of contents of a plain layer.

use crate::{Progress, Result, Scan};
use shipway_estargz::{Codec, Content, TarEntry, TarKind, Toc, TocMaker, TocPiece};
use shipway_oci::Hasher;
use std::rc::Rc;

/// Makes the table of contents of a tar that comes out of a [`crate::Scanner`].
///
/// The caller reads the tar without reading ahead, and hands over each entry, and the contents of
/// files piece by piece as soon as it has read them.
pub struct Maker {
    toc: TocMaker,
    progress: Rc<Progress>,
    /// Bytes of the current file that did not come.
    left: u64,
    chunk: Option<Chunk>,
}

/// What of a file is in one span.
struct Chunk {
    /// Where the span begins in the blob, and in the tar.
    offset: u64,
    span: u64,
    /// Where it begins in the tar, and its length.
    start: u64,
    size: u64,
    hasher: Box<Hasher>,
    zeros: bool,
}

impl Maker {
    /// Of a blob that `progress` is about.
    pub fn new(codec: Codec, progress: Rc<Progress>) -> Self {
        Self { toc: TocMaker::new(codec), progress, left: 0, chunk: None }
    }

    /// The next entry.
    pub fn entry(&mut self, entry: &TarEntry) -> Result<()> {
        self.left = match entry.kind {
            TarKind::File(size) => size,
            _ => 0,
        };
        Ok(self.toc.entry(entry)?)
    }

    /// The next bytes of the file that came last, which are those that were read last.
    pub fn data(&mut self, mut bytes: &[u8]) -> Result<()> {
        let mut at = self.progress.read() - bytes.len() as u64;
        while !bytes.is_empty() {
            let (offset, span) = self.progress.span_of(at);
            // Spans that begin where the file goes on.
            if self.chunk.as_ref().is_some_and(|chunk| chunk.span != span.start) {
                self.close()?;
            }
            let inside = usize::try_from(span.end - at).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(inside.min(bytes.len()));
            let chunk = self.chunk.get_or_insert_with(|| Chunk {
                offset,
                span: span.start,
                start: at,
                size: 0,
                hasher: Box::default(),
                zeros: true,
            });
            chunk.hasher.update(now);
            chunk.zeros &= now.iter().all(|byte| *byte == 0);
            chunk.size += now.len() as u64;
            at += now.len() as u64;
            self.left = self.left.saturating_sub(now.len() as u64);
            bytes = later;
        }
        if self.left == 0 { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<()> {
        let Some(chunk) = self.chunk.take() else { return Ok(()) };
        let content = match chunk.zeros {
            true => Content::Zeros,
            false => Content::Data(chunk.hasher.finish()),
        };
        Ok(self.toc.piece(&TocPiece {
            offset: chunk.offset,
            inner: chunk.start - chunk.span,
            size: chunk.size,
            content,
        })?)
    }

    /// The table of the blob that was scanned.
    pub fn finish(self, scan: &Scan) -> Result<Toc> {
        Ok(self.toc.finish(|offset| scan.end_of(offset))?)
    }
}
