//! What has to be fetched for some blocks, and what comes of it.

use crate::{Error, Good, Layer, Result, index::Chunk, layer::Open};
use shipway_oci::Digest;
use std::{
    cell::Cell,
    io::{self, BufRead, Read},
    iter::Peekable,
    ops::Range,
};

/// Pieces of a blob with no more than so many bytes between them are fetched together.
pub const JOIN_GAP: u64 = 64 << 10;
/// Frames are joined as long as what is fetched at once has no more bytes than this.
pub const MAX_EXTENT: u64 = 4 << 20;
/// Missing chunks before and after those that were asked for, in the same frame, that are told with
/// them: they come for nothing. A span of a plain layer has no more, for a file takes two blocks of
/// its tar.
const NEIGHBORS: u32 = 4096;

/// A gzip member, a zstd frame or a span of a plain layer, and what of it is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where in the blob it begins.
    pub offset: u64,
    /// Bytes from there on that the chunks need.
    pub len: u64,
    /// Chunks in it that are missing, in order. At least one.
    pub chunks: Vec<Chunk>,
}

/// A piece of the blob that is fetched at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where in the blob it begins.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
    /// The frames in it that are needed, in order. At least one.
    pub frames: Vec<Frame>,
}

impl Extent {
    /// Where in the blob it ends.
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// All chunks of its frames.
    pub fn chunks(&self) -> impl Iterator<Item = &Chunk> {
        self.frames.iter().flat_map(|frame| &frame.chunks)
    }

    /// The part of the extent's bytes that is those of `frame`.
    pub fn bytes_of<'a>(&self, frame: &Frame, bytes: &'a [u8]) -> &'a [u8] {
        let from = usize::try_from(frame.offset.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let rest = bytes.get(from..).unwrap_or_default();
        &rest[..rest.len().min(usize::try_from(frame.len).unwrap_or(usize::MAX))]
    }
}

/// The pieces of the blob to fetch, in order, found as they are asked for: those of all chunks that
/// touch some blocks and are missing, with what else is missing in their frames.
///
/// Frames with a gap of at most [`JOIN_GAP`] are one extent, up to [`MAX_EXTENT`]; a single frame
/// may be longer.
pub struct Extents<'a> {
    frames: Peekable<FramesOf<'a>>,
}

impl<'a> Extents<'a> {
    pub(crate) fn new(open: &'a Open, chunks: Range<u32>) -> Self {
        Self { frames: FramesOf { open, chunks }.peekable() }
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Self::Item> {
        let first = match self.frames.next()? {
            Ok(first) => first,
            Err(error) => return Some(Err(error)),
        };
        let mut extent = Extent { offset: first.offset, len: first.len, frames: vec![first] };
        let joins = |extent: &Extent, next: &Result<Frame>| {
            next.as_ref().is_ok_and(|next| {
                next.offset <= extent.end() + JOIN_GAP
                    && next.offset + next.len <= extent.offset + MAX_EXTENT
            })
        };
        while let Some(Ok(next)) = self.frames.next_if(|next| joins(&extent, next)) {
            extent.len = extent.len.max(next.offset + next.len - extent.offset);
            extent.frames.push(next);
        }
        Some(Ok(extent))
    }
}

/// The frames with missing chunks among some.
struct FramesOf<'a> {
    open: &'a Open,
    /// Those that were not looked at.
    chunks: Range<u32>,
}

impl FramesOf<'_> {
    /// The missing ones of `ids` as long as they are in the frame at `offset`; where that ended.
    fn missing_in(&self, offset: u64, ids: Range<u32>, found: &mut Vec<Chunk>) -> Result<u32> {
        for chunk in self.open.index.chunks(ids.clone()) {
            let chunk = chunk?;
            if chunk.record.offset != offset {
                return Ok(chunk.id.0);
            }
            if chunk.record.digest.is_some() && !self.open.is_verified(chunk.id.0) {
                found.push(chunk);
            }
        }
        Ok(ids.end)
    }

    fn next_frame(&mut self) -> Result<Option<Frame>> {
        let first = loop {
            let id = self.open.next_unverified(&self.chunks);
            if id == self.chunks.end {
                return Ok(None);
            }
            self.chunks.start = id + 1;
            let record = self.open.index.get(id)?;
            if record.digest.is_some() {
                break Chunk { id: crate::ChunkId(id), record };
            }
        };
        let (id, offset) = (first.id.0, first.record.offset);
        let mut before = id;
        while before > 0
            && id - before < NEIGHBORS
            && self.open.index.get(before - 1)?.offset == offset
        {
            before -= 1;
        }
        let mut chunks = Vec::new();
        self.missing_in(offset, before..id, &mut chunks)?;
        chunks.push(first);
        // All that were asked for, and some after them.
        let end = self.missing_in(offset, id + 1..self.chunks.end.max(id + 1), &mut chunks)?;
        self.chunks.start = end.min(self.chunks.end);
        if end == self.chunks.end {
            let after = end.saturating_add(NEIGHBORS).min(self.open.index.count);
            self.missing_in(offset, end..after, &mut chunks)?;
        }
        let len = chunks.iter().map(|c| u64::from(c.record.compressed)).max().unwrap_or_default();
        Ok(Some(Frame { offset, len, chunks }))
    }
}

