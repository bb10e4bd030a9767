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

use crate::{Chunk, Content, EntryId, Kind, Toc};
use shipway_oci::Digest;

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

/// Where files go in the file of data, one after the other: all files that are not landmarks, in the
/// order of the archive.
#[derive(Clone, Copy, Debug, Default)]
pub struct DataPlaces {
    end: u64,
}

impl DataPlaces {
    /// Where the data of the next file begins; `None` if it has none there, because it is empty or
    /// because its name makes it a whiteout.
    pub fn next(&mut self, path: &[u8], size: u64) -> Option<u64> {
        let name = path.rsplit(|b| *b == b'/').next().unwrap_or_default();
        if size == 0 || name.starts_with(WHITEOUT) {
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
