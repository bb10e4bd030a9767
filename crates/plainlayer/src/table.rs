//! Spans as a file, and resuming at one.
//!
//! Little endian:
//!
//! ```text
//!  0  "SHIPSPAN"
//!  8  version (16 bits), codec (8), zero (8), number of spans (32)
//! 16  compressed and uncompressed length of all spans (64 each)
//! 32  SHA-256 of the blob's digest, what is before here, and all spans
//! 64  spans of 64 bytes: place in the blob, in the tar, of the window in this file (64 each);
//!     stored length of the window (32); kind, bits, the bits themselves, zero (8 each);
//!     SHA-256 of the stored window
//!  …  windows, deflated
//! ```
//!
//! Kinds: 0 at a member or frame; 1 at a deflate block, the bits of the byte before are here; 2 at
//! a deflate block, the byte before is the span's first one, and the last one of the span before.

use crate::{
    Error, Result,
    engine::{Engine, Entry, WINDOW},
};
use shipway_estargz::Codec;
use shipway_oci::{Digest, Hasher};
use std::{
    io::{self, BufRead, Read},
    ops::Range,
};

/// Bytes of the tar after which a span ends at the next place where one can begin.
pub const SPAN: u64 = 4 << 20;
/// Most bytes of the tar in a span: whoever wants the last of them decompresses all.
pub const MAX_SPAN: u64 = 32 << 20;
/// Most bytes of the blob in a span: they are fetched at once.
pub const MAX_COMPRESSED: u64 = MAX_SPAN;
/// Most spans of a layer.
pub const MAX_SPANS: usize = 1 << 18;
/// Most bytes of a window as it is stored.
pub const MAX_WINDOW: usize = WINDOW + WINDOW / 8;
/// Bytes of the file before its spans.
pub const HEADER: usize = 64;

const MAGIC: &[u8; 8] = b"SHIPSPAN";
const VERSION: u16 = 1;
/// Bytes of a span.
const BYTES: usize = 64;
/// How hard windows are compressed.
const LEVEL: u8 = 6;
const FAST: u8 = 1;

/// A span that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where in the blob its bytes are.
    pub compressed: Range<u64>,
    /// What of the tar it has.
    pub tar: Range<u64>,
    /// Where in the file its window is; empty if it needs none.
    pub window: Range<u64>,
    digest: Digest,
    resume: Resume,
}

/// How decompression of a span begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At a member or frame.
    Frame,
    /// At a deflate block, with so many bits that are of the byte before.
    Block { bits: u8, bit_buf: u8 },
    /// The same, where the byte before is the first of the span, if there are such bits.
    Shared { bits: u8 },
}

impl Resume {
    /// Bytes that the span has together with the one before it.
    fn shared(self) -> u64 {
        u64::from(matches!(self, Self::Shared { bits: 1.. }))
    }
}

/// The spans of a blob, checked.
#[derive(Debug)]
pub struct Spans {
    codec: Codec,
    spans: Vec<Span>,
}

/// A span while it is made.
#[derive(Clone, Debug)]
pub struct Noted {
    pub offset: u64,
    pub start: u64,
    resume: Resume,
    /// As stored.
    window: Vec<u8>,
}

impl Noted {
    pub fn new(offset: u64, start: u64, entry: Entry) -> Self {
        let (resume, window) = match entry {
            Entry::Frame => (Resume::Frame, Vec::new()),
            Entry::Block { bits, bit_buf, window } => {
                let stored = miniz_oxide::deflate::compress_to_vec(&window, LEVEL);
                (Resume::Block { bits, bit_buf }, stored)
            }
        };
        Self { offset, start, resume, window }
    }

    /// As a zTOC has it. `offset` is that of the shared byte, if there is one.
    pub fn shared(offset: u64, start: u64, bits: u8, window: &[u8]) -> Self {
        // While a pull waits.
        let window = miniz_oxide::deflate::compress_to_vec(window, FAST);
        Self { offset, start, resume: Resume::Shared { bits }, window }
    }
}

