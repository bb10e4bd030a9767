//! Checkpoints of zTOCs, and how they are found while a blob is read.

use crate::{
    Error, Result,
    engine::{BlockStart, WINDOW},
};
use shipway_oci::{Digest, Hasher};
use std::borrow::Cow;

/// Most bytes of a zTOC: those of a layer of 8 GiB, with spans of the usual length.
pub const MAX_ZTOC: usize = 64 << 20;
/// Bytes of a checkpoint there: places in blob and tar, bits, window.
pub const CHECKPOINT: usize = 8 + 8 + 1 + WINDOW;

/// A place where decompression can begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint<'a> {
    /// Of the blob, the first byte that is the block's alone.
    pub offset: u64,
    /// Where in the tar its output begins.
    pub start: u64,
    /// Bits of the byte before that are the block's.
    pub bits: u8,
    /// The output before it.
    pub window: Cow<'a, [u8]>,
    /// Of the span's compressed bytes.
    pub digest: Digest,
}

impl Checkpoint<'_> {
    /// Where in the blob its span begins.
    pub fn begin(&self) -> u64 {
        self.offset - u64::from(self.bits > 0)
    }
}

/// Checkpoints while a blob is read.
pub struct Checkpoints {
    /// Bytes of the tar of which a span has more.
    pub length: u64,
    all: Vec<Checkpoint<'static>>,
    /// Of the current span's compressed bytes.
    hasher: Hasher,
    /// The last byte that came.
    last: u8,
}

impl Checkpoints {
    pub fn new(length: u64) -> Self {
        Self { length, all: Vec::new(), hasher: Hasher::new(), last: 0 }
    }

    /// These bytes of the blob are done with.
    pub fn consumed(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.last = bytes.last().copied().unwrap_or(self.last);
    }

    /// A block begins at these places in the blob and in the tar.
    pub fn block(
        &mut self,
        (offset, start): (u64, u64),
        block: impl FnOnce() -> BlockStart,
    ) -> Result<()> {
        let last = self.all.last().map_or(0, |last| last.start);
        if start != 0 && start - last <= self.length {
            return Ok(());
        }
        if (self.all.len() + 1) * CHECKPOINT > MAX_ZTOC {
            return Err(Error::Ztoc("it would be too large: its spans are short"));
        }
        let BlockStart { bits, window } = block();
        self.end_span();
        if bits > 0 {
            self.hasher.update([self.last]);
        }
        let (window, digest) = (Cow::Owned(window), Digest::from_bytes([0; 32]));
        self.all.push(Checkpoint { offset, start, bits, window, digest });
        Ok(())
    }

    fn end_span(&mut self) {
        let hasher = std::mem::take(&mut self.hasher);
        if let Some(last) = self.all.last_mut() {
            last.digest = hasher.finish();
        }
    }

    /// All of them, when the blob has ended.
    pub fn finish(mut self) -> Vec<Checkpoint<'static>> {
        self.end_span();
        self.all
    }
}
