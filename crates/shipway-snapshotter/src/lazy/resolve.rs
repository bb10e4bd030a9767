//! From the labels of a Prepare to a layer that is served. All layers of an image are looked for as
//! soon as its first one is asked for, and each once however many ask.

use super::{
    Lazy,
    credentials::AllCredentials,
    fast::Pull,
    labels::Wanted,
    soci::{Ztoc, Ztocs},
};
use crate::{
    config::{self, Config},
    content,
};
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use shipway_estargz::{Annotated, PODMAN_CHECKSUM, TOC_DIGEST, Toc, TocDigest};
use shipway_fault::{Class, Code, Fault, Result};
use shipway_layerstore::{Description, Indexed as ByZtoc, Layer, LayerKey};
use shipway_lazyfetch::{
    IndexRequest, Indexed, Profile, Settings, Source, index, sources, sources_of_all,
};
use shipway_oci::{
    Descriptor, Digest, ImageName, Index, Manifest, Platform, media, soci, timestamp,
};
use shipway_registry::{Mode, Registry, RegistryConfig, Repository};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    runtime::Handle,
    sync::{OnceCell, mpsc},
};

/// Manifests that are remembered.
const MANIFESTS: usize = 64;
/// Entries of all tables of contents that are kept until their blobs are read.
const MAX_ENTRIES_KEPT: usize = 100_000;
/// Manifests that an index is looked through for, those for this machine first.
const MAX_PLATFORMS: usize = 8;
/// Longest manifest, in bytes.
const MAX_MANIFEST: usize = 4 << 20;
/// How long containerd is asked for a manifest that it may have.
const STORED: Duration = Duration::from_millis(250);
/// A registry that knows this part of what was learned need not be told.
const KNOWN_WELL: f64 = 0.9;

type Shared<T> = Arc<OnceCell<T>>;

/// An image by its manifest.
pub(super) struct Image {
    pub manifest: Descriptor,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    /// Digest of its SOCI index, if its manifest names one.
    pub soci: Option<Digest>,
    /// What that says, or another one that is used.
    pub ztocs: OnceCell<Arc<Ztocs>>,
}

impl Image {
    fn read(name: &ImageName, manifest: Digest, bytes: &[u8]) -> Result<Arc<Self>> {
        let found: Manifest = serde_json::from_slice(bytes)
            .map_err(|e| Fault::invalid(format!("the manifest of {name}: {e}")))?;
        let soci = soci::index_of(&found);
        let media_type = found.media_type.unwrap_or_else(|| media::OCI_MANIFEST.to_owned());
        let manifest = Descriptor::new(media_type, manifest, bytes.len() as u64);
        let (config, layers) = (found.config, found.layers);
        Ok(Arc::new(Self { manifest, config, layers, soci, ztocs: OnceCell::new() }))
    }

    fn layer(&self, digest: Digest) -> Option<&Descriptor> {
        self.layers.iter().find(|layer| layer.digest == digest)
    }
}

/// The cell for `key`, among those that were used last.
fn cell_of<K: PartialEq, T>(all: &Mutex<Vec<(K, Shared<T>)>>, key: K) -> Shared<T> {
    let mut known = all.lock();
    if let Some((_, cell)) = known.iter().find(|(known, _)| *known == key) {
        return cell.clone();
    }
    let cell = Shared::default();
    known.insert(0, (key, cell.clone()));
    known.truncate(MANIFESTS);
    cell
}

/// What an image says of one of its layers.
struct Own<'a> {
    /// Length of its blob, if it is known.
    size: Option<u64>,
    annotations: &'a BTreeMap<String, String>,
    ztoc: Option<&'a Ztoc>,
}

impl<'a> Own<'a> {
    fn of(layer: &'a Descriptor, ztocs: &'a Ztocs) -> Self {
        let Descriptor { digest, size, annotations, .. } = layer;
        Self { size: Some(*size), annotations, ztoc: ztocs.get(digest) }
    }
}

/// A layer that was found.
pub enum Found {
    /// It can be used.
    Layer(Arc<Layer>),
    /// It comes.
    Pull(Pull),
}