fn checksum(blob: &Digest, header: &[u8], spans: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    for bytes in [blob.as_bytes(), header, spans] {
        hasher.update(bytes);
    }
    hasher.finish()
}

/// The file of the spans `noted` of `blob`, whose last one ends at `ends`: in the blob, in the tar.
pub fn encode(blob: &Digest, codec: Codec, noted: &[Noted], ends: (u64, u64)) -> Vec<u8> {
    let mut spans = Vec::with_capacity(noted.len() * BYTES);
    let mut at = (HEADER + noted.len() * BYTES) as u64;
    for span in noted {
        let begin = spans.len();
        for word in [span.offset, span.start, at] {
            spans.extend_from_slice(&word.to_le_bytes());
        }
        // Bounded by `MAX_WINDOW`.
        spans.extend_from_slice(&(span.window.len() as u32).to_le_bytes());
        spans.extend_from_slice(&match span.resume {
            Resume::Frame => [0; 4],
            Resume::Block { bits, bit_buf } => [1, bits, bit_buf, 0],
            Resume::Shared { bits } => [2, bits, 0, 0],
        });
        spans.extend_from_slice(Digest::of(&span.window).as_bytes());
        debug_assert_eq!(spans.len() - begin, BYTES);
        at += span.window.len() as u64;
    }
    let mut file = MAGIC.to_vec();
    file.extend_from_slice(&VERSION.to_le_bytes());
    file.extend_from_slice(&[u8::from(codec == Codec::Zstd), 0]);
    file.extend_from_slice(&(noted.len() as u32).to_le_bytes());
    file.extend_from_slice(&ends.0.to_le_bytes());
    file.extend_from_slice(&ends.1.to_le_bytes());
    let sum = checksum(blob, &file, &spans);
    file.extend_from_slice(sum.as_bytes());
    file.append(&mut spans);
    noted.iter().for_each(|span| file.extend_from_slice(&span.window));
    file
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

/// How a span is resumed, by its bytes.
fn resume(codec: Codec, span: &[u8; BYTES]) -> Result<Resume> {
    match (span[28], span[29], span[30]) {
        (0, 0, 0) => Ok(Resume::Frame),
        (1, bits @ 0..8, bit_buf) if codec == Codec::Gzip && u16::from(bit_buf) < 1 << bits => {
            Ok(Resume::Block { bits, bit_buf })
        }
        (2, bits @ 0..8, 0) if codec == Codec::Gzip => Ok(Resume::Shared { bits }),
        _ => Err(Error::Damaged("a span cannot be resumed")),
    }
}

impl Spans {
    /// How many bytes of the file [`Spans::decode`] wants, by the first ones.
    pub fn length(header: &[u8; HEADER]) -> Result<usize> {
        if !header.starts_with(MAGIC) || header[8..10] != VERSION.to_le_bytes() {
            return Err(Error::Damaged("it is not of a version that is known"));
        }
        let count = half(header, 12) as usize;
        if count > MAX_SPANS {
            return Err(Error::Damaged("it has too many spans"));
        }
        Ok(HEADER + count * BYTES)
    }

    /// The spans of `blob`, from the first [`Spans::length`] bytes of a file of `size` bytes.
    pub fn decode(blob: &Digest, bytes: &[u8], size: u64) -> Result<Self> {
        let damaged = Error::Damaged;
        let (header, rest) =
            bytes.split_first_chunk::<HEADER>().ok_or(damaged("it is too short"))?;
        let spans = rest.get(..Self::length(header)? - HEADER).ok_or(damaged("it is too short"))?;
        if checksum(blob, &header[..32], spans).as_bytes() != &header[32..] {
            return Err(damaged("its checksum is wrong"));
        }
        let codec = match header[10] {
            0 => Codec::Gzip,
            1 => Codec::Zstd,
            _ => return Err(damaged("it has another codec")),
        };
        let ends = (word(header, 16), word(header, 24));
        let (raw, _) = spans.as_chunks::<BYTES>();
        let mut window_at = (HEADER + spans.len()) as u64;
        let mut all = Vec::with_capacity(raw.len());
        for (n, span) in raw.iter().enumerate() {
            let next = raw.get(n + 1).map_or(Ok(ends), |next| {
                let shared = resume(codec, next)?.shared();
                Ok::<_, Error>((word(next, 0).saturating_add(shared), word(next, 8)))
            })?;
            let compressed = word(span, 0)..next.0;
            let tar = word(span, 8)..next.1;
            let is_long = |range: &Range<u64>, most: u64| {
                range.end.checked_sub(range.start).is_none_or(|len| len > most)
            };
            if compressed.is_empty()
                || is_long(&compressed, MAX_COMPRESSED)
                || is_long(&tar, MAX_SPAN)
                || (n == 0) != (tar.start == 0)
            {
                return Err(damaged("its spans do not follow each other"));
            }
            let length = u64::from(half(span, 24));
            let window = word(span, 16)..word(span, 16).saturating_add(length);
            if window.start != window_at || length > MAX_WINDOW as u64 || window.end > size {
                return Err(damaged("its windows do not follow each other"));
            }
            window_at = window.end;
            let resume = resume(codec, span)?;
            if resume == Resume::Frame && length > 0 {
                return Err(damaged("a span cannot be resumed"));
            }
            let digest = Digest::from_bytes(std::array::from_fn(|n| span[32 + n]));
            all.push(Span { compressed, tar, window, digest, resume });
        }
        if window_at != size {
            return Err(damaged("it has another length"));
        }
        Ok(Self { codec, spans: all })
    }

    /// All spans, in order, without gap.
    pub fn all(&self) -> &[Span] {
        &self.spans
    }

    /// How the blob is compressed.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The span whose bytes begin at `offset` in the blob.
    pub fn at(&self, offset: u64) -> Option<&Span> {
        let found = self.spans.binary_search_by_key(&offset, |span| span.compressed.start);
        found.ok().map(|n| &self.spans[n])
    }

    /// Decompresses `span`: `window` is the bytes of the file at [`Span::window`], `compressed` are
    /// those of the blob at [`Span::compressed`], or the first of them.
    pub fn reader<R: BufRead>(
        &self,
        span: &Span,
        window: &[u8],
        mut compressed: R,
    ) -> Result<SpanReader<R>> {
        let window = || {
            if Digest::of(window) != span.digest {
                return Err(Error::Damaged("the digest of a window is wrong"));
            }
            miniz_oxide::inflate::decompress_to_vec_with_limit(window, WINDOW)
                .map_err(|_| Error::Damaged("a window cannot be decompressed"))
        };
        let engine = match span.resume {
            Resume::Frame => Engine::new(self.codec)?,
            Resume::Block { bits, bit_buf } => Engine::resume(bits, bit_buf, &window()?),
            Resume::Shared { bits: 0 } => Engine::resume(0, 0, &window()?),
            Resume::Shared { bits } => {
                let mut shared = [0];
                compressed.read_exact(&mut shared)?;
                Engine::resume(bits, shared[0] >> (8 - bits), &window()?)
            }
        };
        let left = span.tar.end - span.tar.start;
        Ok(SpanReader { engine, compressed, ready: 0..0, left })
    }
}

/// The bytes of the tar that are in a span.
pub struct SpanReader<R> {
    engine: Engine,
    compressed: R,
    /// What was decompressed and not read.
    ready: Range<usize>,
    /// What is to be read.
    left: u64,
}

impl<R: BufRead> Read for SpanReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() || self.left == 0 {
            return Ok(0);
        }
        while self.ready.is_empty() {
            let input = self.compressed.fill_buf()?;
            let step = self.engine.step(input)?;
            if input.is_empty() && !step.is_progress() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.compressed.consume(step.consumed);
            self.ready = step.produced;
        }
        let n = buffer
            .len()
            .min(self.ready.len())
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        buffer[..n].copy_from_slice(self.engine.bytes(self.ready.start..self.ready.start + n));
        self.ready.start += n;
        self.left -= n as u64;
        Ok(n)
    }
}
