//! States with no time later than a given one (row `ex.c.rewrite`).

use crate::{
    blob_writer::{Feed, Sink},
    blobs::Fetch,
    immutable::ImmutableRef,
    layer::LayerBlob,
    records::{Record, Records},
    rewritten::{Original, Rewrite, common},
};
use shipway_archive::{Compression, CompressionKind};
use shipway_fault::{Context as _, Result};
use shipway_oci::{Descriptor, DiffId};
use shipway_progress::Reporter;

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
        let common = common(&blobs, base);
        let rewrite: &Rewrite<'_> = &|Original { records, record, blob, kind, .. }| {
            let how = match compression.kind.is_indexed() {
                true => compression,
                false => Compression { kind, ..compression },
            };
            let rewritten = records.rewrite(record, blob, (kind, latest), how);
            Box::pin(async move {
                rewritten.await.context(|| format!("rewrite the times in layer {}", blob.diff_id))
            })
        };
        self.rewritten(blobs, common, rewrite).await
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
        let packed = self.write_layer(record, reference, work).await?;
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
