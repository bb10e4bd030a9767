//! Compression of one block of a stream, on its own.

use crate::{Compression, CompressionKind};
use libdeflater::{CompressionLvl, Compressor};
use shipway_estargz::is_hard;
use shipway_fault::{Fault, Result};

/// Bytes of the stream per block. Part of the format of our blobs: changing it changes their
/// digests.
pub const BLOCK: usize = 512 * 1024;
/// A block is judged in pieces of this size: tars mix what shrinks with what does not, at places of
/// their own.
const PIECE: usize = 64 * 1024;
/// What deflate does by default: the fastest level, for blobs are waited for; `compression-level`
/// asks for more.
const GZIP_LEVEL: i32 = 1;
/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;

/// Compresses blocks one by one; has no memory between them that could reach the output.
pub struct BlockCompressor {
    codec: Codec,
    /// Compressed forms of runs of zeros, by length, which holes and padding produce in numbers.
    zeros: Vec<(usize, Vec<u8>)>,
    /// Output of a codec, of unknown length.
    scratch: Vec<u8>,
}

/// What is to be done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PieceKind {
    Zero,
    Normal,
    /// It hardly shrinks, so that trying is a waste.
    Hard,
}

enum Codec {
    None,
    Gzip { normal: Compressor, stored: Compressor },
    Zstd { normal: zstd::bulk::Compressor<'static>, fast: zstd::bulk::Compressor<'static> },
}

impl BlockCompressor {
    /// A compressor of the kind and level that `compression` names.
    pub fn new(compression: Compression) -> Result<Self> {
        let codec = match compression.kind.algorithm() {
            CompressionKind::Uncompressed => Codec::None,
            CompressionKind::Gzip | CompressionKind::Estargz => {
                // BuildKit counts 0 to 9 and -1 for the default.
                let level = compression.level.filter(|l| *l >= 0).unwrap_or(GZIP_LEVEL).min(12);
                Codec::Gzip {
                    normal: Compressor::new(gzip_level(level)?),
                    stored: Compressor::new(gzip_level(0)?),
                }
            }
            CompressionKind::Zstd | CompressionKind::ZstdChunked(_) => {
                let level = compression.level.filter(|l| *l >= 0).unwrap_or(ZSTD_LEVEL).min(22);
                Codec::Zstd { normal: zstd_of(level)?, fast: zstd_of(-7)? }
            }
        };
        Ok(Self { codec, zeros: Vec::new(), scratch: Vec::new() })
    }

    /// Appends the compressed form of `block` to `out`: a member or frame for each run of pieces of
    /// one nature.
    pub fn compress(&mut self, block: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if matches!(self.codec, Codec::None) {
            out.extend_from_slice(block);
            return Ok(());
        }
        let mut pieces = block.chunks(PIECE);
        let Some(first) = pieces.next() else { return Ok(()) };
        let (mut run, mut nature) = (0..first.len(), judge(first));
        for piece in pieces {
            let next = judge(piece);
            if next != nature {
                self.run(&block[run.clone()], nature, out)?;
                (run, nature) = (run.end..run.end, next);
            }
            run.end += piece.len();
        }
        self.run(&block[run], nature, out)
    }

    fn run(&mut self, run: &[u8], nature: PieceKind, out: &mut Vec<u8>) -> Result<()> {
        if nature == PieceKind::Zero {
            if let Some((_, done)) = self.zeros.iter().find(|(len, _)| *len == run.len()) {
                out.extend_from_slice(done);
                return Ok(());
            }
            let start = out.len();
            self.encode(run, false, out)?;
            // All lengths but the stream's last are multiples of a piece, so there are few.
            self.zeros.push((run.len(), out[start..].to_vec()));
            return Ok(());
        }
        self.encode(run, nature == PieceKind::Hard, out)
    }

    fn encode(&mut self, block: &[u8], hard: bool, out: &mut Vec<u8>) -> Result<()> {
        let encoded = match &mut self.codec {
            Codec::None => block,
            Codec::Gzip { normal, stored } => {
                let codec = if hard { stored } else { normal };
                let room = room(&mut self.scratch, codec.gzip_compress_bound(block.len()));
                let n = codec
                    .gzip_compress(block, room)
                    .map_err(|e| Fault::internal(format!("gzip a layer: {e}")))?;
                &room[..n]
            }
            Codec::Zstd { normal, fast } => {
                let codec = if hard { fast } else { normal };
                let room = room(&mut self.scratch, zstd::zstd_safe::compress_bound(block.len()));
                let n = codec
                    .compress_to_buffer(block, room)
                    .map_err(|e| Fault::internal(format!("zstd a layer: {e}")))?;
                &room[..n]
            }
        };
        out.extend_from_slice(encoded);
        Ok(())
    }
}

/// `scratch` with at least `len` bytes.
fn room(scratch: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if scratch.len() < len {
        scratch.resize(len, 0);
    }
    scratch
}

fn judge(piece: &[u8]) -> PieceKind {
    if is_zero(piece) {
        return PieceKind::Zero;
    }
    if is_hard(piece) { PieceKind::Hard } else { PieceKind::Normal }
}

fn gzip_level(level: i32) -> Result<CompressionLvl> {
    CompressionLvl::new(level).map_err(|_| {
        Fault::invalid(format!("compression-level {level} is not a level of gzip"))
            .hint("use 0 to 9")
    })
}

fn zstd_of(level: i32) -> Result<zstd::bulk::Compressor<'static>> {
    zstd::bulk::Compressor::new(level).map_err(|e| {
        Fault::invalid(format!("compression-level {level} is not a level of zstd: {e}"))
    })
}

fn is_zero(block: &[u8]) -> bool {
    let (head, words, tail) =
        (block.first(), block.chunks_exact(64), block.chunks_exact(64).remainder());
    head == Some(&0)
        && words.into_iter().all(|w| w.iter().fold(0, |a, b| a | b) == 0)
        && tail.iter().all(|b| *b == 0)
}

/// The result of a thread that was joined.
pub(crate) fn joined<T>(result: std::thread::Result<T>) -> Result<T> {
    result.map_err(|_| Fault::internal("a thread that packs a layer panicked"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_judged_where_they_lie() {
        let mut x = 1u64;
        let random: Vec<u8> = std::iter::repeat_with(|| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        })
        .take(PIECE)
        .collect();
        let repeated: Vec<u8> = random[..1024].iter().copied().cycle().take(PIECE).collect();
        let text =
            b"fn main() { println!(\"hello\"); }\n".iter().copied().cycle().take(PIECE).collect();
        let mut compressor = BlockCompressor::new(Compression::default()).expect("a compressor");
        for (piece, nature) in [
            (vec![0; PIECE], PieceKind::Zero),
            (random.clone(), PieceKind::Hard),
            (repeated, PieceKind::Normal),
            (text, PieceKind::Normal),
        ] {
            assert_eq!(judge(&piece), nature);
        }
        // As tars have it: a header, then what does not shrink, then a hole.
        let mut block = vec![0; BLOCK];
        block[1536..BLOCK / 2].fill(7);
        block[1536..1536 + PIECE].copy_from_slice(&random);
        let mut out = Vec::new();
        compressor.compress(&block, &mut out).expect("compressed");
        assert!((PIECE..PIECE + 4096).contains(&out.len()), "{}", out.len());
    }
}