/// Finds layers.
pub struct Resolver {
    registry: Registry,
    credentials: AllCredentials,
    settings: Settings,
    manifests: Mutex<Vec<(Digest, Shared<Arc<Image>>)>>,
    /// What images' names meant lately.
    names: Mutex<Vec<(String, Shared<Arc<Image>>)>>,
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
            names: Mutex::default(),
            making: Mutex::default(),
            tocs: Tocs::default(),
        }
    }

    pub(super) fn repository(&self, image: &ImageName) -> Repository {
        let source = shipway_lazyfetch::Credentials::of(&self.credentials, image);
        self.registry.repository(image, source, Mode::Pull)
    }

    /// The image with a manifest.
    async fn image(&self, name: &ImageName, manifest: Digest) -> Result<Arc<Image>> {
        let fetch = async || {
            // Its length is not known, its digest is.
            let unknown = Descriptor::new("", manifest, 0);
            let bytes = self.repository(name).fetch_manifest(&unknown).await?;
            Image::read(name, manifest, &bytes)
        };
        cell_of(&self.manifests, manifest).get_or_try_init(fetch).await.cloned()
    }

    /// The image that a layer is wanted for, out of containerd's content store: a client has stored
    /// the manifest of what it pulls before it asks for snapshots, so that no registry need be
    /// asked. `None` if it is not there, or if it is not clear which of several it is.
    async fn stored(
        &self,
        containerd: &Path,
        namespace: &str,
        wanted: &Wanted,
    ) -> Option<Arc<Image>> {
        let name = &wanted.image;
        let look = async {
            let manifest = match wanted.manifest {
                Some(manifest) => manifest,
                None => {
                    let from = (name.registry_host(), name.repository());
                    match *content::manifests_with(containerd, namespace, wanted.layer, from)
                        .await?
                    {
                        [only] => only,
                        _ => return Ok(None),
                    }
                }
            };
            let read = async || {
                let bytes = content::whole(containerd, namespace, manifest, MAX_MANIFEST).await?;
                Image::read(name, manifest, &bytes)
            };
            cell_of(&self.manifests, manifest).get_or_try_init(read).await.cloned().map(Some)
        };
        match tokio::time::timeout(STORED, look).await {
            Ok(Ok(image)) => image.filter(|image| image.layer(wanted.layer).is_some()),
            Ok(Err(fault)) => {
                tracing::debug!(image = %name, %fault, "no manifest in containerd");
                None
            }
            Err(_) => None,
        }
    }

    /// The image that a layer is wanted for. Where only its name was told it is asked what that
    /// means; it is an error if that has changed since.
    async fn image_of(&self, wanted: &Wanted) -> Result<Arc<Image>> {
        if let Some(manifest) = wanted.manifest {
            return self.image(&wanted.image, manifest).await;
        }
        let has = |image: &Image| image.layer(wanted.layer).is_some();
        let name = format!("{}@{}", wanted.image.locator(), wanted.image.reference());
        for _ in 0..2 {
            let cell = cell_of(&self.names, name.clone());
            let image = cell.get_or_try_init(|| self.named(wanted, &has)).await?;
            if has(image) {
                return Ok(image.clone());
            }
            // It may mean something else by now.
            self.names.lock().retain(|(_, known)| !Arc::ptr_eq(known, &cell));
        }
        Err(not_lazy())
    }

    /// What the name of the image means that a layer is wanted for.
    async fn named(
        &self,
        wanted: &Wanted,
        is_it: &(dyn Fn(&Image) -> bool + Sync),
    ) -> Result<Arc<Image>> {
        let (name, repository) = (&wanted.image, self.repository(&wanted.image));
        let found = repository.resolve(&name.reference()).await?;
        if !media::is_index(&found.media_type) {
            return self.image(name, found.digest).await;
        }
        let bytes = repository.fetch_manifest(&found).await?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|e| Fault::invalid(format!("the index of {name}: {e}")))?;
        let host = Platform::host();
        let mut all = index.manifests;
        all.retain(|m| media::is_manifest(&m.media_type) && !soci::is_index(m));
        all.sort_by_key(|m| {
            let rank = m.platform.as_ref().and_then(|platform| platform.rank_for(&host));
            (rank.is_none(), rank)
        });
        for manifest in all.into_iter().take(MAX_PLATFORMS) {
            let image = self.image(name, manifest.digest).await?;
            if is_it(&image) {
                return Ok(image);
            }
        }
        Err(not_lazy())
    }

    /// Passes the whole blob of a layer on, which `image` is known to have, or to have had.
    pub async fn blob(
        &self,
        image: &ImageName,
        manifest: Option<Digest>,
        layer: Digest,
        pieces: &mpsc::Sender<Bytes>,
    ) -> Result<()> {
        let annotations = BTreeMap::new();
        let wanted = Wanted { layer, image: image.clone(), manifest, annotations };
        let found = self.image_of(&wanted).await?;
        let own = found.layer(layer).ok_or_else(not_lazy)?;
        let mut blob = self.repository(image).fetch_blob(own, 0).await?;
        while let Some(piece) = blob.next().await? {
            if pieces.send(piece).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// The layer that is wanted by a client of `namespace`, served. The image's other layers are
    /// made meanwhile, and what will be read of all of them first is found out.
    pub async fn resolve(
        &self,
        lazy: &Arc<Lazy>,
        namespace: &str,
        wanted: &Wanted,
    ) -> Result<Found> {
        let stored = self.stored(&lazy.config.cri.containerd, namespace, wanted).await;
        if stored.is_none() && (wanted.has_toc() || self.has_plain(lazy, wanted.layer)) {
            let (all, of) = (lazy.clone(), wanted.clone());
            shipway_task::spawn_on(&lazy.runtime, "make other layers", async move {
                match all.resolver.image_of(&of).await {
                    Ok(image) => {
                        let ztocs = all.resolver.ztocs(&all, &of.image, &image).await;
                        Self::prepare(&all, &of.image, &image, &ztocs);
                        Self::pull_above(&all, &of, &image, &ztocs);
                    }
                    Err(fault) => tracing::debug!(image = %of.image, %fault, "no manifest"),
                }
            });
            let own = Own { size: None, annotations: &wanted.annotations, ztoc: None };
            return self.make(lazy, &wanted.image, wanted.layer, own).await.map(Found::Layer);
        }
        let image = match stored {
            Some(image) => image,
            None => self.image_of(wanted).await?,
        };
        let ztocs = self.ztocs(lazy, &wanted.image, &image).await;
        Self::prepare(lazy, &wanted.image, &image, &ztocs);
        let own = image.layer(wanted.layer).ok_or_else(not_lazy)?;
        let pull = self.is_pulled(lazy, own, &ztocs).then(|| lazy.pull(&wanted.image, own));
        Self::pull_above(lazy, wanted, &image, &ztocs);
        if let Some(pull) = pull {
            return Ok(Found::Pull(pull));
        }
        // What containerd passed on goes first: it knows what is pulled.
        let mut known = Own::of(own, &ztocs);
        if wanted.has_toc() {
            known.annotations = &wanted.annotations;
        }
        self.make(lazy, &wanted.image, own.digest, known).await.map(Found::Layer)
    }

    /// Whether a layer is pulled as a whole.
    fn is_pulled(&self, lazy: &Lazy, layer: &Descriptor, ztocs: &Ztocs) -> bool {
        lazy.config.lazy.pull == config::Pull::Fast
            && matches!(Annotated::read(&layer.annotations), Ok(None))
            && !self.has_plain(lazy, layer.digest)
            && !ztocs.contains_key(&layer.digest)
    }

    /// Begins to pull the layers above the one that is wanted, which are wanted next. Those below
    /// are there.
    fn pull_above(lazy: &Arc<Lazy>, wanted: &Wanted, image: &Image, ztocs: &Ztocs) {
        let above = image.layers.iter().skip_while(|layer| layer.digest != wanted.layer).skip(1);
        for layer in above.filter(|layer| lazy.resolver.is_pulled(lazy, layer, ztocs)) {
            drop(lazy.pull(&wanted.image, layer));
        }
    }

    /// Begins to make all layers of an image, and to fetch what will be read first.
    fn prepare(lazy: &Arc<Lazy>, name: &ImageName, image: &Image, ztocs: &Arc<Ztocs>) {
        let manifest = image.manifest.digest;
        {
            let (lazy, name) = (lazy.clone(), name.clone());
            shipway_task::spawn_on(&lazy.clone().runtime, "look for an order", async move {
                lazy.look_for_order(&name, manifest).await;
            });
        }
        for layer in image.layers.clone() {
            let (lazy, name, ztocs) = (lazy.clone(), name.clone(), ztocs.clone());
            shipway_task::spawn_on(&lazy.clone().runtime, "make a layer", async move {
                let own = Own::of(&layer, &ztocs);
                let made = lazy.resolver.make(&lazy, &name, layer.digest, own);
                let begin = match made.await {
                    Ok(made) => {
                        let (lazy, name) = (lazy.clone(), name.clone());
                        shipway_task::blocking("read the order of first reads", move || {
                            lazy.ahead(&name, Some(manifest), &made);
                            Ok(())
                        })
                        .await
                    }
                    Err(fault) => Err(fault),
                };
                if let Err(fault) = begin {
                    let layer = layer.digest;
                    tracing::debug!(image = %name, %layer, %fault, "a layer is not lazy");
                }
            });
        }
    }

    /// The order in which an image's files are read first, by whoever put it into its registry.
    pub async fn order(&self, image: &ImageName, manifest: Digest) -> Result<Option<Profile>> {
        Profile::find(&self.registry, image, manifest, &self.credentials).await
    }

    /// Puts such an order there, if what is there does not say as much; whether it was put.
    pub async fn share_order(
        &self,
        image: &ImageName,
        manifest: Digest,
        order: &Profile,
    ) -> Result<bool> {
        let known = self.order(image, manifest).await?;
        if known.is_some_and(|known| known.share_of(order) >= KNOWN_WELL) {
            return Ok(false);
        }
        let subject = self.image(image, manifest).await?.manifest.clone();
        let now = timestamp::format_whole(SystemTime::now());
        order.push(&self.registry, image, &subject, &now, &self.credentials).await?;
        Ok(true)
    }

    /// Whether an ordinary layer was unpacked here before.
    fn has_plain(&self, lazy: &Lazy, layer: Digest) -> bool {
        let settings = &lazy.config.lazy;
        (settings.plain || settings.pull == config::Pull::Fast)
            && lazy.store.find(&LayerKey::plain(layer)).is_some()
    }

    async fn make(
        &self,
        lazy: &Arc<Lazy>,
        image: &ImageName,
        digest: Digest,
        Own { size, annotations, ztoc }: Own<'_>,
    ) -> Result<Arc<Layer>> {
        let (key, ztoc) = match (Annotated::read(annotations)?, ztoc) {
            (Some(annotated), _) => (key_of(digest, &annotated), None),
            (None, _) if self.has_plain(lazy, digest) => (LayerKey::plain(digest), None),
            (None, Some(ztoc)) => (ztoc.key(digest), Some((ztoc, size.ok_or_else(not_lazy)?))),
            (None, None) => return Err(not_lazy()),
        };
        let cell = lock(&self.making).entry(key).or_default().clone();
        let work = async || {
            let repository = image.locator();
            let sources = self.sources_at(image).await?;
            if let Some(layer) = lazy.store.find(&key) {
                let (lazy, known) = (lazy.clone(), layer.clone());
                shipway_task::blocking("make a layer", move || {
                    lazy.check(&known)?;
                    known.add_repository(&repository)?;
                    lazy.serve(&known, sources)
                })
                .await?;
                return Ok(layer);
            }
            if let Some((ztoc, size)) = ztoc {
                let bytes = self.ztoc(image, ztoc).await?;
                let (lazy, diff_id) = (lazy.clone(), ztoc.diff_id);
                return shipway_task::blocking("make a layer", move || {
                    let index = ByZtoc::read(&bytes, digest, size, diff_id)?;
                    let layer = lazy.store.create_indexed(&index, &repository)?;
                    lazy.serve(&layer, sources)?;
                    Ok(layer)
                })
                .await;
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

    /// Where the layers of an image are fetched from.
    pub async fn sources_at(&self, image: &ImageName) -> Result<Vec<Arc<dyn Source>>> {
        sources(&self.registry, std::slice::from_ref(image), &self.credentials).await
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
