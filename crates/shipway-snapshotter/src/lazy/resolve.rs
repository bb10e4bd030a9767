//! From the labels of a Prepare to a layer that is served. All layers of an image are looked for as
//! soon as its first one is asked for, and each once however many ask.

use super::{Lazy, credentials::AllCredentials, labels::Wanted};
use crate::config::Config;
use parking_lot::{Mutex, MutexGuard};
use shipway_estargz::{Annotated, PODMAN_CHECKSUM, TOC_DIGEST, Toc, TocDigest};
use shipway_fault::{Class, Code, Fault, Result};
use shipway_layerstore::{Description, Layer, LayerKey};
use shipway_lazyfetch::{IndexRequest, Indexed, Settings, Source, index, sources, sources_of_all};
use shipway_oci::{Descriptor, Digest, ImageName, Manifest};
use shipway_registry::{Mode, Registry, RegistryConfig};
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};
use tokio::{runtime::Handle, sync::OnceCell};

/// Manifests that are remembered.
const MANIFESTS: usize = 64;
/// Entries of all tables of contents that are kept until their blobs are read.
const MAX_ENTRIES_KEPT: usize = 100_000;

type Shared<T> = Arc<OnceCell<T>>;

/// Finds layers.
pub struct Resolver {
    registry: Registry,
    credentials: AllCredentials,
    settings: Settings,
    manifests: Mutex<Vec<(Digest, Shared<Vec<Descriptor>>)>>,
    making: Mutex<HashMap<LayerKey, Shared<Arc<Layer>>>>,
    tocs: Tocs,
}

/// Tables of contents of layers that were just made, for those who read their blobs whole.
#[derive(Default)]
struct Tocs(Mutex<Vec<(u32, Arc<Toc>)>>);

impl Tocs {
    /// Keeps one, if they are not too many: it can be fetched again.
    fn keep(&self, layer: u32, toc: Toc) {
        let mut all = lock(&self.0);
        let entries: usize = all.iter().map(|(_, toc)| toc.len()).sum();
        if entries + toc.len() <= MAX_ENTRIES_KEPT {
            all.push((layer, Arc::new(toc)));
        }
    }

