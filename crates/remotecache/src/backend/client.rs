//! Caches in a directory of the client (rows `rc.local*`), which is a content store to us.

use super::{
    CacheAt, CacheBackend, CacheClients, CacheSource, CacheWriter, check_options,
    mounts::ClientMounts,
};
use crate::{CacheRequest, LayerBytes};
use async_trait::async_trait;
use bytes::Bytes;
use shipway_cachemounts::{Direction, Place, Request};
use shipway_fault::Result;
use shipway_oci::{Descriptor, ImageName};
use shipway_session::ClientStore;
use shipway_sources::ClientRemote;
use std::sync::Arc;

pub(super) struct ClientBackend;

impl ClientBackend {
    async fn store(&self, directory: &str, clients: &CacheClients) -> Result<ClientStore> {
        clients.all.hub().get(&clients.own).await?.store(&format!("local:{directory}"))
    }
}

#[async_trait]
impl CacheBackend for ClientBackend {
    fn kind(&self) -> &'static str {
        "local"
    }

    fn export_title(&self) -> String {
        "exporting cache to client directory".into()
    }

    fn places(&self, _: &CacheRequest) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn check_export(&self, request: &CacheRequest) -> Result<String> {
        request.needed("dest")?;
        check_options(request)?;
        Ok(format!("{:?}", request.attrs))
    }

    async fn source(&self, request: &CacheRequest, clients: &CacheClients) -> Result<CacheSource> {
        let name = request.needed("src")?.to_owned();
        let store = self.store(&name, clients).await?;
        Ok(CacheSource {
            remote: Arc::new(ClientRemote { store, name }),
            at: CacheAt::Reference(request.needed("digest")?.to_owned()),
        })
    }

    async fn writer(
        &self,
        request: &CacheRequest,
        clients: &CacheClients,
    ) -> Result<Box<dyn CacheWriter>> {
        Ok(Box::new(ClientWriter(self.store(request.needed("dest")?, clients).await?)))
    }

    async fn mounts(
        &self,
        request: &Request,
        clients: &CacheClients,
        direction: Direction,
    ) -> Result<Arc<dyn Place>> {
        let key = match direction {
            Direction::Save => "dest",
            Direction::Restore => "src",
        };
        let cache = CacheRequest::from(request);
        let dir = cache.needed(key)?;
        let store = self.store(dir, clients).await?;
        Ok(Arc::new(ClientMounts::new(store, dir, request)?))
    }
}

struct ClientWriter(ClientStore);

#[async_trait]
impl CacheWriter for ClientWriter {
    async fn layer(
        &self,
        layer: &Descriptor,
        bytes: LayerBytes,
        _: Option<ImageName>,
    ) -> Result<()> {
        let mut reader = bytes.open().await?;
        self.0.write(layer, reader.as_mut()).await
    }

    async fn config(&self, config: &Descriptor, bytes: Bytes) -> Result<()> {
        self.0.put(config, bytes).await
    }

    /// The client names it in the directory's `index.json`.
    async fn manifest(&self, manifest: &Descriptor, bytes: Bytes) -> Result<()> {
        self.0.put(manifest, bytes).await
    }
}
