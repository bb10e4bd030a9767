//! The files that only indexed layers have.

use crate::ChunkId;
use shipway_oci::Digest;
use std::{fs::File, io, os::unix::fs::FileExt as _};

/// What the index says of the tar: a zTOC without checkpoints.
pub(crate) const ENTRIES: &str = "entries";
/// What was found out of each chunk.
pub(crate) const DIGESTS: &str = "digests";
/// Bytes of a digest.
pub(crate) const DIGEST: usize = 32;

/// The digests of data that was written, in the order of chunks.
pub(crate) struct Digests(pub File);

impl Digests {
    /// Notes that of a chunk, before its data is written.
    pub fn learn(&self, chunk: ChunkId, digest: &Digest) -> io::Result<()> {
        self.0.write_all_at(digest.as_bytes(), u64::from(chunk.0) * DIGEST as u64)
    }

    /// What was noted; zeros are the digest of nothing.
    pub fn get(&self, chunk: ChunkId) -> io::Result<Digest> {
        let mut digest = [0; DIGEST];
        self.0.read_exact_at(&mut digest, u64::from(chunk.0) * DIGEST as u64)?;
        Ok(Digest::from_bytes(digest))
    }
}
