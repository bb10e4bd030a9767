//! Streams of compressed bytes as readers.

use crate::CompressionKind;
use bytes::{Buf as _, Bytes};
use shipway_fault::{Code, Fault, Result};
use std::io::{self, Read};

/// Reads pieces as they come.
struct Pieces<'a> {
    next: &'a mut (dyn FnMut() -> Result<Option<Bytes>> + Send),
    piece: Bytes,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match (self.next)().map_err(io::Error::other)? {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let n = buf.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

/// A reader of what `input` holds, decompressed.
pub fn reader<'a>(
    kind: CompressionKind,
    input: &'a mut (dyn FnMut() -> Result<Option<Bytes>> + Send),
) -> Result<Box<dyn Read + 'a>> {
    let pieces = Pieces { next: input, piece: Bytes::new() };
    Ok(match kind.algorithm() {
        CompressionKind::Uncompressed => Box::new(pieces),
        CompressionKind::Gzip | CompressionKind::Estargz => {
            Box::new(flate2::read::MultiGzDecoder::new(pieces))
        }
        CompressionKind::Zstd | CompressionKind::ZstdChunked(_) => {
            Box::new(zstd::stream::read::Decoder::new(pieces).map_err(fault)?)
        }
    })
}

/// The fault of a read: the input's own, if that is what failed.
pub fn fault(error: io::Error) -> Fault {
    match error.downcast::<Fault>() {
        Ok(fault) => fault,
        Err(error) => Fault::new(Code::DataLoss, format!("decompress a layer: {error}")),
    }
}
