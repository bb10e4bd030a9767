//! Compressed blobs of layers: found, fetched, or made once and in parallel.

use crate::{
    assemble::assembled,
    blob_writer::{MADE_OF, MEDIA_TYPE, annotations, indexed_blob},
    immutable::ImmutableRef,
    layer::{IndexedBlob, KnownBlob, LayerBlob, StackedLayer, lost},
    layered::LayeredRef,
    records::{Record, Records},
};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use shipway_archive::{Compression, CompressionKind};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest};
use shipway_progress::Reporter;
use shipway_storage::{BlobReader, Labels, UNCOMPRESSED};
use std::sync::Arc;

/// Layers of one state that are worked on at the same time; each is compressed by all processors.
const PARALLEL: usize = 3;

/// Which of the blobs that are known by their descriptors only are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// None of them.
    Nothing,
    /// Those of layers that no remote snapshotter serves: it needs no blob to run the image.
    Unserved,
    /// All of them.
    Everything,
}

impl Fetch {
    /// Whether the blob of a layer is fetched.
    fn wants(self, layer: &StackedLayer) -> bool {
        match self {
            Self::Nothing => false,
            Self::Unserved => !layer.is_served(),
            Self::Everything => true,
        }
    }
}

impl ImmutableRef {
    /// A blob for each layer, in the content store (under the lease of the state that brought the
    /// layer) unless the layer is lazy and `fetch` leaves it so: then the descriptor is all there
    /// is.
    pub async fn blobs(
        &self,
        compression: Compression,
        fetch: Fetch,
        progress: Option<&Reporter>,
    ) -> Result<Vec<LayerBlob>> {
        self.layered().await?.blobs(compression, fetch, progress).await
    }

    /// Begins in the background what [`ImmutableRef::blobs`] will wait for, layers that have no
    /// blob yet; stops when `unwanted` is done.
    pub fn start_compression(
        &self,
        compression: Compression,
        unwanted: impl Future<Output = ()> + Send + 'static,
    ) {
        // A client's directory is not made a layer before it is exported.
        let Some(layered) = self.as_layered().cloned() else { return };
        let background = layered.records().backend.background.clone();
        background.spawn("compress layers ahead", async move {
            let done = tokio::select! {
                biased;
                () = unwanted => Ok(()),
                done = layered.blobs(compression, Fetch::Nothing, None) => done.map(drop),
            };
            if let Err(e) = done {
                tracing::debug!(error = %e, "failed to compress ahead, will retry when the layer is exported");
            }
        });
    }

    /// The bytes of a blob of one of its layers. Those that are not in the content store are passed
    /// on as their source sends them, and stored nowhere.
    pub async fn blob_reader(&self, digest: Digest) -> Result<Box<dyn BlobReader>> {
        match self.records().backend.storage.content.reader(digest).await {
            Err(e) if e.is_not_found() => {}
            reader => return reader,
        }
        let layers = self.as_layered().map_or(&[][..], |l| &l.record().layers);
        let blobs = layers.iter().flat_map(|c| c.blobs().into_iter().map(move |b| (c, b)));
        for (stacked, blob) in blobs.filter(|(_, b)| b.descriptor.digest == digest) {
            if let Some(source) = blob.place.source() {
                let what = || format!("read layer {digest} of {}", source.describe());
                let opened = source.open(&blob.descriptor).await.context(what);
                return opened.map_err(|e| lost(stacked, Some(source), e));
            }
        }
        Err(Fault::not_found(format!("blob {digest} is not in containerd, and has no source")))
    }

    /// The labels of a Prepare by which a remote snapshotter serves the layer with this blob, in
    /// any namespace.
    pub async fn remote_labels(&self, digest: Digest) -> Option<Labels> {
        let layers = self.as_layered().map_or(&[][..], |l| &l.record().layers);
        let mut remote = layers.iter().filter_map(|c| c.remote_blob());
        let (blob, source) = remote.find(|(blob, _)| blob.digest == digest)?;
        source.enable_snapshotter().await;
        source.remote_labels(&blob).await
    }