impl Iterator for FramesOf<'_> {
    type Item = Result<Frame>;

    fn next(&mut self) -> Option<Self::Item> {
        let frame = self.next_frame();
        if frame.is_err() {
            self.chunks.start = self.chunks.end;
        }
        frame.transpose()
    }
}

impl Layer {
    /// Stores the chunks of a frame out of its `compressed` bytes: those of the blob from
    /// [`Frame::offset`] on, of which no more than [`Frame::len`] are needed. What is good by each
    /// chunk is handed to `good` at once. The first chunk that is wrong ends it; those before it
    /// are stored.
    ///
    /// No more is decompressed than the chunks need, and no more than one is in memory. Of a layer
    /// that [is indexed](Layer::is_indexed) the whole frame is, for only that has a digest. If this
    /// is right and the index has something else in it, the layer is [`crate::State::Lying`].
    pub fn write_frame(
        &self,
        frame: &Frame,
        compressed: impl BufRead,
        good: impl FnMut(Good),
    ) -> Result<()> {
        if !self.is_indexed() {
            return self.write_chunks(frame, compressed, good);
        }
        let bytes = self.read_span(frame, compressed)?;
        match self.write_chunks(frame, &bytes[..], good) {
            Err(Error::Frame { layer, why }) => {
                let difference = format!("there is no such data at {}: {why}", frame.offset);
                self.mark_lying(&difference)?;
                Err(Error::Lying { layer, difference })
            }
            written => written,
        }
    }

    /// The bytes of a frame whose own digest is promised.
    fn read_span(&self, frame: &Frame, compressed: impl BufRead) -> Result<Vec<u8>> {
        let (layer, offset) = (self.number(), frame.offset);
        let mut bytes = Vec::new();
        compressed
            .take(frame.len)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io(format_args!("read a frame of layer {layer}"), e))?;
        let promised = frame.chunks.first().and_then(|chunk| chunk.record.digest);
        let (expected, actual) = (promised.ok_or(Error::Foreign("frame"))?, Digest::of(&bytes));
        match actual == expected {
            true => Ok(bytes),
            false => Err(Error::Span { layer, offset, expected, actual }),
        }
    }

    fn write_chunks(
        &self,
        frame: &Frame,
        compressed: impl BufRead,
        mut good: impl FnMut(Good),
    ) -> Result<()> {
        let wrong = |why: String| Error::Frame { layer: self.number(), why };
        let input_failed = Cell::new(false);
        let compressed = Input { input: compressed, failed: &input_failed };
        let failed = |error: io::Error| match input_failed.get() {
            true => Error::io(format_args!("read a frame of layer {}", self.number()), error),
            false => wrong(error.to_string().chars().take(200).collect()),
        };
        let mut frames = self.decompress(frame.offset, compressed)?;
        let (mut at, mut data) = (0, Vec::new());
        for chunk in &frame.chunks {
            let (inner, size) = (u64::from(chunk.record.inner), chunk.record.size);
            let skip = inner.checked_sub(at).ok_or(Error::Foreign("frame"))?;
            let skipped = io::copy(&mut (&mut frames).take(skip), &mut io::sink());
            let skipped = skipped.map_err(failed)?;
            data.clear();
            // More is reserved only as data comes, for the size is the index's word.
            (&mut frames).take(size).read_to_end(&mut data).map_err(failed)?;
            if skipped < skip || (data.len() as u64) < size {
                return Err(wrong("it ends too early".to_owned()));
            }
            at = inner + size;
            good(self.put(chunk, &data)?);
        }
        Ok(())
    }
}

/// Compressed bytes, and whether reading them failed: an error of the reader is none of the bytes.
struct Input<'a, R> {
    input: R,
    failed: &'a Cell<bool>,
}

impl<R> Input<'_, R> {
    fn note<T>(failed: &Cell<bool>, read: io::Result<T>) -> io::Result<T> {
        let is_over = read.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
        failed.set(failed.get() || is_over);
        read
    }
}

impl<R: Read> Read for Input<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Self::note(self.failed, self.input.read(buffer))
    }
}

impl<R: BufRead> BufRead for Input<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        Self::note(self.failed, self.input.fill_buf())
    }

    fn consume(&mut self, n: usize) {
        self.input.consume(n);
    }
}
