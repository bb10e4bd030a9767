//! Blobs of layers that are made before the state that has the layer.

use crate::{
    blob_writer::{Sealed, Sink, seal},
    id::fresh_id,
    layer::StackedLayer,
    records::{Record, Records},
    run_lease::RunLease,
};
use shipway_archive::{Compression, LayerTree, Loss, Tar};
use shipway_fault::Result;
use std::sync::Arc;

/// The blob of a layer that belongs to no state yet: the run lease keeps it until a state does.
pub(crate) struct UnownedBlob {
    records: Arc<Records>,
    lease: RunLease,
    pub tar: Tar,
    /// What unpacking it does not give back.
    pub loss: Option<Loss>,
    sealed: Sealed,
}

impl UnownedBlob {
    /// Packs `tree`; `guard` is what keeps it readable.
    pub async fn pack<G: Send + 'static>(
        records: &Arc<Records>,
        lease: &RunLease,
        (tree, guard): (LayerTree, G),
        compression: Compression,
    ) -> Result<Self> {
        let work = move |sink: Sink<'_>| {
            let packed = shipway_archive::pack(&tree, compression, None, None, sink);
            drop(guard);
            packed
        };
        let (packed, writer) =
            records.backend.stream(lease, format!("shipway-ahead-{}", fresh_id()), work).await?;
        let (owner, lease) = (records.clone(), lease.clone());
        // Cut off in the middle, it would leave a blob in a lease that lives long.
        let sealed = async move {
            lease.retain_blob(packed.digest).await;
            match seal(writer, &packed, compression).await {
                Ok(sealed) => {
                    Ok(Self { records: owner, lease, tar: packed.tar, loss: packed.loss, sealed })
                }
                Err(e) => {
                    lease.release_blob(&owner.backend.storage, packed.digest).await;
                    Err(e)
                }
            }
        };
        records.backend.background.finish("seal a blob", sealed).await
    }

    /// Adds it to the blobs of its layer.
    pub fn add_to(&self, stacked: &StackedLayer) {
        self.sealed.add_to(stacked);
    }

    /// Lets `record`, whose topmost layer it is and whose lease exists, keep the blob; false if
    /// it was deleted.
    pub async fn give(&self, record: &Record) -> Result<bool> {
        self.records.keep_blob(self.sealed.descriptor.digest, record).await
    }
}

impl Drop for UnownedBlob {
    fn drop(&mut self) {
        let (backend, lease, digest) =
            (self.records.backend.clone(), self.lease.clone(), self.sealed.descriptor.digest);
        self.records.backend.background.spawn("release a blob", async move {
            lease.release_blob(&backend.storage, digest).await
        });
    }
}
