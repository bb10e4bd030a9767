//! States with no time later than a given one (row `ex.c.rewrite`).

use crate::{
    assemble::image,
    blob_writer::{Feed, Sink},
    blobs::Fetch,
    immutable::ImmutableRef,
    layer::{LayerBlob, LazyLayer},
    records::{Record, Records},
};
use shipway_archive::{Compression, CompressionKind};
use shipway_fault::{Context as _, Result};
use shipway_oci::{Descriptor, DiffId};
use shipway_progress::Reporter;
use shipway_storage::{Labels, UNCOMPRESSED};

/// Annotation with the time that a layer was rewritten with, whether that changed it or not.
pub const REWRITTEN: &str = "buildkit/rewritten-timestamp";

impl ImmutableRef {
    /// The same files with every time later than `latest` (seconds since the epoch) set to it. The
    /// layers that it has in common with `base`, counted from below, stay what they are.
    pub async fn retimed(
        &self,
        base: &[DiffId],
        latest: i64,
        compression: Compression,
        progress: Option<&Reporter>,
    ) -> Result<ImmutableRef> {
        // A table of contents is made of what comes out.
        let blobs = self.blobs(compression.plain(), Fetch::Everything, progress).await?;
        let common =
            blobs.iter().zip(base).take_while(|(blob, base)| blob.diff_id == **base).count();
        if common == blobs.len() {
            return Ok(self.clone());
        }
        let times = self.layer_times().await?;
        let layered = self.layered().await?;
        let (records, record) = (layered.records(), layered.record());
        records.ensure_lease(record).await?;
        let mut layers = Vec::with_capacity(blobs.len());
        for (i, blob) in blobs.into_iter().enumerate() {
            let kind = CompressionKind::of_media_type(&blob.descriptor.media_type);
            let (diff_id, descriptor) = match kind.filter(|_| i >= common) {
                Some(kind) => {
                    let how = match compression.kind.is_indexed() {
                        true => compression,
                        false => Compression { kind, ..compression },
                    };
                    let rewritten = records.rewrite(record, &blob, (kind, latest), how).await;
                    rewritten.context(|| format!("rewrite the times in layer {}", blob.diff_id))?
                }
                // A layer of an unknown kind stays as it is.
                None => (blob.diff_id, blob.descriptor),
            };
            layers.push(LazyLayer {
                diff_id,
                descriptor,
                source: None,
                created: times.get(i).copied(),
            });
        }
        Ok(image(records, layers, self.description().into(), self.record_type()).into())
    }
}

impl Records {
    /// The layer of `blob` with its times rewritten: a blob under the lease of `record`.
    async fn rewrite(
        &self,
        record: &Record,
        blob: &LayerBlob,
        (kind, latest): (CompressionKind, i64),
        how: Compression,
    ) -> Result<(DiffId, Descriptor)> {
        let content = &self.backend.storage.content;
        let mut input = Feed::new(content.reader(blob.descriptor.digest).await?);
        let reference = format!("shipway-retime-{}-{latest}-{:?}", blob.diff_id.0.hex(), how.kind);
        let work = move |sink: Sink<'_>| {
            shipway_archive::retime(&mut || input.next(), kind, latest, how, None, sink)
        };
        let (packed, writer) = self.backend.stream(&record.lease, reference, work).await?;
        let labels = Labels::from([(UNCOMPRESSED.to_owned(), packed.diff_id().to_string())]);
        writer.commit(Some(packed.digest), &labels).await?;
        let mut descriptor = blob.descriptor.clone();
        (descriptor.digest, descriptor.size) = (packed.digest, packed.size);
        if let Some(indexed) = &packed.indexed {
            how.kind.media_type().clone_into(&mut descriptor.media_type);
            descriptor.annotations.extend(indexed.annotations.clone());
        }
        descriptor.annotations.insert(REWRITTEN.into(), latest.to_string());
        Ok((packed.diff_id(), descriptor))
    }
}
