//! States whose layers begin with what is read first.

use crate::{
    blob_writer::{Feed, Sink},
    blobs::Fetch,
    immutable::ImmutableRef,
    layer::LayerBlob,
    record::ReadOrder,
    records::{Record, Records},
    rewritten::{Original, Rewrite, common},
};
use shipway_archive::{Compression, CompressionKind, FirstFiles, ReadFirst, recompress_in_order};
use shipway_fault::{Context as _, Fault, Result};
use shipway_oci::{Descriptor, DiffId};
use shipway_progress::Reporter;

/// What a step opened.
#[derive(Clone, Debug)]
pub struct StepReads {
    /// Layers that were there when it ran. What it did to its own layer says nothing of how that
    /// will be read.
    pub below: usize,
    /// The files it opened.
    pub files: ReadOrder,
}

impl ImmutableRef {
    /// Notes which files the step opened that made this state of the one below. It is known for as
    /// long as this process has the state.
    pub fn note_opened(&self, files: ReadOrder) {
        if let Some(layered) = self.as_layered() {
            let _ = layered.record().opened.set(files);
        }
    }

    /// What the steps opened that made this state and those below it, the first one first, as far
    /// as it was noted.
    pub fn step_reads(&self) -> Vec<StepReads> {
        let (mut all, mut state) = (Vec::new(), self.as_layered());
        while let Some(made) = state {
            let parent = made.parent();
            if let Some(files) = made.record().opened.get() {
                let below = parent.map_or(0, |parent| parent.record().layers.len());
                all.push(StepReads { below, files: files.clone() });
            }
            state = parent;
        }
        all.reverse();
        all
    }

    /// The same files in layers that have tables of contents as `compression` says, each with those
    /// files in front that `first` gives for it by its number, and a landmark behind them. The
    /// layers that it has in common with `base`, counted from below, stay what they are unless
    /// `compression` is forced.
    pub async fn reordered(
        &self,
        base: &[DiffId],
        compression: Compression,
        first: &(dyn Fn(usize) -> ReadOrder + Send + Sync),
        progress: Option<&Reporter>,
    ) -> Result<ImmutableRef> {
        // Each is compressed anew whatever it is.
        let plain = Compression { force: false, ..compression.plain() };
        let blobs = self.blobs(plain, Fetch::Everything, progress).await?;
        let common = if compression.force { 0 } else { common(&blobs, base) };
        let rewrite: &Rewrite<'_> = &|Original { records, record, number, blob, kind }| {
            let reordered = records.reorder(record, blob, kind, first(number), compression);
            Box::pin(async move {
                let what = || format!("put what is read first in front in {}", blob.diff_id);
                reordered.await.context(what)
            })
        };
        self.rewritten(blobs, common, rewrite).await
    }
}

impl Records {
    /// The layer of `blob` in another order: a blob under the lease of `record`.
    async fn reorder(
        &self,
        record: &Record,
        blob: &LayerBlob,
        kind: CompressionKind,
        first: ReadOrder,
        how: Compression,
    ) -> Result<(DiffId, Descriptor)> {
        let mut input =
            Feed::new(self.backend.storage.content.reader(blob.descriptor.digest).await?);
        let reference = format!("shipway-reorder-{}", crate::id::fresh_id());
        let spools = self.backend.mounts.clone();
        let work = move |sink: Sink<'_>| {
            let spool = tempfile::tempfile_in(spools.parent().unwrap_or(&spools))
                .map_err(|e| Fault::io("make a temporary file for a layer", e))?;
            let first = ReadFirst { files: FirstFiles::Paths(&first), spool };
            recompress_in_order(&mut || input.next(), kind, how, first, None, sink)
        };
        let packed = self.write_layer(record, reference, work).await?;
        let mut descriptor = Descriptor::new(how.kind.media_type(), packed.digest, packed.size);
        descriptor.annotations = blob.descriptor.annotations.clone();
        if let Some(indexed) = &packed.indexed {
            descriptor.annotations.extend(indexed.annotations.clone());
        }
        Ok((packed.diff_id(), descriptor))
    }
}
