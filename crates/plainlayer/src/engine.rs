//! Decompression a step at a time, which says where it could be resumed.

use flate2::Crc;
use miniz_oxide::inflate::{
    TINFLStatus,
    core::{
        BlockBoundaryState, DecompressorOxide, decompress,
        inflate_flags::{TINFL_FLAG_HAS_MORE_INPUT, TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY},
    },
};
use shipway_estargz::{Codec, MAX_WINDOW_LOG};
use std::{io, ops::Range};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

/// Bytes that deflate looks back (RFC 1951 2).
pub const WINDOW: usize = 32 << 10;
/// Bytes of output that are kept: a power of two, and more than a window, so that several steps
/// need no copy.
const RING: usize = 4 * WINDOW;
/// Most bytes of a gzip member's header. The field for extras alone may have 64 KiB.
const MAX_HEADER: usize = 128 << 10;
/// Length of a gzip member's trailer: checksum and length.
const TRAILER: usize = 8;

/// How decompression is resumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A gzip member or zstd frame begins.
    Frame,
    /// A deflate block begins, after so many bits, in the lowest of `bit_buf`, that are of the byte
    /// before.
    Block { bits: u8, bit_buf: u8, window: Vec<u8> },
}

/// A deflate block that begins, as zTOCs have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStart {
    /// So many bits of the byte before, the highest, are the block's.
    pub bits: u8,
    /// The [`WINDOW`] bytes of output before it, also of earlier members; zeros where there was
    /// none.
    pub window: Vec<u8>,
}

/// Where a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Anywhere.
    Inside,
    /// Before the first deflate block of a member, after its header.
    FirstBlock,
    /// Before a deflate block that is not the first of its member.
    Block,
    /// Before a gzip member or zstd frame, if there is one.
    Frame,
}

/// What a step did.
#[derive(Debug)]
pub struct Step {
    /// Bytes of the input that are done with.
    pub consumed: usize,
    /// What came of them, in [`Engine::bytes`].
    pub produced: Range<usize>,
    pub place: Place,
}

impl Step {
    /// Whether anything came of it, if there was no input.
    pub fn is_progress(&self) -> bool {
        !self.produced.is_empty() || self.place != Place::Inside
    }
}

/// See the module.
pub struct Engine {
    kind: Kind,
    ring: Box<[u8]>,
    /// Where in the ring the next byte goes.
    at: usize,
}

enum Kind {
    Gzip(Box<Gzip>),
    Zstd(Decoder<'static>),
}

struct Gzip {
    inflater: DecompressorOxide,
    state: State,
    /// Bytes of the member that came so far.
    bytes: u64,
    /// What its trailer should say; `None` where its beginning was not seen.
    checksum: Option<Crc>,
}

enum State {
    Header { part: Header, seen: usize, flags: u8 },
    Deflate,
    Trailer { have: usize, bytes: [u8; TRAILER] },
}

/// What comes next of a member's header (RFC 1952 2.3).
#[derive(Clone, Copy)]
enum Header {
    /// The ten bytes that all have, so many of them seen.
    Fixed(usize),
    ExtraLength(Option<u8>),
    Extra(u16),
    Name,
    Comment,
    Checksum(bool),
}

impl State {
    const START: Self = Self::Header { part: Header::Fixed(0), seen: 0, flags: 0 };
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Engine {
    /// At the beginning of a gzip member or zstd frame.
    pub fn new(codec: Codec) -> io::Result<Self> {
        let kind = match codec {
            Codec::Gzip => Kind::Gzip(Box::new(Gzip {
                inflater: DecompressorOxide::new(),
                state: State::START,
                bytes: 0,
                checksum: Some(Crc::new()),
            })),
            Codec::Zstd => {
                let mut decoder = Decoder::new()?;
                decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
                Kind::Zstd(decoder)
            }
        };
        Ok(Self { kind, ring: vec![0; RING].into_boxed_slice(), at: 0 })
    }

    /// Where a deflate block begins; `window` is what came before it.
    pub fn resume(bits: u8, bit_buf: u8, window: &[u8]) -> Self {
        let boundary = BlockBoundaryState { num_bits: bits, bit_buf, ..Default::default() };
        let mut ring = vec![0; RING].into_boxed_slice();
        let window = &window[window.len().saturating_sub(WINDOW)..];
        ring[..window.len()].copy_from_slice(window);
        let gzip = Gzip {
            inflater: DecompressorOxide::from_block_boundary_state(&boundary),
            state: State::Deflate,
            bytes: window.len() as u64,
            checksum: None,
        };
        Self { kind: Kind::Gzip(Box::new(gzip)), ring, at: window.len() }
    }

    /// Output, where a step says that it is.
    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.ring[range]
    }

    /// How to come back to where the last step ended, which was at a block or frame.
    pub fn entry(&self) -> Entry {
        let Kind::Gzip(gzip) = &self.kind else { return Entry::Frame };
        if !matches!(gzip.state, State::Deflate) {
            return Entry::Frame;
        }
        let Some(boundary) = gzip.inflater.block_boundary_state() else { return Entry::Frame };
        let len = usize::try_from(gzip.bytes).unwrap_or(WINDOW).min(WINDOW);
        let window = self.last(len);
        Entry::Block { bits: boundary.num_bits, bit_buf: boundary.bit_buf, window }
    }

    /// The block that begins where the last step ended, which was at one.
    pub fn block_start(&self) -> BlockStart {
        let bits = match &self.kind {
            Kind::Gzip(gzip) => gzip.inflater.block_boundary_state().map_or(0, |b| b.num_bits),
            Kind::Zstd(_) => 0,
        };
        BlockStart { bits, window: self.last(WINDOW) }
    }