    /// Makes the snapshot exist that an image of the blobs that `compression` gives unpacks to: its
    /// own where that is what unpacking them gives, and otherwise one that is unpacked from them.
    /// Layers with a table of contents behind their tar have other digests, and so another name.
    pub async fn unpack(
        &self,
        compression: Compression,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        self.layered().await?.unpack(compression, progress).await
    }
}

impl LayeredRef {
    /// [`ImmutableRef::blobs`].
    async fn blobs(
        &self,
        compression: Compression,
        fetch: Fetch,
        progress: Option<&Reporter>,
    ) -> Result<Vec<LayerBlob>> {
        let (record, records) = (self.record(), self.records());
        if record.layers.is_empty() {
            return Ok(Vec::new());
        }
        // Boxed, for the compiler cannot yet tell that such a stream may move between threads.
        let mut work = Vec::with_capacity(record.layers.len());
        for stacked in &record.layers {
            let owner = self.owner(stacked);
            let one = async move {
                records.ensure_lease(&owner).await?;
                let blob = records.blob(stacked, &owner, compression, fetch, progress).await;
                let (descriptor, diff_id) = blob.context(|| {
                    format!("compress layer {} ({})", stacked.diff_id, record.latest_description())
                })?;
                let lazy = stacked.origin_of(&descriptor);
                Ok::<_, Fault>(LayerBlob { descriptor, diff_id, lazy })
            };
            work.push(one.boxed());
        }
        stream::iter(work).buffered(PARALLEL).try_collect().await
    }

    /// The lowest state below this one that has the layer, or this one: states stay as long as
    /// something is made of them, so the blob is kept with the layer's own state, and another state
    /// on top of that need not keep it again.
    fn owner(&self, stacked: &Arc<StackedLayer>) -> Arc<Record> {
        let has =
            |state: &LayeredRef| state.record().layers.iter().any(|c| Arc::ptr_eq(c, stacked));
        let mut owner = self;
        while let Some(below) = owner.parent().filter(|below| has(below)) {
            owner = below;
        }
        owner.record().clone()
    }

    /// [`ImmutableRef::unpack`].
    async fn unpack(&self, compression: Compression, progress: Option<&Reporter>) -> Result<()> {
        let (record, same) = (self.record(), self.is_exact());
        if same && !compression.kind.is_indexed() {
            return self.materialize(progress).await;
        }
        let blobs = self.blobs(compression, Fetch::Nothing, progress).await?;
        if same && blobs.iter().zip(&record.layers).all(|(b, layer)| b.diff_id == layer.diff_id) {
            return self.materialize(progress).await;
        }
        let records = self.records();
        let mut stack: Vec<Arc<StackedLayer>> = Vec::with_capacity(record.layers.len());
        for (layer, blob) in record.layers.iter().zip(blobs) {
            let stacked = records.stacked_layer(blob.diff_id, stack.last());
            if blob.diff_id == layer.diff_id {
                layer.blobs().into_iter().for_each(|b| stacked.know(b));
            } else {
                stacked.know(KnownBlob::stored(blob.descriptor));
            }
            if let Some(created) = layer.created() {
                stacked.set_created(created);
            }
            stack.push(stacked);
        }
        assembled(records, "unpacked", stack, Vec::new(), record.description.clone())
            .materialize(progress)
            .await
    }
}

