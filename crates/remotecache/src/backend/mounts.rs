//! Places for contents of cache mounts: the same registries, directories and buckets.

use crate::CacheRequest;
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::{FutureExt as _, StreamExt as _, stream, stream::BoxStream};
use shipway_cachemounts::{DIGEST, FOUND, MAX_DOCUMENT, Named, Place, Request};
use shipway_fault::{Fault, Result};
use shipway_objectcache::{CacheAttributes, Download, LayerContent, ObjectCache, Service};
use shipway_oci::{Descriptor, Digest, media};
use shipway_registry::Repository;
use shipway_session::ClientStore;
use std::{collections::HashSet, sync::Arc};

impl From<&Request> for CacheRequest {
    fn from(request: &Request) -> Self {
        Self { kind: request.kind.clone(), attrs: request.attrs.clone() }
    }
}

/// Tags of a repository.
pub(super) struct RegistryMounts(pub Repository);

#[async_trait]
impl Place for RegistryMounts {
    fn shown(&self) -> String {
        let name = self.0.name();
        format!("{}/{}", name.registry(), name.repository())
    }

    async fn manifest(&self, name: &str) -> Result<Option<Bytes>> {
        let descriptor = match self.0.resolve(name).await {
            Ok(descriptor) => descriptor,
            Err(e) if e.is_not_found() => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        Ok(Some(self.0.fetch_manifest(&descriptor).await?))
    }

    async fn names(&self, prefix: &str) -> Result<Vec<Named>> {
        let tags = match self.0.tags().await {
            Ok(tags) => tags,
            // There is no repository yet.
            Err(e) if e.is_not_found() => Vec::new(),
            Err(e) => return Err(e.into()),
        };
        let with_prefix = tags.into_iter().filter(|tag| tag.starts_with(prefix));
        Ok(with_prefix.map(|name| Named { name, written: None }).collect())
    }

    async fn read(&self, blob: &Descriptor) -> Result<Bytes> {
        let mut reader = self.0.fetch_blob(blob, 0).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = reader.next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    async fn write(&self, blob: &Descriptor, bytes: Bytes) -> Result<()> {
        let open = || {
            let bytes = bytes.clone();
            async move { Ok(stream::iter([Ok(bytes)]).boxed()) }.boxed()
        };
        self.0.push_blob(blob, None, open, |_| {}).await.map(drop).map_err(Fault::from)
    }

    async fn publish(&self, name: &str, manifest: &Descriptor, bytes: Bytes) -> Result<()> {
        let pushed = self.0.push_manifest(bytes, &manifest.media_type, name).await;
        pushed.map(drop).map_err(Fault::from)
    }
}

/// A directory of the client, which knows by which names it has artifacts: it says which one is
/// meant, and remembers the name of what is written.
pub(super) struct ClientMounts {
    store: ClientStore,
    dir: String,
    found: Option<(String, Digest)>,
}

impl ClientMounts {
    pub fn new(store: ClientStore, dir: &str, request: &Request) -> Result<Self> {
        let found = match (request.attrs.get(FOUND), request.attrs.get(DIGEST)) {
            (Some(name), Some(digest)) => {
                let digest =
                    digest.parse().map_err(|e| Fault::invalid(format!("{DIGEST}: {e}")))?;
                Some((name.clone(), digest))
            }
            _ => None,
        };
        Ok(Self { store, dir: dir.to_owned(), found })
    }
}

#[async_trait]
impl Place for ClientMounts {
    fn shown(&self) -> String {
        self.dir.clone()
    }

    async fn manifest(&self, name: &str) -> Result<Option<Bytes>> {
        match &self.found {
            Some((found, digest)) if found == name => {
                self.store.read_all(*digest, MAX_DOCUMENT).await.map(Some)
            }
            _ => Ok(None),
        }
    }

    async fn names(&self, prefix: &str) -> Result<Vec<Named>> {
        let found = self.found.iter().filter(|(name, _)| name.starts_with(prefix));
        Ok(found.map(|(name, _)| Named { name: name.clone(), written: None }).collect())
    }

    async fn read(&self, blob: &Descriptor) -> Result<Bytes> {
        self.store.read_all(blob.digest, blob.size).await
    }

    async fn write(&self, blob: &Descriptor, bytes: Bytes) -> Result<()> {
        self.store.put(blob, bytes).await
    }

    async fn publish(&self, _: &str, manifest: &Descriptor, bytes: Bytes) -> Result<()> {
        self.store.put(&Descriptor::of(media::OCI_MANIFEST, &bytes), bytes).await?;
        debug_assert_eq!(manifest.media_type, media::OCI_MANIFEST);
        Ok(())
    }
}

/// Objects of a store: manifests where caches have their configs, blobs among layers.
pub(super) struct ObjectMounts {
    service: Arc<dyn Service>,
    attributes: CacheAttributes,
    blobs: Arc<dyn ObjectCache>,
}

impl ObjectMounts {
    pub async fn new(service: Arc<dyn Service>, request: &Request) -> Result<Self> {
        let attributes = request.attrs.clone();
        let blobs = named(&*service, &attributes, &request.base).await?;
        Ok(Self { service, attributes, blobs })
    }

    async fn named(&self, name: &str) -> Result<Arc<dyn ObjectCache>> {
        named(&*self.service, &self.attributes, name).await
    }
}

async fn named(
    service: &dyn Service,
    attributes: &CacheAttributes,
    name: &str,
) -> Result<Arc<dyn ObjectCache>> {
    // Several names are written with semicolons between them.
    if name.contains(';') {
        return Err(Fault::invalid(format!("the name {name:?} of cache mounts has a semicolon")));
    }
    let mut attributes = attributes.clone();
    attributes.insert("name".to_owned(), name.to_owned());
    service.open(&attributes).await
}

/// Bytes in memory, to be written.
struct Whole(Bytes);

#[async_trait]
impl LayerContent for Whole {
    async fn open(&self, offset: u64) -> Result<BoxStream<'static, Result<Bytes>>> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.0.len());
        Ok(stream::iter([Ok(self.0.slice(from..))]).boxed())
    }
}

#[async_trait]
impl Place for ObjectMounts {
    fn shown(&self) -> String {
        self.blobs.name()
    }

    async fn manifest(&self, name: &str) -> Result<Option<Bytes>> {
        Ok(self.named(name).await?.configs().await?.into_iter().next())
    }

    async fn names(&self, prefix: &str) -> Result<Vec<Named>> {
        let names = self.blobs.names(prefix).await?;
        Ok(names.into_iter().map(|(name, written)| Named { name, written }).collect())
    }

    async fn read(&self, blob: &Descriptor) -> Result<Bytes> {
        let mut download = Download::start(self.blobs.clone(), blob).await?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = download.next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    async fn present(&self, blobs: &[Descriptor]) -> Result<HashSet<Digest>> {
        self.blobs.present(blobs).await
    }

    async fn write(&self, blob: &Descriptor, bytes: Bytes) -> Result<()> {
        self.blobs.write(blob, &Whole(bytes)).await
    }

    async fn publish(&self, name: &str, _: &Descriptor, bytes: Bytes) -> Result<()> {
        self.named(name).await?.publish(bytes).await
    }
}
