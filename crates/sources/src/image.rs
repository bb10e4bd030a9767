//! `docker-image://` and `oci-layout://`: resolved here, fetched when read (rows `src.image*`,
//! `src.oci*`).

mod attested;
mod attrs;
mod resolve;
mod select;

use crate::{
    PinnedSource, SourceContext, SourceSpec,
    clients::ClientServices,
    keyed_locks::KeyedLocks,
    keys,
    port::Source,
    remote::{ClientRemote, LayerSources, RegistryImage, RegistryRemote, Remote},
    snapshotter::RemoteImage,
};
pub use attrs::LocalImages;
use attrs::{ImageLocation, ImageSpec};
use futures::{FutureExt as _, future::BoxFuture};
pub use resolve::document_lease;
use resolve::{NameResolver, Resolved};
use serde::Serialize;
use shipway_attest::{self as attest, Capture, Stored};
use shipway_fault::{Code, Fault, Result};
use shipway_llb::{ImageFacts, ResolveMode, ResolveOptions, SourceFacts, attr};
use shipway_oci::{ChainId, Descriptor, DiffId, Digest, Platform};
use shipway_refs::{ImmutableRef, LayerOrigins as _, LazyLayer, RefStore};
use shipway_registry::{Mode as Access, Registry};
use shipway_storage::{LAYER_ORIGIN, Labels};
use std::{sync::Arc, time::SystemTime};

/// Images of registries, or of clients' layouts.
pub(crate) struct ImageSource {
    pub refs: RefStore,
    pub registry: Registry,
    /// One resolves a name, the others find its manifest stored.
    pub locks: KeyedLocks,
    pub layers: LayerSources,
    pub prefer: LocalImages,
    pub kind: ImageKind,
}

/// What an image's first key is made of (row `src.image.keys`).
#[derive(Serialize)]
struct ManifestKey<'a> {
    digest: Digest,
    platform: &'a Platform,
    limit: Option<usize>,
}

/// Which scheme an image is named with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ImageKind {
    /// `docker-image`: at the registry that its name names.
    Registry,
    /// `oci-layout`: in a layout in a client's directory.
    Layout,
}

impl ImageSource {
    fn parse(&self, spec: &SourceSpec) -> Result<ImageSpec> {
        match self.kind {
            ImageKind::Registry => ImageSpec::parse(spec, spec.locator()),
            ImageKind::Layout => ImageSpec::layout(spec, spec.locator()),
        }
    }

    async fn find(
        &self,
        image: &ImageSpec,
        platform: &Platform,
        cx: &SourceContext,
    ) -> Result<Resolved> {
        let status = format!("resolve {}", image.name);
        cx.reporter.status(status.clone(), 0, 0, false);
        // Several stages often start from one image: one asks the registry, the others find its
        // manifest stored.
        let guard = self.locks.lock(&image.name.to_string()).await;
        let remote = self.remote(image, &*cx.clients).await?;
        let resolver = NameResolver {
            storage: self.refs.storage(),
            remote: &*remote,
            prefer: self.prefer,
            cx,
        };
        let found = resolver.resolve(image, platform).await;
        // The registry's errors name the image themselves.
        let name = image.name.to_string();
        let found =
            found.map_err(|e| if e.to_string().contains(&name) { e } else { e.context(name) });
        drop(guard);
        cx.reporter.status(status, 0, 0, true);
        let found = found?;
        if let Some(stored) = found.stored {
            cx.reporter.status(resolve::explain_stored(stored, SystemTime::now()), 0, 0, true);
        }
        match image.checksum {
            Some(wanted) if wanted != found.main.digest => Err(Fault::new(
                Code::FailedPrecondition,
                format!(
                    "image digest {} for {} does not match expected checksum {wanted}",
                    found.main.digest, image.name
                ),
            )),
            _ => Ok(found),
        }
    }

    async fn remote(
        &self,
        image: &ImageSpec,
        clients: &dyn ClientServices,
    ) -> Result<Arc<dyn Remote>> {
        Ok(match &image.location {
            ImageLocation::Registry => Arc::new(RegistryRemote(self.registry.repository(
                &image.name,
                clients.credentials(),
                Access::Pull,
            ))),
            ImageLocation::Layout { session, store } => {
                let store = clients.client_store(session.as_ref(), &format!("oci:{store}")).await?;
                Arc::new(ClientRemote { store, name: image.name.to_string() })
            }
        })
    }
}

