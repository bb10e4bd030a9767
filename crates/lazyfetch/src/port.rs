//! The ports: where layers are written to, where their bytes come from, and who may ask for them.

use async_trait::async_trait;
use bytes::Bytes;
use shipway_fault::Fault;
use shipway_layerstore::{Frame, Good, Layer};
use shipway_oci::{Digest, ImageName};
use shipway_registry::CredentialSource;
use std::{ops::Range, sync::Arc, time::Duration};

/// A blob of a registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Blob {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// Where a chunk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkPlace {
    /// Its blocks.
    pub blocks: Range<u64>,
    /// Where its frame begins in the blob.
    pub frame: u64,
}

/// Why a frame was not written.
#[derive(Clone, Debug)]
pub enum WriteError {
    /// The bytes are not the promised ones: another source may have the right ones.
    Wrong(Fault),
    /// The disk failed, or something else that no source can help with.
    Failed(Fault),
}

/// A layer on the disk: [`shipway_layerstore::Layer`], and layers in memory for tests. Blocks are
/// of [`shipway_estargz::DATA_BLOCK`] bytes in the layer's file of data. All calls may wait for the
/// disk, but for those where it is said.
pub trait Target: Send + Sync + 'static {
    /// The layer's number. Does not wait.
    fn number(&self) -> u32;

    /// The blob that the layer is in. Does not wait.
    fn blob(&self) -> Blob;

    /// Makes of `blocks` good what can be made so without fetching; gives all parts of them that
    /// are good then.
    fn verify(&self, blocks: Range<u64>) -> Result<Good, Fault>;

    /// The frames that have to be fetched for `blocks`, in order, each once.
    fn frames(&self, blocks: Range<u64>) -> Result<Vec<Frame>, Fault>;

    /// Whether something of a frame is not good. Does not wait.
    fn is_missing(&self, frame: &Frame) -> bool;

    /// Writes a frame's chunks out of its `compressed` bytes, each if it is right; what is good by
    /// them goes to `good`.
    fn write(
        &self,
        frame: &Frame,
        compressed: &[u8],
        good: &mut dyn FnMut(Good),
    ) -> Result<(), WriteError>;

    /// Where the chunk begins that a block is of, the first one if there are several; `None` if it
    /// is of none.
    fn chunk_at(&self, block: u64) -> Result<Option<ChunkPlace>, Fault>;

    /// Blocks whose data is in the blob before the place `end`.
    fn before(&self, end: u64) -> Result<Range<u64>, Fault>;
}

impl Target for Layer {
    fn number(&self) -> u32 {
        Layer::number(self).0
    }

    fn blob(&self) -> Blob {
        Blob { digest: self.key().blob, size: self.blob_size() }
    }

    fn verify(&self, blocks: Range<u64>) -> Result<Good, Fault> {
        Ok(self.verify_blocks(blocks)?)
    }

    fn frames(&self, blocks: Range<u64>) -> Result<Vec<Frame>, Fault> {
        let mut frames = Vec::new();
        for extent in self.extents(blocks)? {
            frames.extend(extent?.frames);
        }
        Ok(frames)
    }

    fn is_missing(&self, frame: &Frame) -> bool {
        // What cannot be known is found out by writing.
        frame.chunks.iter().any(|chunk| !self.is_verified(chunk.id).unwrap_or(false))
    }

    fn write(
        &self,
        frame: &Frame,
        compressed: &[u8],
        good: &mut dyn FnMut(Good),
    ) -> Result<(), WriteError> {
        self.write_frame(frame, compressed, good).map_err(|error| match error.is_wrong_bytes() {
            true => WriteError::Wrong(error.into()),
            false => WriteError::Failed(error.into()),
        })
    }

    fn chunk_at(&self, block: u64) -> Result<Option<ChunkPlace>, Fault> {
        let chunk = self.chunks_touching(block..block.saturating_add(1))?.next().transpose()?;
        Ok(chunk.map(|chunk| ChunkPlace { blocks: chunk.blocks(), frame: chunk.record.offset }))
    }

    fn before(&self, end: u64) -> Result<Range<u64>, Fault> {
        Ok(self.blocks_before(end)?)
    }
}

/// Which bytes of a blob to get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// These.
    Range(Range<u64>),
    /// So many of its end, or all if it is shorter.
    Last(u64),
}

/// A place to fetch blobs from: a repository at a host. One request per call; who calls retries,
/// limits and waits.
#[async_trait]
pub trait Source: Send + Sync + 'static {
    /// Host and port, which tell ways in the network apart.
    fn host(&self) -> &str;

    /// Begins to get bytes of `blob`. With `fresh`, caches on the way are asked to get it anew.
    async fn open(
        &self,
        digest: Digest,
        size: Option<u64>,
        wanted: Wanted,
        fresh: bool,
    ) -> Result<Opened, SourceError>;

    /// Opens connections ahead, and has tokens fetched.
    async fn warm(&self, digest: Digest);
}

/// An answer.
pub struct Opened {
    /// Where in the blob the body begins. It may be before what was asked for, if the server does
    /// not know ranges; it may also go on after it.
    pub start: u64,
    /// The blob's length, if the server said.
    pub size: Option<u64>,
    /// The bytes.
    pub body: Box<dyn Body>,
}

/// The bytes of an answer.
#[async_trait]
pub trait Body: Send {
    /// The next piece; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, SourceError>;
}

/// What a failure leaves to hope for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hope {
    /// The same may succeed soon.
    Soon,
    /// The server wants to be left alone for so long.
    After(Duration),
    /// Only another source can help.
    Elsewhere,
}

/// Why a source did not give bytes.
#[derive(Clone, Debug)]
pub struct SourceError {
    /// What to do about it.
    pub hope: Hope,
    /// Why.
    pub fault: Fault,
}

impl SourceError {
    /// An error.
    pub fn new(hope: Hope, fault: impl Into<Fault>) -> Self {
        Self { hope, fault: fault.into() }
    }
}

/// Who gives credentials for repositories.
pub trait Credentials: Send + Sync + 'static {
    /// The credentials to ask `repository` with.
    fn of(&self, repository: &ImageName) -> Arc<dyn CredentialSource>;
}

/// Tells of blocks that became good.
pub type Report = Arc<dyn Fn(Good) + Send + Sync>;

/// Takes the bytes of a whole blob in order, writes what is missing of the layer, and finds out
/// whether blob and tar are what they should be; see [`crate::Finish`]. Called where blocking is
/// allowed.
pub trait Whole: Send + 'static {
    /// The next bytes. An error ends the reading.
    fn bytes(&mut self, bytes: &Bytes) -> Result<(), Fault>;

    /// All bytes have come.
    fn finish(self: Box<Self>) -> Result<(), Fault>;
}
