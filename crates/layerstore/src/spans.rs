//! The file of spans of a plain layer.

use crate::{Error, LayerNumber, Result};
use shipway_estargz::{Codec, Frames};
use shipway_oci::{Digest, Hasher};
use shipway_plainlayer::{HEADER, SpanReader, Spans};
use std::{
    fs::File,
    io::{self, BufRead, Read},
    os::unix::fs::FileExt as _,
    path::Path,
};

/// Name of the file.
pub(crate) const SPANS: &str = "spans";
/// Bytes that are read at once.
const BUFFER: usize = 64 << 10;

/// A file of spans, which was checked as a whole.
pub(crate) struct OpenSpans {
    file: File,
    spans: Spans,
    layer: LayerNumber,
}

pub(crate) fn damaged(layer: LayerNumber, why: &'static str) -> Error {
    Error::Damaged { layer, file: SPANS, why }
}

impl OpenSpans {
    /// The one in the directory of a layer of `blob`, if it has the digest `expected`.
    pub fn open(
        directory: &Path,
        layer: LayerNumber,
        blob: &Digest,
        expected: Digest,
    ) -> Result<Self> {
        let path = directory.join(SPANS);
        let file = File::open(&path).map_err(Error::at("open", &path))?;
        let (mut hasher, mut size) = (Hasher::new(), 0);
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = file.read_at(&mut buffer, size).map_err(Error::at("read", &path))?;
            if n == 0 {
                break;
            }
            hasher.update(&buffer[..n]);
            size += n as u64;
        }
        if hasher.finish() != expected {
            return Err(damaged(layer, "its digest is another"));
        }
        let read =
            |bytes: &mut [u8]| file.read_exact_at(bytes, 0).map_err(Error::at("read", &path));
        let mut header = [0; HEADER];
        read(&mut header)?;
        let mut bytes = vec![0; Spans::length(&header)?];
        read(&mut bytes)?;
        let spans = Spans::decode(blob, &bytes, size)?;
        Ok(Self { file, spans, layer })
    }

    /// Decompresses the span that begins at `offset` in the blob.
    pub fn decompress<R: BufRead>(&self, offset: u64, compressed: R) -> Result<Decompressed<R>> {
        let span = self.spans.at(offset).ok_or(damaged(self.layer, "it lacks a span"))?;
        // Bounded by `MAX_WINDOW`.
        let mut window = vec![0; (span.window.end - span.window.start) as usize];
        self.file
            .read_exact_at(&mut window, span.window.start)
            .map_err(|e| Error::io(format_args!("read the spans of layer {}", self.layer), e))?;
        Ok(Decompressed::Span(Box::new(self.spans.reader(span, &window, compressed)?)))
    }
}

/// The bytes of a frame: how they come to be.
pub(crate) enum Decompressed<R> {
    /// From gzip members or zstd frames.
    Frames(Frames<R>),
    /// From the middle of a stream.
    Span(Box<SpanReader<R>>),
}

impl<R: BufRead> Decompressed<R> {
    /// Of a frame that begins as a member or frame does.
    pub fn frames(codec: Codec, compressed: R) -> Result<Self, shipway_estargz::Error> {
        Ok(Self::Frames(Frames::new(codec, compressed)?))
    }
}

impl<R: BufRead> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Frames(frames) => frames.read(buffer),
            Self::Span(span) => span.read(buffer),
        }
    }
}
