//! Blobs of layers that are made before anybody asks for them.

use crate::{
    Compression, ImmutableRef,
    blobs::{Fetch, Sealed, Sink, seal},
    layer::StackedLayer,
    record::fresh_id,
    run_lease::RunLease,
    store::{Inner, Record},
};
use shipway_archive::{LayerTree, Loss, Tar};
use shipway_fault::Result;
use std::sync::Arc;

/// The blob of a layer that belongs to no state yet: the lease of the epoch keeps it until a state
/// does.
pub(crate) struct UnownedBlob {
    store: Arc<Inner>,
    lease: RunLease,
    pub tar: Tar,
    /// What unpacking it does not give back.
    pub loss: Option<Loss>,
    sealed: Sealed,
}

impl UnownedBlob {
    /// Packs `tree`; `guard` is what keeps it readable.
    pub async fn pack<G: Send + 'static>(
        store: &Arc<Inner>,
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
            store.stream(lease, format!("shipway-ahead-{}", fresh_id()), work).await?;
        let (owner, lease) = (store.clone(), lease.clone());
        // Cut off in the middle, it would leave a blob in a lease that lives long.
        let sealed = async move {
            lease.retain_blob(packed.digest).await;
            match seal(writer, &packed, compression).await {
                Ok(sealed) => {
                    Ok(Self { store: owner, lease, tar: packed.tar, loss: packed.loss, sealed })
                }
                Err(e) => {
                    lease.release_blob(&owner.storage, packed.digest).await;
                    Err(e)
                }
            }
        };
        store.background.finish("seal a blob", sealed).await
    }

    /// Lets its layer know the blob.
    pub fn tell(&self, stacked: &StackedLayer) {
        self.sealed.tell(stacked);
    }

    /// Lets `record`, whose topmost layer it is and whose lease exists, keep the blob; false if
    /// it was deleted.
    pub async fn give(&self, record: &Record) -> Result<bool> {
        self.store.hold(self.sealed.descriptor.digest, record).await
    }
}

impl Drop for UnownedBlob {
    fn drop(&mut self) {
        let (store, lease, digest) =
            (self.store.clone(), self.lease.clone(), self.sealed.descriptor.digest);
        self.store.background.spawn("release a blob", async move {
            lease.release_blob(&store.storage, digest).await
        });
    }
}

impl ImmutableRef {
    /// Begins in the background what [`ImmutableRef::blobs`] will wait for, layers that have no
    /// blob yet; stops when `unwanted` is done.
    pub fn start_compression(
        &self,
        compression: Compression,
        unwanted: impl Future<Output = ()> + Send + 'static,
    ) {
        let this = self.clone();
        self.0.store.background.spawn("compress layers ahead", async move {
            if this.record().is_none() {
                // A client's directory is not made a layer before it is exported.
                return;
            }
            let done = tokio::select! {
                biased;
                () = unwanted => Ok(()),
                done = this.blobs(compression, Fetch::Nothing, None) => done.map(drop),
            };
            if let Err(e) = done {
                tracing::debug!(error = %e, "failed to compress ahead, will retry when the layer is exported");
            }
        });
    }
}