impl Source for ImageSource {
    fn pin<'a>(
        &'a self,
        spec: &'a SourceSpec,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<PinnedSource>> {
        async move {
            let image = self.parse(spec)?;
            let found = self.find(&image, &spec.platform, cx).await?;
            let (diffs, _) = limited(&image, &found)?;
            let mut keys = vec![keys::digest(
                "image",
                &ManifestKey {
                    digest: found.main.digest,
                    platform: &spec.platform,
                    limit: image.layer_limit,
                },
            )];
            // The second key is the content itself: the same layers under another name, or after a
            // new push, are the same state.
            keys.extend(ChainId::of(diffs.iter().copied()).map(|c| c.0));
            Ok(PinnedSource {
                keys,
                ephemeral: false,
                digest: Some(found.main.digest.to_string()),
                stored: found.stored,
            })
        }
        .boxed()
    }

    fn fetch<'a>(
        &'a self,
        spec: &'a SourceSpec,
        pin: &'a PinnedSource,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<ImmutableRef>> {
        async move {
            let mut image = self.parse(spec)?;
            // What was pinned is what is used, whatever the tag says by now.
            if let Some(digest) = pin.digest.as_ref().and_then(|d| d.parse().ok()) {
                image.name = image.name.with_digest(digest);
                image.mode = ResolveMode::PreferLocal;
            }
            let found = self.find(&image, &spec.platform, cx).await?;
            let (diffs, blobs) = limited(&image, &found)?;
            if diffs.is_empty() {
                return self.refs.scratch();
            }
            // What was built here may lie on layers that are not here, and are not found under its
            // own name.
            let built = matches!(found.stored, Some(Stored::Built(_)));
            let origins = match built {
                true => self.refs.storage().content.info(found.digest).await?.labels,
                false => Labels::new(),
            };
            let from_registry = self.kind == ImageKind::Registry && !built;
            let place = from_registry.then(|| RegistryImage {
                image: RemoteImage {
                    name: image.name.clone().with_digest(found.digest),
                    layers: blobs.iter().map(|blob| blob.digest).collect(),
                },
                credentials: cx.clients.credentials(),
            });
            let source = self.layers.of(self.remote(&image, &*cx.clients).await?, place);
            let mut layers = Vec::with_capacity(diffs.len());
            for (diff_id, descriptor) in diffs.iter().zip(blobs) {
                let here = self.refs.storage().content.has(descriptor).await?;
                let origin = origins.get(&format!("{LAYER_ORIGIN}.{}", descriptor.digest));
                let known = || origin.and_then(|origin| self.layers.source(origin));
                let source = (!here).then(|| known().unwrap_or_else(|| source.clone()));
                layers.push(LazyLayer {
                    diff_id: *diff_id,
                    descriptor: descriptor.clone(),
                    source,
                    created: None,
                });
            }
            self.refs.image(layers, format!("pulled from {}", image.name), image.record_type).await
        }
        .boxed()
    }

    fn resolve<'a>(
        &'a self,
        spec: &'a SourceSpec,
        options: &'a ResolveOptions,
        cx: &'a SourceContext,
    ) -> BoxFuture<'a, Result<SourceFacts>> {
        async move {
            let mut image = self.parse(spec)?;
            if !spec.attrs.contains_key(attr::IMAGE_RESOLVE_MODE) {
                image.mode = options.mode;
            }
            let found = self.find(&image, &spec.platform, cx).await?;
            let attestations = match &options.attestations {
                Some(predicates) => {
                    let remote = self.remote(&image, &*cx.clients).await?;
                    let documents =
                        resolve::Documents { storage: self.refs.storage(), remote: Some(&*remote) };
                    attested::chain(&documents, &found.main, &spec.platform, predicates)
                        .await?
                        .map(Box::new)
                }
                None => None,
            };
            let resolved = ImageFacts {
                name: image.name.to_string(),
                digest: found.main.digest,
                config: found.config,
                attestations,
            };
            Ok(SourceFacts { image: Some(resolved), ..Default::default() })
        }
        .boxed()
    }

    fn capture(&self, spec: &SourceSpec, pin: &PinnedSource, capture: &mut Capture) -> Result<()> {
        capture.add_image(attest::ImageSource {
            name: self.parse(spec)?.name,
            platform: Some(spec.platform.clone()),
            digest: pin.digest.as_ref().and_then(|d| d.parse().ok()),
            local: self.kind == ImageKind::Layout,
            stored: pin.stored,
        });
        Ok(())
    }
}

/// The layers to use.
fn limited<'a>(image: &ImageSpec, found: &'a Resolved) -> Result<(&'a [DiffId], &'a [Descriptor])> {
    let (diffs, blobs) = (&found.parsed.rootfs.diff_ids[..], &found.manifest.layers[..]);
    match image.layer_limit {
        None => Ok((diffs, blobs)),
        Some(limit) if limit <= blobs.len() => Ok((&diffs[..limit], &blobs[..limit])),
        Some(limit) => Err(Fault::invalid(format!(
            "layer limit {limit} is greater than the number of layers in the image {} ({})",
            image.name,
            blobs.len()
        ))),
    }
}
