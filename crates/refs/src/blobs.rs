//! Compressed blobs of layers: found, fetched, or made once and in parallel.

use crate::{
    Compression, CompressionKind, ImmutableRef, LayerBlob,
    layer::{IndexedBlob, KnownBlob, StackedLayer, lost},
    store::{Inner, Record},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use shipway_archive::Packed;
use shipway_fault::{Code, Context as _, Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest};
use shipway_progress::Reporter;
use shipway_storage::{BlobInfo, BlobReader, BlobWriter, Ingest, Labels, LeaseId, UNCOMPRESSED};
use shipway_task::{blocking, spawn};
use std::{collections::BTreeMap, sync::Arc};
use tokio::{sync::mpsc, task::AbortHandle};

/// Layers of one state that are worked on at the same time; each is compressed by all processors.
const PARALLEL: usize = 3;
/// Blocks on their way from the compressor to the store.
const IN_FLIGHT: usize = 8;
/// Label on a blob that we made: its media type, which the content store does not know otherwise.
const MEDIA_TYPE: &str = "shipway/media-type";
/// Labels on a blob with a table of contents that we made: digest of the layer's tar that it was
/// made of, and how.
const MADE_OF: &str = "shipway/made-of";
const MADE_AS: &str = "shipway/made-as";
/// Prefix of labels that keep the annotations which its descriptor needs.
const ANNOTATION: &str = "shipway/annotation/";

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
        let layered = self.layered().await?;
        let record = layered.layered_record()?;
        if record.layers.is_empty() {
            return Ok(Vec::new());
        }
        let store = &self.0.store;
        // Boxed, for the compiler cannot yet tell that such a stream may move between threads.
        let mut work = Vec::with_capacity(record.layers.len());
        for stacked in &record.layers {
            let owner = layered.owner(stacked)?;
            let one = async move {
                store.ensure_lease(&owner).await?;
                let blob = store.blob(stacked, &owner, compression, fetch, progress).await;
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

    /// The bytes of a blob of one of its layers. Those that are not in the content store are passed
    /// on as their source sends them, and stored nowhere.
    pub async fn blob_reader(&self, digest: Digest) -> Result<Box<dyn BlobReader>> {
        match self.0.store.storage.content.reader(digest).await {
            Err(e) if e.is_not_found() => {}
            reader => return reader,
        }
        let layers = self.record().map_or(&[][..], |r| &r.layers);
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

    /// What a remote snapshotter has to be told to serve the layer with this blob, in whichever
    /// namespace: labels of a Prepare.
    pub async fn remote_labels(&self, digest: Digest) -> Option<Labels> {
        let layers = self.record().map_or(&[][..], |r| &r.layers);
        let mut remote = layers.iter().filter_map(|c| c.remote_blob());
        let (blob, source) = remote.find(|(blob, _)| blob.digest == digest)?;
        source.enable_snapshotter().await;
        source.remote_labels(&blob).await
    }

    /// The lowest state below this one that has the layer, or this one: states stay as long as
    /// something is made of them, so the blob is kept with the layer's own state, and another state
    /// on top of that need not keep it again.
    fn owner(&self, stacked: &Arc<StackedLayer>) -> Result<Arc<Record>> {
        let mut owner = self.layered_record()?.clone();
        let mut below = self.parent();
        while let Some(state) = below {
            match state.record() {
                Some(record) if record.layers.iter().any(|c| Arc::ptr_eq(c, stacked)) => {
                    owner = record.clone()
                }
                _ => break,
            }
            below = state.parent();
        }
        Ok(owner)
    }
}

impl ImmutableRef {
    /// Makes the snapshot exist that an image of the blobs that `compression` gives unpacks to: its
    /// own where that is what unpacking them gives, and otherwise one that is unpacked from them.
    /// Layers with a table of contents behind their tar have other digests, and so another name.
    pub async fn unpack(
        &self,
        compression: Compression,
        progress: Option<&Reporter>,
    ) -> Result<()> {
        let layered = self.layered().await?;
        let record = layered.layered_record()?;
        let same = layered.is_exact();
        if same && !compression.kind.is_indexed() {
            return layered.materialize(progress).await;
        }
        let blobs = layered.blobs(compression, Fetch::Nothing, progress).await?;
        if same && blobs.iter().zip(&record.layers).all(|(b, layer)| b.diff_id == layer.diff_id) {
            return layered.materialize(progress).await;
        }
        let store = &layered.0.store;
        let mut stack: Vec<Arc<StackedLayer>> = Vec::with_capacity(record.layers.len());
        for (layer, blob) in record.layers.iter().zip(blobs) {
            let stacked = store.stacked_layer(blob.diff_id, stack.last());
            if blob.diff_id == layer.diff_id {
                layer.blobs().into_iter().for_each(|b| stacked.know(b));
            } else {
                let descriptor = blob.descriptor;
                stacked.know(KnownBlob::stored(descriptor));
            }
            if let Some(created) = layer.created() {
                stacked.set_created(created);
            }
            stack.push(stacked);
        }
        store
            .assembled("unpacked", stack, Vec::new(), record.description.clone())
            .materialize(progress)
            .await
    }
}

impl Inner {
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
                // Somebody else may have fetched it since.
                if self.storage.content.info(blob.descriptor.digest).await.is_err() {
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
            let stored = self.storage.content.list(&[filter]).await?;
            found.extend(stored.iter().filter_map(indexed_blob).filter(|b| b.made_as == made_as));
        }
        for blob in found {
            if self.hold(blob.descriptor.digest, record).await? {
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
        for info in self.storage.content.list(&[filter]).await? {
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
        let mut reader = self.storage.content.reader(digest).await?;
        let first = reader.next().await?.unwrap_or_default();
        Ok(match first.get(..4) {
            Some([0x1f, 0x8b, ..]) => CompressionKind::Gzip,
            Some([0x28, 0xb5, 0x2f, 0xfd]) => CompressionKind::Zstd,
            _ => CompressionKind::Uncompressed,
        })
    }

    /// Makes a blob from the layer's files. It must be the very tar that the diffID was taken of.
    pub async fn pack(
        self: &Arc<Self>,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
    ) -> Result<(Descriptor, DiffId)> {
        let own = || (stacked.snapshot.clone(), stacked.parent.is_some());
        let (name, parent) = match stacked.copy_of() {
            Some(original) => match self.storage.snapshots.stat(&original).await {
                Ok(info) => (original, info.parent.is_some()),
                Err(_) => own(),
            },
            None => own(),
        };
        let (tree, guard) = self.layer_tree(&name, parent).await?;
        let known = stacked.tar.get().copied();
        let work = move |sink: Sink<'_>| {
            let packed = shipway_archive::pack(&tree, compression, known, None, sink);
            drop(guard);
            packed
        };
        self.store_packed(stacked, record, compression, work).await
    }

    /// Makes a blob of another compression from the bytes of an existing one.
    async fn convert(
        self: &Arc<Self>,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
        progress: Option<&Reporter>,
    ) -> Result<(Descriptor, DiffId)> {
        let from = self.stored_blob(stacked, record, progress).await?;
        let kind = CompressionKind::of_media_type(&from.media_type).ok_or_else(|| {
            Fault::unimplemented(format!(
                "changing the compression of layers of type {}",
                from.media_type
            ))
        })?;
        let mut input = Feed::new(self.storage.content.reader(from.digest).await?);
        let work = move |sink: Sink<'_>| {
            shipway_archive::recompress(&mut || input.next(), kind, compression, None, sink)
        };
        self.store_packed(stacked, record, compression, work).await
    }

    /// Stores what `work` makes under the lease of `record` and checks that it is the layer.
    async fn store_packed(
        self: &Arc<Self>,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
        work: impl FnOnce(Sink<'_>) -> Result<Packed> + Send + 'static,
    ) -> Result<(Descriptor, DiffId)> {
        let how = compression.to_string().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let reference = format!("shipway-layer-{}-{how}", stacked.diff_id.0.hex());
        let (packed, writer) = self.stream(&record.lease, reference, work).await?;
        let made = packed.tar.diff_id;
        if made != stacked.diff_id {
            let fault =
                Fault::new(Code::FailedPrecondition, format!("the files of the layer make the tar {made}, which is not {}", stacked.diff_id))
                    .hint("the layer came from a registry and its blob was removed from containerd: pull the image again, with `--pull`");
            return Err(lost(stacked, None, fault));
        }
        let sealed = seal(writer, &packed, compression).await?;
        record.secured.lock().insert(packed.digest);
        sealed.tell(stacked);
        Ok((sealed.descriptor, packed.diff_id()))
    }

    /// Writes what `work` makes, on a thread of its own, into the content store under `lease`;
    /// the holder of the writer gives it its name.
    pub(crate) async fn stream(
        &self,
        lease: &LeaseId,
        reference: String,
        work: impl FnOnce(Sink<'_>) -> Result<Packed> + Send + 'static,
    ) -> Result<(Packed, Box<dyn BlobWriter>)> {
        let mut writer = self
            .storage
            .content
            .writer(lease, Ingest { reference, expected: None, size: None })
            .await?;
        let (send, mut blocks) = mpsc::channel::<Bytes>(IN_FLIGHT);
        let packing = blocking("pack a layer", move || {
            // A failing send means that the caller is gone.
            work(&mut |block| send.blocking_send(block).map_err(|_| Fault::cancelled()))
        });
        while let Some(block) = blocks.recv().await {
            writer.write(block).await?;
        }
        let packed = packing.await?;
        Ok((packed, writer))
    }
}

/// The bytes of a stored blob on their way to a thread that packs; the way ends when this is
/// dropped.
pub(crate) struct Feed {
    chunks: mpsc::Receiver<Result<Bytes>>,
    reading: AbortHandle,
}

impl Feed {
    pub fn new(mut blob: Box<dyn BlobReader>) -> Self {
        let (send, chunks) = mpsc::channel(IN_FLIGHT);
        let reading = spawn("read a blob", async move {
            while let Some(chunk) = blob.next().await.transpose() {
                let failed = chunk.is_err();
                if send.send(chunk).await.is_err() || failed {
                    return;
                }
            }
        });
        Self { chunks, reading: reading.abort_handle() }
    }

    /// The next bytes. Blocks: not for async threads.
    pub fn next(&mut self) -> Result<Option<Bytes>> {
        self.chunks.blocking_recv().transpose()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// Takes the blocks of a blob in their order.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(Bytes) -> Result<()>;

/// A blob that we made and stored.
pub(crate) struct Sealed {
    pub descriptor: Descriptor,
    indexed: Option<IndexedBlob>,
    /// Whether the tar in it is the layer's, so that unpacking it gives the layer.
    is_plain: bool,
}

impl Sealed {
    /// Lets the layer that it was made of know it.
    pub fn tell(&self, stacked: &StackedLayer) {
        if let Some(indexed) = &self.indexed {
            stacked.know_indexed(indexed.clone());
        }
        if self.is_plain {
            let descriptor = self.descriptor.clone();
            stacked.know(KnownBlob::stored(descriptor));
        }
    }
}

/// Ends the writing of a layer's blob, labeled so that it is found again.
pub(crate) async fn seal(
    writer: Box<dyn BlobWriter>,
    packed: &Packed,
    compression: Compression,
) -> Result<Sealed> {
    let media_type = compression.kind.media_type();
    let mut labels = Labels::from([
        (UNCOMPRESSED.into(), packed.diff_id().to_string()),
        (MEDIA_TYPE.into(), media_type.into()),
    ]);
    let mut descriptor = Descriptor::new(media_type, packed.digest, packed.size);
    let indexed = packed.indexed.as_ref().map(|indexed| {
        labels.extend([
            (MADE_OF.into(), packed.tar.diff_id.to_string()),
            (MADE_AS.into(), compression.to_string()),
        ]);
        let annotations = indexed.annotations.iter();
        labels.extend(annotations.map(|(k, v)| (format!("{ANNOTATION}{k}"), v.clone())));
        descriptor.annotations.clone_from(&indexed.annotations);
        IndexedBlob {
            descriptor: descriptor.clone(),
            diff_id: indexed.diff_id,
            made_as: compression.to_string(),
        }
    });
    writer.commit(Some(packed.digest), &labels).await?;
    Ok(Sealed { descriptor, indexed, is_plain: packed.diff_id() == packed.tar.diff_id })
}

/// What labels of a blob that we made say that its descriptor must.
fn annotations(labels: &Labels) -> BTreeMap<String, String> {
    let annotation =
        |(k, v): (&String, &String)| Some((k.strip_prefix(ANNOTATION)?.into(), v.clone()));
    labels.iter().filter_map(annotation).collect()
}

/// A stored blob with a table of contents that we made; `None` if its labels are not all there.
fn indexed_blob(info: &BlobInfo) -> Option<IndexedBlob> {
    let label = |name: &str| info.labels.get(name);
    let mut descriptor = Descriptor::new(label(MEDIA_TYPE)?, info.digest, info.size);
    descriptor.annotations = annotations(&info.labels);
    let diff_id = label(UNCOMPRESSED)?.parse().ok()?;
    Some(IndexedBlob { descriptor, diff_id, made_as: label(MADE_AS)?.clone() })
}