impl Records {
    async fn blob(
        self: &Arc<Self>,
        stacked: &Arc<StackedLayer>,
        record: &Arc<Record>,
        compression: Compression,
        fetch: Fetch,
        progress: Option<&Reporter>,
    ) -> Result<(Descriptor, DiffId)> {
        let _one = stacked.packing.lock().await;
        let own = |descriptor| (descriptor, stacked.diff_id);
        if compression.kind.is_indexed()
            && let Some(found) = self.indexed(stacked, record, compression).await?
        {
            return Ok((found.descriptor, found.diff_id));
        }
        if let Some(found) = self.known(stacked, record, compression, fetch, progress).await? {
            return Ok(own(found));
        }
        if !stacked.is_new() {
            self.look_up(stacked).await?;
            if let Some(found) = self.known(stacked, record, compression, fetch, progress).await? {
                return Ok(own(found));
            }
        }
        if compression.force && !stacked.blobs().is_empty() {
            return self.convert(stacked, record, compression, progress).await;
        }
        // The files of a layer that was moved are where they were: what lies below it here need not
        // be.
        let elsewhere = match stacked.copy_of() {
            Some(original) => self.keep_snapshot(&record.lease, &original).await?,
            None => false,
        };
        if !elsewhere {
            self.materialize(record, None, progress).await?;
        }
        self.pack(stacked, record, compression).await
    }

    /// The best blob among those known.
    async fn known(
        &self,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
        fetch: Fetch,
        progress: Option<&Reporter>,
    ) -> Result<Option<Descriptor>> {
        let kind = |b: &KnownBlob| CompressionKind::of(&b.descriptor);
        let fits = |b: &KnownBlob| kind(b).is_some_and(|k| k.is_as_good_as(compression.kind));
        let mut blobs = stacked.blobs();
        blobs.retain(|b| !compression.force || fits(b));
        blobs.sort_by_key(|b| (!fits(b), kind(b) != Some(compression.kind), !b.is_stored()));
        for blob in blobs {
            if !blob.is_stored() && !fetch.wants(stacked) {
                // Another state may have fetched it since.
                if self.backend.storage.content.info(blob.descriptor.digest).await.is_err() {
                    return Ok(Some(blob.descriptor));
                }
            }
            let _one = stacked.fetching.lock().await;
            if self.secure(stacked, &blob, record, progress).await? {
                return Ok(Some(blob.descriptor));
            }
        }
        Ok(None)
    }

    /// The blob of a layer that has the table of contents that `compression` asks for, if one was
    /// made; an earlier run's is found by its labels.
    async fn indexed(
        &self,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
    ) -> Result<Option<IndexedBlob>> {
        let made_as = compression.to_string();
        let known = stacked.indexed(&made_as);
        let looks = known.is_none() && !stacked.is_new();
        let mut found: Vec<IndexedBlob> = known.into_iter().collect();
        if looks {
            let filter = format!("labels.\"{MADE_OF}\"==\"{}\"", stacked.diff_id);
            let stored = self.backend.storage.content.list(&[filter]).await?;
            found.extend(stored.iter().filter_map(indexed_blob).filter(|b| b.made_as == made_as));
        }
        for blob in found {
            if self.keep_blob(blob.descriptor.digest, record).await? {
                stacked.know_indexed(blob.clone());
                return Ok(Some(blob));
            }
            stacked.lost_indexed(&made_as);
        }
        Ok(None)
    }

    /// Finds blobs that an earlier run, or another program, stored for the layer.
    async fn look_up(&self, stacked: &StackedLayer) -> Result<()> {
        let filter = format!("labels.\"{UNCOMPRESSED}\"==\"{}\"", stacked.diff_id);
        for info in self.backend.storage.content.list(&[filter]).await? {
            let media_type = match info.labels.get(MEDIA_TYPE) {
                Some(t) => t.clone(),
                None => self.sniff(info.digest).await?.media_type().to_owned(),
            };
            let mut descriptor = Descriptor::new(media_type, info.digest, info.size);
            descriptor.annotations = annotations(&info.labels);
            stacked.know(KnownBlob::stored(descriptor));
        }
        Ok(())
    }

    /// The compression of a stored blob by its first bytes.
    async fn sniff(&self, digest: Digest) -> Result<CompressionKind> {
        let mut reader = self.backend.storage.content.reader(digest).await?;
        let first = reader.next().await?.unwrap_or_default();
        Ok(match first.get(..4) {
            Some([0x1f, 0x8b, ..]) => CompressionKind::Gzip,
            Some([0x28, 0xb5, 0x2f, 0xfd]) => CompressionKind::Zstd,
            _ => CompressionKind::Uncompressed,
        })
    }
}
