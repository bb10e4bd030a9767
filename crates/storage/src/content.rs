//! The content port: blobs by digest.

use crate::{Labels, LeaseId};
use async_trait::async_trait;
use bytes::Bytes;
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest};

/// What is known of a stored blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Its labels.
    pub labels: Labels,
}

/// An ingest to open: `reference` must be unique among running ingests of the namespace.
#[derive(Clone, Debug)]
pub struct Ingest {
    /// Name of the ingest.
    pub reference: String,
    /// Digest the bytes will have, if it is known; a blob already there makes
    /// [`ContentStore::writer`] fail with `AlreadyExists`.
    pub expected: Option<Digest>,
    /// Length the bytes will have, if it is known.
    pub size: Option<u64>,
}

/// Blobs of one namespace.
#[async_trait]
pub trait ContentStore: Send + Sync {
    /// What is known of `digest`; `NotFound` if it is not stored.
    async fn info(&self, digest: Digest) -> Result<BlobInfo>;

    /// All blobs, or those that match any of the containerd filters.
    async fn list(&self, filters: &[String]) -> Result<Vec<BlobInfo>>;

    /// Sets labels; an empty value removes one. Other labels stay.
    async fn update_labels(&self, digest: Digest, labels: &Labels) -> Result<BlobInfo>;

    /// A reader of the blob.
    async fn reader(&self, digest: Digest) -> Result<Box<dyn BlobReader>>;

    /// Opens an ingest under `lease`. `AlreadyExists` when the expected blob is there (it is then
    /// in the lease).
    async fn writer(&self, lease: &LeaseId, ingest: Ingest) -> Result<Box<dyn BlobWriter>>;

    /// Reads a whole blob of at most `limit` bytes and verifies its digest.
    async fn read_all(&self, digest: Digest, limit: u64) -> Result<Bytes> {
        let mut reader = self.reader(digest).await?;
        if reader.size() > limit {
            return Err(shipway_fault::Fault::invalid(format!(
                "blob {digest} has {} bytes, more than the {limit} allowed here",
                reader.size()
            )));
        }
        let mut bytes = Vec::with_capacity(reader.size() as usize);
        while let Some(chunk) = reader.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        if Digest::of(&bytes) != digest {
            return Err(shipway_fault::Fault::new(
                shipway_fault::Code::DataLoss,
                format!("blob {digest} is damaged in the content store"),
            ));
        }
        Ok(bytes.into())
    }

    /// Stores `bytes` with labels under `lease`, whether or not they are there already, and returns
    /// the digest.
    async fn put(&self, lease: &LeaseId, bytes: Bytes, labels: &Labels) -> Result<Digest> {
        let digest = Digest::of(&bytes);
        let reference = format!("shipway-put-{}", digest.hex());
        let ingest = Ingest { reference, expected: Some(digest), size: Some(bytes.len() as u64) };
        match self.writer(lease, ingest).await {
            Ok(mut writer) => {
                writer.write(bytes).await?;
                writer.commit(Some(digest), labels).await?;
            }
            Err(e) if e.is_already_exists() => {}
            Err(e) => return Err(e),
        }
        // A blob that was there keeps its own labels, so ours are always set afterwards.
        if !labels.is_empty() {
            self.update_labels(digest, labels).await?;
        }
        Ok(digest)
    }

    /// Whether the blob of `descriptor` is stored.
    async fn has(&self, descriptor: &Descriptor) -> Result<bool> {
        match self.info(descriptor.digest).await {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// Reads a blob front to back, or at offsets.
#[async_trait]
pub trait BlobReader: Send {
    /// Length of the blob.
    fn size(&self) -> u64;
    /// The next chunk; `None` at the end.
    async fn next(&mut self) -> Result<Option<Bytes>>;
    /// Continues at `offset`.
    async fn seek(&mut self, offset: u64) -> Result<()>;
}

/// Writes one ingest. Dropping it without commit aborts the ingest.
#[async_trait]
pub trait BlobWriter: Send {
    /// Whether the store has all bytes already, from another namespace: [`BlobWriter::commit`] can
    /// follow at once.
    fn is_complete(&self) -> bool {
        false
    }
    /// Appends bytes; implementations gather them into large messages.
    async fn write(&mut self, bytes: Bytes) -> Result<()>;
    /// Ends the ingest as a blob; `expected` is verified by the store. Succeeds when the blob is
    /// there already.
    async fn commit(self: Box<Self>, expected: Option<Digest>, labels: &Labels)
    -> Result<BlobInfo>;
}
