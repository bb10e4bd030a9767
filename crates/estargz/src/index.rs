//! Where the data of a layer goes in a file of its own, and what has to be fetched for each part of
//! it.
//!
//! A layer that is served from the disk has one file with the data of all its files, in the order
//! of the archive, each from a [`DATA_BLOCK`] boundary on. A [`Record`] says for a chunk where it
//! goes there, where in the blob it comes from, and what digest it has. Chunks need not begin at
//! block boundaries within a file (those of containers/storage do not), so places are in bytes, and
//! a block is there only when all chunks are that touch it.
//!
//! What containers do not see has no place: landmarks, and files whose name makes them a whiteout.

use crate::{Chunk, Content, EntryId, Kind, TarEntry, TarKind, Toc, toc};
use shipway_oci::Digest;
use std::ops::Range;

/// Files begin at multiples of so many bytes.
pub const DATA_BLOCK: u64 = 4096;

/// Prefix of names that stand for something missing below (OCI image specification, layer.md).
const WHITEOUT: &[u8] = b".wh.";

/// A chunk's place in the file of data and in the blob. In bytes, little endian: data, size, offset
/// (64 bits each), compressed and inner (32 bits each), digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where it begins in the file of data.
    pub data: u64,
    /// Its length there.
    pub size: u64,
    /// Where in the blob its member or frame begins.
    pub offset: u64,
    /// Bytes of the blob to fetch from there; 0 for zeros, for which nothing is fetched.
    pub compressed: u32,
    /// Bytes to skip after decompression.
    pub inner: u32,
    /// Digest of the data; `None` for zeros.
    pub digest: Option<Digest>,
}

impl Record {
    /// Bytes of a record.
    pub const BYTES: usize = 64;

    fn new(chunk: &Chunk, start: u64) -> Self {
        let digest = match chunk.content {
            Content::Data(digest) => Some(digest),
            Content::Zeros => None,
        };
        // Both are bounded far below 4 GiB: see `MAX_CHUNK`, `MAX_INNER` and where a chunk's end is
        // set.
        let compressed = u32::try_from(chunk.end - chunk.offset).unwrap_or(u32::MAX);
        Self {
            data: start + chunk.file_offset,
            size: chunk.size,
            offset: chunk.offset,
            compressed: digest.map_or(0, |_| compressed),
            inner: u32::try_from(chunk.inner).unwrap_or(u32::MAX),
            digest,
        }
    }

    /// As stored.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        for (at, number) in [(0, self.data), (8, self.size), (16, self.offset)] {
            out[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        out[24..28].copy_from_slice(&self.compressed.to_le_bytes());
        out[28..32].copy_from_slice(&self.inner.to_le_bytes());
        if let Some(digest) = &self.digest {
            out[32..].copy_from_slice(digest.as_bytes());
        }
        out
    }

    /// From what was stored.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |n: usize| u64::from_le_bytes(words[n]);
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[32..]);
        let (compressed, inner) = (word(3) as u32, (word(3) >> 32) as u32);
        let digest = (compressed != 0).then(|| Digest::from_bytes(digest));
        Self { data: word(0), size: word(1), offset: word(2), compressed, inner, digest }
    }
}

/// Whether a file of this name stands for something missing below.
fn is_whiteout(path: &[u8]) -> bool {
    path.rsplit(|b| *b == b'/').next().unwrap_or_default().starts_with(WHITEOUT)
}

/// Where files go in the file of data, one after the other: all files that are not landmarks, in
/// the order of the archive.
#[derive(Clone, Copy, Debug, Default)]
pub struct DataPlaces {
    end: u64,
}

impl DataPlaces {
    /// Where the data of the next file begins; `None` if it has none there, because it is empty or
    /// because its name makes it a whiteout.
    pub fn next(&mut self, path: &[u8], size: u64) -> Option<u64> {
        if size == 0 || is_whiteout(path) {
            return None;
        }
        let start = self.end.checked_next_multiple_of(DATA_BLOCK)?;
        self.end = start.checked_add(size)?;
        Some(start)
    }

