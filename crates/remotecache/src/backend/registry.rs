//! Caches under a tag of a registry's repository (rows `rc.reg*`).

use super::{
    CacheAt, CacheBackend, CacheClients, CacheSource, CacheWriter, check_options,
    mounts::RegistryMounts,
};
use crate::{CacheRequest, LayerBytes};
use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt as _, StreamExt as _, stream};
use shipway_cachemounts::{Direction, Place, Request};
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, ImageName};
use shipway_registry::{Mode, Registry, Repository};
use shipway_sources::{RegistryRemote, SessionCredentials};
use std::sync::Arc;

pub(super) struct RegistryBackend(pub Registry);

fn name_of(request: &CacheRequest) -> Result<ImageName> {
    let reference = request.needed("ref")?;
    reference.parse().map_err(|e| Fault::invalid(format!("failed to parse {reference}: {e}")))
}

impl RegistryBackend {
    fn repository(
        &self,
        request: &CacheRequest,
        clients: &CacheClients,
        mode: Mode,
    ) -> Result<(Repository, ImageName)> {
        let name = name_of(request)?;
        let credentials = Arc::new(SessionCredentials::new(clients.all.clone()));
        let repository = self.0.repository(&name, credentials, mode);
        Ok((
            if request.flag("registry.insecure")?.unwrap_or(false) {
                repository.insecure()
            } else {
                repository
            },
            name,
        ))
    }
}

#[async_trait]
impl CacheBackend for RegistryBackend {
    fn kind(&self) -> &'static str {
        "registry"
    }

    fn places(&self, request: &CacheRequest) -> Result<Vec<String>> {
        Ok(vec![name_of(request)?.to_string()])
    }

    fn check_export(&self, request: &CacheRequest) -> Result<String> {
        let reference = request.needed("ref")?;
        check_options(request)?;
        Ok(reference.to_owned())
    }

    async fn source(&self, request: &CacheRequest, clients: &CacheClients) -> Result<CacheSource> {
        let (repository, name) = self.repository(request, clients, Mode::Pull)?;
        Ok(CacheSource {
            remote: Arc::new(RegistryRemote(repository)),
            at: CacheAt::Reference(name.reference()),
        })
    }

    async fn writer(
        &self,
        request: &CacheRequest,
        clients: &CacheClients,
    ) -> Result<Box<dyn CacheWriter>> {
        let (repository, name) = self.repository(request, clients, Mode::Push)?;
        Ok(Box::new(RegistryWriter { repository, tag: name.tag().unwrap_or("latest").to_owned() }))
    }

    async fn mounts(
        &self,
        request: &Request,
        clients: &CacheClients,
        direction: Direction,
    ) -> Result<Arc<dyn Place>> {
        let mode = match direction {
            Direction::Save => Mode::Push,
            Direction::Restore => Mode::Pull,
        };
        let (repository, _) = self.repository(&request.into(), clients, mode)?;
        Ok(Arc::new(RegistryMounts(repository)))
    }
}

struct RegistryWriter {
    repository: Repository,
    tag: String,
}

#[async_trait]
impl CacheWriter for RegistryWriter {
    /// A layer of the same registry is given to the repository without a copy where the registry
    /// can.
    async fn layer(
        &self,
        layer: &Descriptor,
        bytes: LayerBytes,
        origin: Option<ImageName>,
    ) -> Result<()> {
        let target = self.repository.name();
        let elsewhere = |o: &&ImageName| {
            o.registry() == target.registry() && o.repository() != target.repository()
        };
        let from = origin.as_ref().filter(elsewhere).map(ImageName::repository);
        let open = || {
            let bytes = bytes.clone();
            let body = async move {
                let reader = bytes.open().await?;
                let pieces = stream::try_unfold(reader, |mut r| async move {
                    Ok(r.next().await?.map(|bytes| (bytes, r)))
                });
                Ok(pieces.boxed())
            };
            body.boxed()
        };
        self.repository.push_blob(layer, from, open, |_| {}).await.map(drop).map_err(Fault::from)
    }

    async fn config(&self, config: &Descriptor, bytes: Bytes) -> Result<()> {
        let open = || {
            let bytes = bytes.clone();
            async move { Ok(stream::iter([Ok(bytes)]).boxed()) }.boxed()
        };
        self.repository.push_blob(config, None, open, |_| {}).await.map(drop).map_err(Fault::from)
    }

    async fn manifest(&self, manifest: &Descriptor, bytes: Bytes) -> Result<()> {
        self.repository
            .push_manifest(bytes, &manifest.media_type, &self.tag)
            .await
            .map(drop)
            .map_err(Fault::from)
    }
}
