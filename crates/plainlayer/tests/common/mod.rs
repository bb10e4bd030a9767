//! Blobs of all kinds, and what the tests read in them.

#![allow(dead_code, clippy::unwrap_used)]

use miniz_oxide::deflate::{
    CompressionLevel, compress_to_vec,
    core::{
        CompressorOxide, compress_to_output, create_comp_flags_from_zip_params,
        deflate_flags::TDEFL_FORCE_ALL_STATIC_BLOCKS,
    },
};
use shipway_archive::{Member, TarReader};
use shipway_estargz::{Codec, TarEntry, Toc};
use shipway_oci::Digest;
use shipway_plainlayer::{Error, HEADER, Maker, Scan, Scanner, Spans, ZtocEntry};
use std::io::{Read as _, Write as _};

/// A source of numbers that are the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    /// Bytes that compress well, badly or not at all, in turns.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let run = 1 + self.below(20_000) as usize;
            match self.below(4) {
                0 => out.extend((0..run).map(|_| self.next() as u8)),
                1 => out.extend((0..run).map(|_| b"etaoin shrdlu"[self.below(13) as usize])),
                2 => out.resize(out.len() + run, self.next() as u8),
                _ => {
                    // What was there before, as far as deflate sees and farther.
                    let back = 1 + self.below(out.len().max(1) as u64) as usize;
                    let from = out.len().saturating_sub(back);
                    let piece = out[from..out.len().min(from + run)].to_vec();
                    out.extend(piece);
                }
            }
        }
        out.truncate(len);
        out
    }
}

/// How a member or frame is compressed.
#[derive(Clone, Copy, Debug)]
pub enum How {
    /// zlib, with a flush after so many bytes.
    Zlib(u32, Option<usize>),
    /// libdeflate.
    Deflate(i32),
    /// With fixed codes only.
    Fixed,
    /// By the library that reads it, as a raw stream.
    Miniz(u8),
    Zstd,
}

/// A gzip header with every field there is.
const FULL_HEADER: &[u8] = b"\x1f\x8b\x08\x1e\0\0\0\0\0\x03\x05\0extraname\0comment\0\xaa\xbb";
const BARE_HEADER: &[u8] = b"\x1f\x8b\x08\0\0\0\0\0\0\x03";

fn member(raw: &[u8], data: &[u8], full: bool) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(data);
    let mut out = if full { FULL_HEADER } else { BARE_HEADER }.to_vec();
    out.extend_from_slice(raw);
    out.extend_from_slice(&crc.sum().to_le_bytes());
    out.extend_from_slice(&crc.amount().to_le_bytes());
    out
}

impl How {
    pub fn compress(self, data: &[u8]) -> Vec<u8> {
        match self {
            Self::Zlib(level, flush) => {
                let mut gzip =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
                for piece in data.chunks(flush.unwrap_or(usize::MAX)) {
                    gzip.write_all(piece).unwrap();
                    if flush.is_some() {
                        gzip.flush().unwrap();
                    }
                }
                gzip.finish().unwrap()
            }
            Self::Deflate(level) => {
                let level = libdeflater::CompressionLvl::new(level).unwrap();
                let mut compressor = libdeflater::Compressor::new(level);
                let mut out = vec![0; compressor.gzip_compress_bound(data.len())];
                let n = compressor.gzip_compress(data, &mut out).unwrap();
                out.truncate(n);
                out
            }
            Self::Fixed => {
                let level = CompressionLevel::DefaultLevel as i32;
                let flags = create_comp_flags_from_zip_params(level, 0, 0);
                let mut compressor = CompressorOxide::new(flags | TDEFL_FORCE_ALL_STATIC_BLOCKS);
                let mut raw = Vec::new();
                let finish = miniz_oxide::deflate::core::TDEFLFlush::Finish;
                compress_to_output(&mut compressor, data, finish, |bytes| {
                    raw.extend_from_slice(bytes);
                    true
                });
                member(&raw, data, true)
            }
            Self::Miniz(level) => member(&compress_to_vec(data, level), data, false),
            Self::Zstd => zstd::bulk::compress(data, 3).unwrap(),
        }
    }
}

/// Reads all of the tar of a blob as it is.
pub fn scan(codec: Codec, blob: &[u8], length: u64) -> Result<Scan, Error> {
    Scanner::new(codec, blob)?.spans_of(length).finish()
}

/// The spans in a file, for a blob.
pub fn decode(blob: &Digest, file: &[u8]) -> Result<Spans, Error> {
    let header = file.first_chunk::<HEADER>().ok_or(Error::Damaged("too short"))?;
    let head = file.get(..Spans::length(header)?).ok_or(Error::Damaged("too short"))?;
    Spans::decode(blob, head, file.len() as u64)
}

/// What a span has.
pub fn read(spans: &Spans, n: usize, file: &[u8], blob: &[u8]) -> Result<Vec<u8>, Error> {
    let span = &spans.all()[n];
    let window = &file[span.window.start as usize..span.window.end as usize];
    let compressed = &blob[span.compressed.start as usize..span.compressed.end as usize];
    let mut out = Vec::new();
    spans.reader(span, window, compressed)?.read_to_end(&mut out)?;
    Ok(out)
}

/// Spans and table of contents of a blob.
pub fn make(codec: Codec, blob: &[u8], length: u64) -> Result<(Scan, Toc), Error> {
    let mut scanner = Scanner::new(codec, blob)?.spans_of(length);
    let mut maker = Maker::new(codec, scanner.progress());
    let mut tar = TarReader::new(&mut scanner);
    let mut buffer = vec![0; 10_000];
    while let Some(member) = tar.next_member()? {
        maker.entry(&TarEntry::from(&member))?;
        while let Some(piece) = tar.piece(&mut buffer)? {
            maker.data(&buffer[..piece.len])?;
        }
    }
    let scan = scanner.finish()?;
    let toc = maker.finish(&scan)?;
    Ok((scan, toc))
}

/// The zTOC of a blob.
pub fn ztoc(blob: &[u8], length: u64) -> Result<Vec<u8>, Error> {
    let mut scanner = Scanner::new(Codec::Gzip, blob)?.with_checkpoints(length).allow_long_spans();
    let progress = scanner.progress();
    let (mut tar, mut entries) = (TarReader::new(&mut scanner), Vec::new());
    while let Some(member) = tar.next_member()? {
        let offset = progress.read();
        let tar = TarEntry::from(&member);
        let Member { user, group, records, .. } = member;
        entries.push(ZtocEntry { tar, offset, user, group, records });
    }
    let end = progress.read();
    scanner.finish()?.ztoc(&entries, end, "test")
}
