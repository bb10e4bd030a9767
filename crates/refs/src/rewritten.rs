//! States with the files of another one in layers that are written anew.

use crate::{
    assemble::image,
    blob_writer::Sink,
    immutable::ImmutableRef,
    layer::{LayerBlob, LazyLayer},
    records::{Record, Records},
};
use futures::future::BoxFuture;
use shipway_archive::{CompressionKind, Packed};
use shipway_fault::Result;
use shipway_oci::{Descriptor, DiffId};
use shipway_storage::{Labels, UNCOMPRESSED};

/// A layer that is written anew.
pub(crate) struct Original<'a> {
    pub records: &'a Records,
    /// Whose lease keeps what is written.
    pub record: &'a Record,
    /// Its number, from below.
    pub number: usize,
    pub blob: &'a LayerBlob,
    /// How it is compressed.
    pub kind: CompressionKind,
}

type Written<'a> = BoxFuture<'a, Result<(DiffId, Descriptor)>>;

/// Writes a layer anew.
pub(crate) type Rewrite<'w> = dyn for<'a> Fn(Original<'a>) -> Written<'a> + Send + Sync + 'w;

/// How many of the lowest layers are those of `base`.
pub(crate) fn common(blobs: &[LayerBlob], base: &[DiffId]) -> usize {
    blobs.iter().zip(base).take_while(|(blob, base)| blob.diff_id == **base).count()
}

impl ImmutableRef {
    /// The same files, whose layers are `blobs`, in what `rewrite` makes of all but the `common`
    /// lowest ones.
    pub(crate) async fn rewritten(
        &self,
        blobs: Vec<LayerBlob>,
        common: usize,
        rewrite: &Rewrite<'_>,
    ) -> Result<ImmutableRef> {
        if common == blobs.len() {
            return Ok(self.clone());
        }
        let times = self.layer_times().await?;
        let layered = self.layered().await?;
        let (records, record) = (layered.records(), layered.record());
        records.ensure_lease(record).await?;
        let mut layers = Vec::with_capacity(blobs.len());
        for (number, blob) in blobs.into_iter().enumerate() {
            let kind = CompressionKind::of_media_type(&blob.descriptor.media_type);
            let (diff_id, descriptor) = match kind.filter(|_| number >= common) {
                Some(kind) => {
                    rewrite(Original { records, record, number, blob: &blob, kind }).await?
                }
                // A layer of an unknown kind stays as it is.
                None => (blob.diff_id, blob.descriptor),
            };
            let created = times.get(number).copied();
            layers.push(LazyLayer { diff_id, descriptor, source: None, created });
        }
        Ok(image(records, layers, self.description().into(), self.record_type()).into())
    }
}

impl Records {
    /// Writes the layer that `work` makes into the content store, under the lease of `record`.
    pub(crate) async fn write_layer(
        &self,
        record: &Record,
        reference: String,
        work: impl FnOnce(Sink<'_>) -> Result<Packed> + Send + 'static,
    ) -> Result<Packed> {
        let (packed, writer) = self.backend.stream(&record.lease, reference, work).await?;
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), packed.diff_id().to_string())]);
        writer.commit(Some(packed.digest), &labels).await?;
        Ok(packed)
    }
}