    fn take(&self, layer: u32) -> Option<Arc<Toc>> {
        let mut all = lock(&self.0);
        let at = all.iter().position(|(n, _)| *n == layer)?;
        Some(all.swap_remove(at).1)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

fn not_lazy() -> Fault {
    Fault::new(Code::FailedPrecondition, "its manifest names no table of contents")
        .with_class(Class::Environment)
}

fn key_of(layer: Digest, annotated: &Annotated) -> LayerKey {
    let (TocDigest::Json(toc) | TocDigest::Compressed(toc)) = annotated.toc_digest;
    LayerKey { blob: layer, toc }
}

impl Resolver {
    pub fn new(config: &Config, settings: Settings, credentials: AllCredentials) -> Self {
        let registry = Registry::new(RegistryConfig {
            config_path: Some(config.registry.config_path.clone()),
            user_agent: concat!("shipway-snapshotter/", env!("CARGO_PKG_VERSION")).into(),
            ..RegistryConfig::default()
        });
        Self {
            registry,
            credentials,
            settings,
            manifests: Mutex::default(),
            making: Mutex::default(),
            tocs: Tocs::default(),
        }
    }

    /// The layers of an image.
    async fn layers(&self, image: &ImageName, manifest: Digest) -> Result<Vec<Descriptor>> {
        let cell = {
            let mut known = lock(&self.manifests);
            match known.iter().find(|(digest, _)| *digest == manifest) {
                Some((_, cell)) => cell.clone(),
                None => {
                    let cell = Shared::default();
                    known.insert(0, (manifest, cell.clone()));
                    known.truncate(MANIFESTS);
                    cell
                }
            }
        };
        let fetch = async || {
            let source = shipway_lazyfetch::Credentials::of(&self.credentials, image);
            let repository = self.registry.repository(image, source, Mode::Pull);
            // Its length is not known, its digest is.
            let bytes = repository.fetch_manifest(&Descriptor::new("", manifest, 0)).await?;
            let manifest: Manifest = serde_json::from_slice(&bytes)
                .map_err(|e| Fault::invalid(format!("the manifest of {image}: {e}")))?;
            Ok::<_, Fault>(manifest.layers)
        };
        cell.get_or_try_init(fetch).await.cloned()
    }

    /// The layer that is wanted, served.
    pub async fn resolve(&self, lazy: &Arc<Lazy>, wanted: &Wanted) -> Result<Arc<Layer>> {
        if let Some(manifest) = wanted.manifest {
            if wanted.has_toc() {
                // The others meanwhile.
                let (lazy, wanted) = (lazy.clone(), wanted.clone());
                shipway_task::spawn_on(&lazy.clone().runtime, "make other layers", async move {
                    let layers = lazy.resolver.layers(&wanted.image, manifest).await;
                    lazy.resolver.others(&lazy, &wanted, layers.unwrap_or_default());
                });
            } else {
                let layers = self.layers(&wanted.image, manifest).await?;
                let own = layers.iter().find(|l| l.digest == wanted.layer).cloned();
                self.others(lazy, wanted, layers);
                let own = own.ok_or_else(not_lazy)?;
                return self
                    .make(lazy, &wanted.image, wanted.layer, Some(own.size), &own.annotations)
                    .await;
            }
        }
        self.make(lazy, &wanted.image, wanted.layer, None, &wanted.annotations).await
    }

    /// Begins to make the other layers of an image.
    fn others(&self, lazy: &Arc<Lazy>, wanted: &Wanted, layers: Vec<Descriptor>) {
        for layer in layers.into_iter().filter(|l| l.digest != wanted.layer) {
            let (lazy, image) = (lazy.clone(), wanted.image.clone());
            shipway_task::spawn_on(&lazy.clone().runtime, "make a layer", async move {
                let size = Some(layer.size);
                let made =
                    lazy.resolver.make(&lazy, &image, layer.digest, size, &layer.annotations);
                if let Err(fault) = made.await {
                    tracing::debug!(%image, layer = %layer.digest, %fault, "a layer is not lazy");
                }
            });
        }
    }

    async fn make(
        &self,
        lazy: &Arc<Lazy>,
        image: &ImageName,
        digest: Digest,
        size: Option<u64>,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Arc<Layer>> {
        let annotated = Annotated::read(annotations)?.ok_or_else(not_lazy)?;
        let key = key_of(digest, &annotated);
        let cell = lock(&self.making).entry(key).or_default().clone();
        let work = async || {
            let repository = image.locator();
            let sources =
                sources(&self.registry, std::slice::from_ref(image), &self.credentials).await?;
            if let Some(layer) = lazy.store.find(&key) {
                let (lazy, known) = (lazy.clone(), layer.clone());
                shipway_task::blocking("make a layer", move || {
                    known.add_repository(&repository)?;
                    lazy.serve(&known, sources)
                })
                .await?;
                return Ok(layer);
            }
            let request = IndexRequest {
                digest,
                size,
                annotations: annotations.clone(),
                sources: sources.clone(),
                external: None,
            };
            let Indexed { toc, layout, size, rtt } = index(&request, &self.settings).await?;
            if let Some(first) = sources.first() {
                lazy.fetcher.round_trip(first.host(), rtt);
            }
            let about = Description { blob_size: size, codec: layout.codec, repository };
            let lazy = lazy.clone();
            shipway_task::blocking("make a layer", move || {
                let layer = lazy.store.create(key, &about, &toc)?;
                lazy.serve(&layer, sources)?;
                lazy.resolver.tocs.keep(layer.number().0, toc);
                Ok(layer)
            })
            .await
        };
        let made = cell.get_or_try_init(work).await.cloned();
        // Whoever asks later finds it in the store, or tries again.
        lock(&self.making).remove(&key);
        made
    }

    /// The table of contents of a layer: from when the layer was made, or fetched once more.
    pub async fn toc(&self, layer: &Layer) -> Result<Arc<Toc>> {
        if let Some(toc) = self.tocs.take(layer.number().0) {
            return Ok(toc);
        }
        let sources = self.sources(layer).await?;
        let key = layer.key();
        // Which of the two the manifest named is not remembered.
        let mut failed = None;
        for name in [TOC_DIGEST, PODMAN_CHECKSUM] {
            let request = IndexRequest {
                digest: key.blob,
                size: Some(layer.blob_size()),
                annotations: BTreeMap::from([(name.to_owned(), key.toc.to_string())]),
                sources: sources.clone(),
                external: None,
            };
            match index(&request, &self.settings).await {
                Ok(indexed) => return Ok(Arc::new(indexed.toc)),
                Err(fault) => failed = failed.or(Some(fault)),
            }
        }
        Err(failed.unwrap_or_else(not_lazy))
    }

    async fn sources(&self, layer: &Layer) -> Result<Vec<Arc<dyn Source>>> {
        sources(&self.registry, &repositories(layer), &self.credentials).await
    }

    /// Where layers may be fetched from, as far as it is remembered; in the same order.
    pub fn sources_of(&self, runtime: &Handle, layers: &[Arc<Layer>]) -> Vec<Vec<Arc<dyn Source>>> {
        let names: Vec<_> = layers.iter().map(|layer| repositories(layer)).collect();
        let found = runtime.block_on(sources_of_all(&self.registry, &names, &self.credentials));
        let of_layer = |(layer, found): (&Arc<Layer>, Result<_>)| {
            found.unwrap_or_else(|fault| {
                tracing::warn!(layer = %layer.number(), %fault, "a layer has no source");
                Vec::new()
            })
        };
        layers.iter().zip(found).map(of_layer).collect()
    }
}

/// Where a layer was seen, the latest first.
fn repositories(layer: &Layer) -> Vec<ImageName> {
    layer.repositories().iter().rev().filter_map(|name| name.parse().ok()).collect()
}
