//! The bytes of a layer that is exported, from where they are.

use shipway_fault::Result;
use shipway_oci::Digest;
use shipway_refs::ImmutableRef;
use shipway_storage::{BlobReader, ContentStore};
use std::sync::Arc;

/// The bytes of a layer that is exported, wherever they are.
#[derive(Clone)]
pub struct LayerBytes {
    digest: Digest,
    lazy: Option<ImmutableRef>,
    content: Arc<dyn ContentStore>,
}

impl LayerBytes {
    /// The bytes of the blob `digest`: in `content`, unless the state `lazy` has to give them.
    pub(crate) fn new(
        digest: Digest,
        lazy: Option<ImmutableRef>,
        content: Arc<dyn ContentStore>,
    ) -> Self {
        Self { digest, lazy, content }
    }

    /// A reader of them. Those that are not here are passed on from where they are.
    pub async fn open(self) -> Result<Box<dyn BlobReader>> {
        match &self.lazy {
            Some(state) => state.blob_reader(self.digest).await,
            None => self.content.reader(self.digest).await,
        }
    }
}