    /// Where the data of the last one ends.
    pub fn end(&self) -> u64 {
        self.end
    }
}

/// The files of a tar that have something in these `pieces` of the file of data, ranges of blocks
/// of [`DATA_BLOCK`] bytes, in their order and each once: where the tar's files go there is as
/// [`Toc::data_starts`] says for its table of contents.
pub fn files_in<'a>(
    entries: impl IntoIterator<Item = &'a TarEntry>,
    pieces: impl IntoIterator<Item = Range<u64>>,
) -> Vec<Vec<u8>> {
    // In the order of the file of data: where each begins and ends, in blocks.
    let (mut files, mut places) = (Vec::new(), DataPlaces::default());
    for entry in entries {
        let TarKind::File(size @ 1..) = entry.kind else { continue };
        let mut path = Vec::new();
        if entry.is_of_format() || toc::clean(&entry.path, &mut path).is_err() {
            continue;
        }
        let Some(start) = places.next(&path, size) else { continue };
        let blocks = start / DATA_BLOCK..places.end().div_ceil(DATA_BLOCK);
        files.push((blocks, Some(path)));
    }
    let mut found = Vec::new();
    for piece in pieces {
        let start = files.partition_point(|(blocks, _)| blocks.end <= piece.start);
        let rest = files.get_mut(start..).unwrap_or_default();
        let within = rest.iter_mut().take_while(|(blocks, _)| blocks.start < piece.end);
        found.extend(within.filter_map(|(_, path)| path.take()));
    }
    found
}

impl Toc {
    /// Where the data of each file that has any begins in the file of data, in order. Landmarks and
    /// whiteouts are left out.
    pub fn data_starts(&self) -> impl Iterator<Item = (EntryId, u64)> {
        // What is added up is bounded by `MAX_DATA`, and a block for each of `MAX_ENTRIES`.
        let mut places = DataPlaces::default();
        self.entries().filter_map(move |entry| match entry.kind() {
            Kind::File { size, .. } if !entry.is_landmark() => {
                Some((entry.id(), places.next(entry.path(), size)?))
            }
            _ => None,
        })
    }

    /// The records of all chunks, sorted by place in the file of data.
    pub fn records(&self) -> impl Iterator<Item = Record> {
        self.data_starts().flat_map(|(id, start)| {
            let chunks = match self.entry(id).kind() {
                Kind::File { chunks, .. } => chunks,
                _ => &[],
            };
            chunks.iter().map(move |chunk| Record::new(chunk, start))
        })
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;
    use crate::Time;

    #[test]
    fn pieces_of_data_are_those_of_files() {
        let entry = |path: &str, kind| TarEntry {
            path: path.into(),
            kind,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Time::default(),
            xattrs: Vec::new(),
        };
        let file = TarKind::File;
        let entries = [
            entry("dir/", TarKind::Directory),
            entry(".prefetch.landmark", file(1)),
            entry("dir/one", file(1)),
            entry("dir/empty", file(0)),
            entry("dir/.wh.gone", file(9)),
            entry("./two", file(4097)),
            entry("link", TarKind::HardLink(b"two".to_vec())),
            entry("three", file(4096)),
            entry("stargz.index.json", file(50_000)),
        ];
        for (pieces, want) in [
            (&[3..4, 0..1][..], &["three", "dir/one"][..]),
            (&[2..3, 0..9], &["two", "dir/one", "three"]),
            (&[4..u64::MAX, 1..1], &[]),
            (&[0..2], &["dir/one", "two"]),
        ] {
            let found = files_in(&entries, pieces.iter().cloned());
            assert_eq!(found, want.iter().map(|p| p.as_bytes().to_vec()).collect::<Vec<_>>());
        }
    }
}
