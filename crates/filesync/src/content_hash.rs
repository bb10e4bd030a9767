//! Digests of files that are taken while they are received.

use crate::Stat;

/// Hashes files as they are written, so that they need not be read again.
pub trait ContentHash: Send + Sync {
    /// Starts the digest of the file described by `stat`, as it will be on disk.
    fn start(&self, stat: &Stat) -> Box<dyn HashSink>;
}

/// One digest in the making.
pub trait HashSink: Send {
    /// Adds content.
    fn update(&mut self, data: &[u8]);
    /// The digest.
    fn finish(self: Box<Self>) -> [u8; 32];
}
