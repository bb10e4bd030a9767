//! The digest of a file's contents, made of digests of pieces: where those of the pieces are known
//! the file need not be read.

use shipway_oci::{Digest, Hasher};
use std::path::Path;

/// Bytes of a piece of a file's contents; the last one of a file may be shorter.
///
/// It is the default length of chunks of eStargz and zstd:chunked layers, so that the digests in a
/// layer's table of contents are those of pieces. A table has a digest of each whole file as well,
/// but what is read of the layer is compared with those of chunks alone: a file could have other
/// contents than the digest of the whole says, and a cache key that depends on that digest would
/// then be a key to other contents.
pub const PIECE: u64 = 4 << 20;

/// What the digest of contents in several pieces begins with.
const PIECES: &[u8] = b"pieces\0";

/// The digest of a file's contents from those of its pieces, in order: that of the only piece, or
/// one of all their digests. `None` unless there are as many as a file of `size` bytes has.
pub(crate) fn of_pieces(size: u64, pieces: &[Digest]) -> Option<Digest> {
    if pieces.len() as u64 != size.div_ceil(PIECE) {
        return None;
    }
    match pieces {
        [] => Some(Digest::of([])),
        [only] => Some(*only),
        all => {
            let mut hasher = Hasher::new();
            hasher.update(PIECES);
            all.iter().for_each(|piece| hasher.update(piece.as_bytes()));
            Some(hasher.finish())
        }
    }
}

/// Makes the digest of contents that come bit by bit.
#[derive(Default)]
pub(crate) struct ContentHasher {
    piece: Hasher,
    /// Bytes of the piece.
    bytes: u64,
    /// Of the pieces before it, if there are any.
    before: Option<Hasher>,
}

impl ContentHasher {
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.bytes == PIECE {
                self.end_piece();
            }
            let room = usize::try_from(PIECE - self.bytes).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at(bytes.len().min(room));
            self.piece.update(now);
            self.bytes += now.len() as u64;
            bytes = rest;
        }
    }

    fn end_piece(&mut self) -> &mut Hasher {
        let before = self.before.get_or_insert_with(|| {
            let mut hasher = Hasher::new();
            hasher.update(PIECES);
            hasher
        });
        before.update(std::mem::take(&mut self.piece).finish().as_bytes());
        self.bytes = 0;
        before
    }

    pub fn finish(mut self) -> Digest {
        match self.before {
            None => self.piece.finish(),
            Some(_) => std::mem::take(self.end_piece()).finish(),
        }
    }
}

/// A regular file of a tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeFile<'a> {
    /// Path from the tree's root, without links on its way.
    pub path: &'a Path,
    /// Number of its inode, as the tree shows it.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Time of modification in nanoseconds since 1970.
    pub mtime: i64,
}

/// Knows what is in files of a tree without reading them.
pub trait KnownContents {
    /// For each of `files`, the digests (SHA-256) of its pieces of [`PIECE`] bytes, in order;
    /// `None` where they are not known. To read a piece must give bytes with that digest or fail.
    /// Blocks.
    fn pieces(&self, files: &[TreeFile<'_>]) -> Vec<Option<Vec<Digest>>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_and_streams_give_the_same_digest() {
        let bytes: Vec<u8> = (0..2 * PIECE + 5).map(|n| ((n * n) >> 7) as u8).collect();
        for size in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 5] {
            let bytes = &bytes[..size as usize];
            let pieces: Vec<Digest> = bytes.chunks(PIECE as usize).map(Digest::of).collect();
            let known = of_pieces(size, &pieces).unwrap();
            for step in [bytes.len().max(1), PIECE as usize, 1_000_003] {
                let mut hasher = ContentHasher::default();
                bytes.chunks(step).for_each(|part| hasher.update(part));
                assert_eq!(hasher.finish(), known, "{size} bytes by {step}");
            }
            assert_eq!(of_pieces(size + PIECE, &pieces), None);
            assert_eq!(size <= PIECE, known == Digest::of(bytes));
        }
    }
}
