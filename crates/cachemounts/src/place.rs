//! Where artifacts are kept.

use async_trait::async_trait;
use bytes::Bytes;
use shipway_fault::Result;
use shipway_oci::{Descriptor, Digest};
use std::{collections::HashSet, time::SystemTime};

/// The name of an artifact at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// It.
    pub name: String,
    /// When it was written, where the place says so.
    pub written: Option<SystemTime>,
}

/// A place that keeps artifacts: manifests by name, blobs by digest.
#[async_trait]
pub trait Place: Send + Sync {
    /// What it is called in messages, without a name of an artifact.
    fn shown(&self) -> String;

    /// The manifest of this name, at most [`MAX_DOCUMENT`](crate::MAX_DOCUMENT) bytes;
    /// `None` where there is none.
    async fn manifest(&self, name: &str) -> Result<Option<Bytes>>;

    /// The names that begin with `prefix`, in any order.
    async fn names(&self, prefix: &str) -> Result<Vec<Named>>;

    /// A blob, at most as many bytes as its descriptor says. Callers check its digest.
    async fn read(&self, blob: &Descriptor) -> Result<Bytes>;

    /// Which of these blobs, which an artifact of the place names, are there and will be for a
    /// while.
    async fn present(&self, blobs: &[Descriptor]) -> Result<HashSet<Digest>> {
        Ok(blobs.iter().map(|blob| blob.digest).collect())
    }

    /// Writes a blob, unless it is there.
    async fn write(&self, blob: &Descriptor, bytes: Bytes) -> Result<()>;

    /// Gives a manifest this name, by which it is found from now on. Its blobs are there.
    async fn publish(&self, name: &str, manifest: &Descriptor, bytes: Bytes) -> Result<()>;
}
