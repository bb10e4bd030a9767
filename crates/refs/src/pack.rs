//! Blobs made of the files of a layer, or of another blob of it.

use crate::{
    blob_writer::{Feed, Sink, seal},
    layer::{StackedLayer, lost},
    records::{Record, Records},
};
use shipway_archive::{Compression, CompressionKind, Packed};
use shipway_fault::{Code, Fault, Result};
use shipway_oci::{Descriptor, DiffId};
use shipway_progress::Reporter;

impl Records {
    /// Makes a blob from the layer's files. It must be the very tar that the diffID was taken of.
    pub async fn pack(
        &self,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
    ) -> Result<(Descriptor, DiffId)> {
        let own = || (stacked.snapshot.clone(), stacked.parent.is_some());
        let (name, parent) = match stacked.copy_of() {
            Some(original) => match self.backend.storage.snapshots.stat(&original).await {
                Ok(info) => (original, info.parent.is_some()),
                Err(_) => own(),
            },
            None => own(),
        };
        let (tree, guard) = self.layer_tree(&name, parent).await?;
        let known = stacked.tar.get().cloned();
        let work = move |sink: Sink<'_>| {
            let packed = shipway_archive::pack(&tree, compression, known, None, sink);
            drop(guard);
            packed
        };
        self.store_packed(stacked, record, compression, work).await
    }

    /// Makes a blob of another compression from the bytes of an existing one.
    pub async fn convert(
        &self,
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
        let mut input = Feed::new(self.backend.storage.content.reader(from.digest).await?);
        let work = move |sink: Sink<'_>| {
            shipway_archive::recompress(&mut || input.next(), kind, compression, None, sink)
        };
        self.store_packed(stacked, record, compression, work).await
    }

    /// Stores what `work` makes under the lease of `record` and checks that it is the layer.
    async fn store_packed(
        &self,
        stacked: &StackedLayer,
        record: &Record,
        compression: Compression,
        work: impl FnOnce(Sink<'_>) -> Result<Packed> + Send + 'static,
    ) -> Result<(Descriptor, DiffId)> {
        let how = compression.to_string().replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let reference = format!("shipway-layer-{}-{how}", stacked.diff_id.0.hex());
        let (packed, writer) = self.backend.stream(&record.lease, reference, work).await?;
        let made = packed.tar.diff_id;
        if made != stacked.diff_id {
            let fault =
                Fault::new(Code::FailedPrecondition, format!("the files of the layer make the tar {made}, which is not {}", stacked.diff_id))
                    .hint("the layer came from a registry and its blob was removed from containerd: pull the image again, with `--pull`");
            return Err(lost(stacked, None, fault));
        }
        let sealed = seal(writer, &packed, compression).await?;
        record.secured.lock().insert(packed.digest);
        sealed.add_to(stacked);
        Ok((sealed.descriptor, packed.diff_id()))
    }
}
