//! Blobs of layers are put into the lease of a record, and fetched for it.

use crate::{
    layer::{KnownBlob, StackedLayer, lost},
    records::{Record, Records},
};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::Descriptor;
use shipway_progress::Reporter;

impl Records {
    /// A blob of the layer that is in the content store and in the lease of `record`; fetched if
    /// need be.
    pub async fn stored_blob(
        &self,
        stacked: &StackedLayer,
        record: &Record,
        progress: Option<&Reporter>,
    ) -> Result<Descriptor> {
        let _one = stacked.fetching.lock().await;
        let mut blobs = stacked.blobs();
        blobs.sort_by_key(|b| !b.is_stored());
        let mut failed = None;
        for blob in blobs {
            match self.secure(stacked, &blob, record, progress).await {
                Ok(true) => return Ok(blob.descriptor),
                Ok(false) => {}
                Err(e) => failed = Some(e),
            }
        }
        Err(failed.unwrap_or_else(|| {
            let gone = Fault::not_found(format!("no blob of layer {} is in containerd, and it has no source to fetch it from", stacked.diff_id))
                .hint("it was removed by another program: build again without this cache record, for example after `shipway prune`");
            lost(stacked, None, gone)
        }))
    }

    /// Puts a blob into the lease of `record`, fetching it if it is not stored; false if it cannot
    /// be had.
    pub async fn secure(
        &self,
        stacked: &StackedLayer,
        blob: &KnownBlob,
        record: &Record,
        progress: Option<&Reporter>,
    ) -> Result<bool> {
        let (digest, lease) = (blob.descriptor.digest, &record.lease);
        if self.keep_blob(digest, record).await? {
            stacked.know(KnownBlob::stored(blob.descriptor.clone()));
            return Ok(true);
        }
        let Some(source) = blob.place.source() else {
            stacked.lost(blob);
            return Ok(false);
        };
        let what = || format!("fetch layer {digest} of {}", source.describe());
        source
            .fetch(&blob.descriptor, &*self.backend.storage.content, lease, progress)
            .await
            .context(what)
            .map_err(|e| lost(stacked, Some(source), e))?;
        record.secured.lock().insert(digest);
        stacked.know(KnownBlob::stored(blob.descriptor.clone()));
        Ok(true)
    }
}
