//! Caches in object stores: crate `objectcache` as a kind of place, whatever store it is.

use super::{
    CacheAt, CacheBackend, CacheClients, CacheSource, CacheWriter, check_options,
    mounts::ObjectMounts,
};
use crate::{CacheRequest, LayerBytes};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream, stream::BoxStream};
use shipway_cachemounts::{Direction, Place, Request};
use shipway_fault::{Fault, Result};
use shipway_objectcache::{Download, LayerContent, ObjectCache, Service};
use shipway_oci::{Descriptor, Digest, ImageName};
use shipway_sources::{BlobStream, Remote};
use std::{collections::HashSet, sync::Arc};

pub(super) struct ObjectBackend(pub Arc<dyn Service>);

#[async_trait]
impl CacheBackend for ObjectBackend {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    fn export_title(&self) -> String {
        self.0.title().to_owned()
    }

    fn places(&self, request: &CacheRequest) -> Result<Vec<String>> {
        self.0.places(&request.attrs)
    }

    fn check_export(&self, request: &CacheRequest) -> Result<String> {
        check_options(request)?;
        Ok(self.0.places(&request.attrs)?.join(" "))
    }

    async fn source(&self, request: &CacheRequest, _: &CacheClients) -> Result<CacheSource> {
        let cache = self.0.open(&request.attrs).await?;
        let configs = cache.configs().await?;
        Ok(CacheSource { remote: Arc::new(ObjectRemote(cache)), at: CacheAt::Configs(configs) })
    }

    async fn writer(
        &self,
        request: &CacheRequest,
        _: &CacheClients,
    ) -> Result<Box<dyn CacheWriter>> {
        Ok(Box::new(ObjectWriter(self.0.open(&request.attrs).await?)))
    }

    async fn mounts(
        &self,
        request: &Request,
        _: &CacheClients,
        _: Direction,
    ) -> Result<Arc<dyn Place>> {
        Ok(Arc::new(ObjectMounts::new(self.0.clone(), request).await?))
    }

    fn is_best_effort(&self) -> bool {
        true
    }
}

/// Layers of a cache in a store. There is nothing else.
struct ObjectRemote(Arc<dyn ObjectCache>);

struct Layer(Download);

#[async_trait]
impl BlobStream for Layer {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        self.0.next().await
    }
}

impl ObjectRemote {
    fn none(&self, what: &str) -> Fault {
        Fault::not_found(format!("{} has no {what}", self.0.name()))
    }
}

#[async_trait]
impl Remote for ObjectRemote {
    fn name(&self) -> String {
        self.0.name()
    }

    async fn resolve(&self, reference: &str) -> Result<Descriptor> {
        Err(self.none(&format!("manifest {reference}")))
    }

    async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes> {
        Err(self.none(&format!("manifest {}", descriptor.digest)))
    }

    async fn small_blob(&self, descriptor: &Descriptor) -> Result<Bytes> {
        Err(self.none(&format!("document {}", descriptor.digest)))
    }

    /// Not called: the config has all lengths.
    async fn blob_size(&self, digest: Digest) -> Result<u64> {
        Err(self.none(&format!("length of {digest}")))
    }

    async fn open(&self, blob: &Descriptor) -> Result<Box<dyn BlobStream>> {
        Ok(Box::new(Layer(Download::start(self.0.clone(), blob).await?)))
    }

    fn is_gone(&self) -> bool {
        self.0.is_gone()
    }
}

struct ObjectWriter(Arc<dyn ObjectCache>);

#[async_trait]
impl LayerContent for LayerBytes {
    async fn open(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes>>> {
        let mut reader = self.clone().open().await?;
        if offset > 0 {
            reader.seek(offset).await?;
        }
        let pieces = stream::try_unfold(reader, |mut reader| async move {
            Ok(reader.next().await?.map(|bytes| (bytes, reader)))
        });
        Ok(pieces.boxed())
    }
}

#[async_trait]
impl CacheWriter for ObjectWriter {
    fn parallelism(&self) -> usize {
        self.0.parallelism()
    }

    async fn present(&self, layers: &[Descriptor]) -> Result<HashSet<Digest>> {
        self.0.present(layers).await
    }

    fn has_manifest(&self) -> bool {
        false
    }

    async fn layer(
        &self,
        layer: &Descriptor,
        bytes: LayerBytes,
        _: Option<ImageName>,
    ) -> Result<()> {
        self.0.write(layer, &bytes).await
    }

    async fn config(&self, _: &Descriptor, bytes: Bytes) -> Result<()> {
        self.0.publish(bytes).await
    }

    async fn manifest(&self, _: &Descriptor, _: Bytes) -> Result<()> {
        Err(Fault::internal("a cache of objects has no manifest"))
    }
}
