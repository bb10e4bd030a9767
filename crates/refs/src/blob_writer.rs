//! Writing of blobs of layers that we make: their bytes on the way from and to the content store,
//! and the labels by which a later run finds them again.

use crate::{
    backend::Backend,
    layer::{IndexedBlob, KnownBlob, StackedLayer},
};
use bytes::Bytes;
use shipway_archive::{Compression, Packed};
use shipway_fault::{Fault, Result};
use shipway_oci::Descriptor;
use shipway_storage::{BlobInfo, BlobReader, BlobWriter, Ingest, Labels, LeaseId, UNCOMPRESSED};
use shipway_task::{blocking, spawn};
use std::collections::BTreeMap;
use tokio::{sync::mpsc, task::AbortHandle};

/// Blocks on their way from the compressor to the store.
const IN_FLIGHT: usize = 8;
/// Label on a blob that we made: its media type, which the content store does not know otherwise.
pub(crate) const MEDIA_TYPE: &str = "shipway/media-type";
/// Labels on a blob with a table of contents that we made: digest of the layer's tar that it was
/// made of, and how.
pub(crate) const MADE_OF: &str = "shipway/made-of";
const MADE_AS: &str = "shipway/made-as";
/// Prefix of labels that keep the annotations which its descriptor needs.
const ANNOTATION: &str = "shipway/annotation/";

impl Backend {
    /// Writes what `work` makes, on a thread of its own, into the content store under `lease`;
    /// the holder of the writer gives it its name.
    pub async fn stream(
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
    /// Adds it to the blobs of the layer that it was made of.
    pub fn add_to(&self, stacked: &StackedLayer) {
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
pub(crate) fn annotations(labels: &Labels) -> BTreeMap<String, String> {
    let annotation =
        |(k, v): (&String, &String)| Some((k.strip_prefix(ANNOTATION)?.into(), v.clone()));
    labels.iter().filter_map(annotation).collect()
}

/// A stored blob with a table of contents that we made; `None` if its labels are not all there.
pub(crate) fn indexed_blob(info: &BlobInfo) -> Option<IndexedBlob> {
    let label = |name: &str| info.labels.get(name);
    let mut descriptor = Descriptor::new(label(MEDIA_TYPE)?, info.digest, info.size);
    descriptor.annotations = annotations(&info.labels);
    let diff_id = label(UNCOMPRESSED)?.parse().ok()?;
    Some(IndexedBlob { descriptor, diff_id, made_as: label(MADE_AS)?.clone() })
}
