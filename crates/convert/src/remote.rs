//! Images in registries.

use crate::{Bytes, Input, LayerTarget, Packing, Progress, Source, Step, Target, file_stream};
use async_trait::async_trait;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use shipway_archive::{CompressionKind, Packed};
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest, ImageName, Manifest};
use shipway_registry::{BodyStream, Repository};
use shipway_task::blocking;
use std::{io::Write as _, sync::Arc};

/// An image in a registry, under the name that the repository was opened with.
pub struct Remote {
    repository: Repository,
}

impl Remote {
    /// The image that `repository` is named for.
    pub fn new(repository: Repository) -> Self {
        Self { repository }
    }
}

#[async_trait]
impl Source for Remote {
    async fn root(&self) -> Result<Descriptor> {
        Ok(self.repository.resolve(&self.repository.name().reference()).await?)
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        Ok(self.repository.fetch_manifest(descriptor).await?)
    }

    async fn config(&self, descriptor: &Descriptor) -> Result<Bytes> {
        Ok(self.repository.fetch_small_blob(descriptor).await?)
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BodyStream> {
        let reader = self.repository.fetch_blob(descriptor, 0).await?.verified();
        Ok(reader.into_stream().map_err(Fault::from).boxed())
    }

    async fn referrers(&self, subject: Digest) -> Result<Vec<Descriptor>> {
        Ok(self.repository.referrers(subject).await?)
    }

    fn origin(&self, _: &Descriptor) -> Option<ImageName> {
        Some(self.repository.name().clone())
    }
}

#[async_trait]
impl LayerTarget for Remote {
    async fn layer(
        &self,
        input: Input,
        from: CompressionKind,
        packing: &Packing,
    ) -> Result<Packed> {
        let work = packing.clone();
        let (file, packed) = blocking("convert a layer", move || {
            let failed = |e| Fault::io("write a converted layer to a temporary file", e);
            let mut file = tempfile::tempfile().map_err(failed)?;
            let packed =
                work.pack(input, from, &mut |bytes| file.write_all(&bytes).map_err(failed))?;
            Ok((Arc::new(file), packed))
        })
        .await?;
        let descriptor =
            Descriptor::new(packing.compression.kind.media_type(), packed.digest, packed.size);
        let open = || {
            let bytes = file_stream(&file, 0, packed.size);
            async move { Ok(bytes) }.boxed()
        };
        self.repository.push_blob(&descriptor, [], open, |_| {}).await?;
        Ok(packed)
    }
}

#[async_trait]
impl Target for Remote {
    async fn copy(
        &self,
        descriptor: &Descriptor,
        source: &Arc<dyn Source>,
        progress: &Progress,
    ) -> Result<()> {
        let here = self.repository.name();
        let from = source.origin(descriptor).filter(|name| name.registry() == here.registry());
        let from = from.as_ref().map(ImageName::repository).filter(|r| *r != here.repository());
        let open = || {
            let (source, descriptor) = (source.clone(), descriptor.clone());
            async move { source.blob(&descriptor).await }.boxed()
        };
        let (digest, size, progress) = (descriptor.digest, descriptor.size, progress.clone());
        let step = move |done| progress(Step { digest, converts: false, done, size });
        self.repository.push_blob(descriptor, from, open, step.clone()).await?;
        // What was there, or mounted, is as good as sent.
        step(size);
        Ok(())
    }

    async fn config(&self, descriptor: &Descriptor, bytes: Bytes) -> Result<()> {
        let open = || {
            let bytes = bytes.clone();
            async move { Ok(stream::iter([Ok(bytes)]).boxed()) }.boxed()
        };
        self.repository.push_blob(descriptor, [], open, |_| {}).await?;
        Ok(())
    }

    async fn manifest(&self, descriptor: &Descriptor, bytes: Bytes, _: &[Digest]) -> Result<()> {
        // Registries that keep no lists of what refers to a manifest get one.
        if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes)
            && manifest.subject.is_some()
        {
            self.repository.push_referrer_bytes(bytes, &manifest).await?;
            return Ok(());
        }
        let reference = descriptor.digest.to_string();
        self.repository.push_manifest(bytes, &descriptor.media_type, &reference).await?;
        Ok(())
    }

    async fn finish(&self, root: &Descriptor) -> Result<()> {
        let Some(tag) = self.repository.name().tag() else { return Ok(()) };
        let bytes = self.repository.fetch_manifest(root).await?;
        self.repository.push_manifest(bytes, &root.media_type, tag).await?;
        Ok(())
    }
}
