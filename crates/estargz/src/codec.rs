//! Decompression, bounded.

use crate::Result;
use std::io::{self, BufRead, Read};

/// Largest window of a zstd frame, as a power of two: a frame says how much memory its reader
/// needs. The same limit as where layers are unpacked.
pub const MAX_WINDOW_LOG: u32 = 27;

/// How a lazy layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codec {
    /// gzip: stargz and eStargz.
    Gzip,
    /// zstd: zstd:chunked.
    Zstd,
}

/// The decompressed bytes of gzip members or zstd frames, one after another; skippable frames give
/// none.
pub struct Frames<R>(Inner<R>);

enum Inner<R> {
    Gzip(Box<flate2::bufread::MultiGzDecoder<R>>),
    Zstd(zstd::stream::read::Decoder<'static, R>),
}

impl<R: BufRead> Frames<R> {
    /// Reads `input`, which begins with a member or frame.
    pub fn new(codec: Codec, input: R) -> Result<Self> {
        Ok(Self(match codec {
            Codec::Gzip => Inner::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(input))),
            Codec::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(MAX_WINDOW_LOG)?;
                Inner::Zstd(decoder)
            }
        }))
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Inner::Gzip(gzip) => gzip.read(buf),
            Inner::Zstd(zstd) => zstd.read(buf),
        }
    }
}