    /// The last `len` bytes of output.
    fn last(&self, len: usize) -> Vec<u8> {
        match self.at.checked_sub(len) {
            Some(from) => self.ring[from..self.at].to_vec(),
            None => {
                let from = self.at + RING - len;
                [&self.ring[from..], &self.ring[..self.at]].concat()
            }
        }
    }

    /// Goes on with `input`. Where there is none, some output may be left. What was produced before
    /// is overwritten.
    pub fn step(&mut self, input: &[u8]) -> io::Result<Step> {
        if self.at == RING {
            self.at = 0;
        }
        let from = self.at;
        let (consumed, place) = match &mut self.kind {
            Kind::Zstd(decoder) => {
                let mut input = InBuffer::around(input);
                let mut output = OutBuffer::around_pos(&mut self.ring[..], from);
                let hint = decoder.run(&mut input, &mut output)?;
                self.at = output.pos();
                (input.pos(), if hint == 0 { Place::Frame } else { Place::Inside })
            }
            Kind::Gzip(gzip) => {
                let (consumed, produced, place) = gzip.step(input, &mut self.ring, from)?;
                self.at += produced;
                (consumed, place)
            }
        };
        Ok(Step { consumed, produced: from..self.at, place })
    }
}

impl Gzip {
    fn step(
        &mut self,
        input: &[u8],
        ring: &mut [u8],
        at: usize,
    ) -> io::Result<(usize, usize, Place)> {
        match &mut self.state {
            State::Header { part, seen, flags } => {
                for (n, byte) in input.iter().enumerate() {
                    *seen += 1;
                    if *seen > MAX_HEADER {
                        return Err(broken("the header of a gzip member is too long"));
                    }
                    match part.next(*byte, flags)? {
                        Some(next) => *part = next,
                        None => {
                            self.state = State::Deflate;
                            return Ok((n + 1, 0, Place::FirstBlock));
                        }
                    }
                }
                Ok((input.len(), 0, Place::Inside))
            }
            State::Deflate => self.inflate(input, ring, at),
            State::Trailer { have, bytes } => {
                let n = input.len().min(TRAILER - *have);
                bytes[*have..*have + n].copy_from_slice(&input[..n]);
                *have += n;
                if *have < TRAILER {
                    return Ok((n, 0, Place::Inside));
                }
                let words = [0, 4].map(|at| {
                    let word: [u8; 4] = std::array::from_fn(|n| bytes[at + n]);
                    u32::from_le_bytes(word)
                });
                if self.checksum.as_ref().is_some_and(|crc| words != [crc.sum(), crc.amount()]) {
                    return Err(broken("the checksum of a gzip member is wrong"));
                }
                (self.state, self.bytes) = (State::START, 0);
                self.checksum = Some(Crc::new());
                self.inflater.init();
                Ok((n, 0, Place::Frame))
            }
        }
    }

    fn inflate(
        &mut self,
        input: &[u8],
        ring: &mut [u8],
        at: usize,
    ) -> io::Result<(usize, usize, Place)> {
        let flags = TINFL_FLAG_HAS_MORE_INPUT | TINFL_FLAG_STOP_ON_BLOCK_BOUNDARY;
        let (status, consumed, produced) = decompress(&mut self.inflater, input, ring, at, flags);
        if let Some(checksum) = &mut self.checksum {
            checksum.update(&ring[at..at + produced]);
        }
        self.bytes += produced as u64;
        let place = match status {
            TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput => Place::Inside,
            TINFLStatus::BlockBoundary => Place::Block,
            TINFLStatus::Done => {
                self.state = State::Trailer { have: 0, bytes: [0; TRAILER] };
                Place::Inside
            }
            _ => return Err(broken("the deflate stream is corrupt")),
        };
        Ok((consumed, produced, place))
    }
}

const HEADER_CHECKSUM: u8 = 2;
const EXTRA: u8 = 4;
const NAME: u8 = 8;
const COMMENT: u8 = 16;

impl Header {
    /// Takes a byte; `None` if it was the last.
    fn next(self, byte: u8, flags: &mut u8) -> io::Result<Option<Self>> {
        Ok(match self {
            Self::Fixed(n @ 0..=2) if byte != [0x1f, 0x8b, 8][n] => {
                return Err(broken("a gzip member does not begin as one"));
            }
            Self::Fixed(3) => {
                *flags = byte;
                Some(Self::Fixed(4))
            }
            Self::Fixed(9) => Self::after(*flags, EXTRA),
            Self::Fixed(n) => Some(Self::Fixed(n + 1)),
            Self::ExtraLength(None) => Some(Self::ExtraLength(Some(byte))),
            Self::ExtraLength(Some(low)) => match u16::from_le_bytes([low, byte]) {
                0 => Self::after(*flags, NAME),
                length => Some(Self::Extra(length)),
            },
            Self::Extra(1) => Self::after(*flags, NAME),
            Self::Extra(left) => Some(Self::Extra(left - 1)),
            Self::Name if byte == 0 => Self::after(*flags, COMMENT),
            Self::Comment if byte == 0 => Self::after(*flags, HEADER_CHECKSUM),
            Self::Name | Self::Comment => Some(self),
            Self::Checksum(true) => None,
            Self::Checksum(false) => Some(Self::Checksum(true)),
        })
    }

    /// The part that `flags` have, `first` or one after it.
    fn after(flags: u8, first: u8) -> Option<Self> {
        let parts = [
            (EXTRA, Self::ExtraLength(None)),
            (NAME, Self::Name),
            (COMMENT, Self::Comment),
            (HEADER_CHECKSUM, Self::Checksum(false)),
        ];
        let from = parts.iter().position(|(flag, _)| *flag == first).unwrap_or(0);
        parts[from..].iter().find(|(flag, _)| flags & flag != 0).map(|(_, part)| *part)
    }
}
