//! From an image to another with the same files.

use crate::{
    Bytes, Input, LayerTarget, Packing, Progress, Source,
    image::{
        check_layers, children, copy_blobs, follow, index_of, instead, is_image, manifest_of,
        parse, retain_platforms,
    },
};
use futures::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use parking_lot::Mutex;
use serde_json::Value;
use shipway_archive::{Compression, CompressionKind};
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest, Manifest, Platform, media, soci};
use std::{collections::HashMap, sync::Arc};
use tokio::sync::OnceCell;

/// Layers of one image that are worked on at the same time; each is compressed by all processors.
const PARALLEL: usize = 2;
/// How deep indexes may lie in each other.
const MAX_DEPTH: usize = 4;
/// What is wanted.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// How layers are made. Those that are compressed so are copied, unless it is forced, or they
    /// are to be in another order.
    pub packing: Packing,
    /// Platforms that the new image has, those of the old one if none are named. What is said of
    /// images of others is left out with them.
    pub platforms: Vec<Platform>,
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The new image: a manifest or an index.
    pub root: Descriptor,
    /// Layers that were compressed anew, each once.
    pub layers: usize,
    /// Bytes of these before, and after.
    pub size: (u64, u64),
}

/// Writes the image of `source` to `target`, with layers as `options` say.
pub async fn convert(
    source: Arc<dyn Source>,
    target: Arc<dyn LayerTarget>,
    options: &Options,
    progress: Progress,
) -> Result<Converted> {
    let root = source.root().await?;
    let conversion = Conversion { source, target, options, progress, layers: Mutex::default() };
    let root = conversion.entry(&root, MAX_DEPTH).await?;
    conversion.target.finish(&root).await?;
    let layers = conversion.layers.into_inner();
    let done: Vec<(u64, u64)> = layers
        .into_values()
        .filter_map(|layer| layer.get().map(|layer| (layer.before, layer.descriptor.size)))
        .collect();
    let size = done.iter().fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1));
    Ok(Converted { root, layers: done.len(), size })
}

/// A layer that was compressed anew.
#[derive(Clone)]
struct Layer {
    descriptor: Descriptor,
    diff_id: DiffId,
    /// Bytes that it had.
    before: u64,
}

struct Conversion<'a> {
    source: Arc<dyn Source>,
    target: Arc<dyn LayerTarget>,
    options: &'a Options,
    progress: Progress,
    /// By the digest that they had: platforms share layers.
    layers: Mutex<HashMap<Digest, Arc<OnceCell<Layer>>>>,
}

fn json(value: &impl serde::Serialize) -> Result<Bytes> {
    let encoded = serde_json::to_vec(value);
    encoded.map(Bytes::from).map_err(|e| Fault::internal(format!("encode a manifest: {e}")))
}

impl Conversion<'_> {
    /// A manifest, or an index with all that is in it.
    fn entry<'a>(
        &'a self,
        entry: &'a Descriptor,
        depth: usize,
    ) -> BoxFuture<'a, Result<Descriptor>> {
        Box::pin(async move {
            if media::is_index(&entry.media_type) {
                let left = depth.checked_sub(1).ok_or_else(|| {
                    Fault::invalid(format!("indexes lie more than {MAX_DEPTH} deep in each other"))
                })?;
                return self.index(entry, left).await;
            }
            if !media::is_manifest(&entry.media_type) {
                return Err(Fault::invalid(format!(
                    "{} is neither an image nor an index, but {:?}",
                    entry.digest, entry.media_type
                )));
            }
            let bytes = self.source.manifest(entry).await?;
            let manifest = manifest_of(&bytes, entry.digest)?;
            let what = || match &entry.platform {
                Some(platform) => format!("convert the image for {platform}"),
                None => format!("convert the image {}", entry.digest),
            };
            self.manifest(entry, bytes, manifest).await.context(what)
        })
    }

    async fn index(&self, old: &Descriptor, depth: usize) -> Result<Descriptor> {
        let bytes = self.source.manifest(old).await?;
        let mut index = index_of(&bytes, old.digest)?;
        let all = index.manifests.clone();
        retain_platforms(&mut index, &self.options.platforms)?;
        let mut new: HashMap<Digest, Digest> = HashMap::new();
        for entry in &mut index.manifests {
            let made = self.entry(entry, depth).await?;
            new.insert(entry.digest, made.digest);
            *entry = made;
        }
        follow(&mut index, &new);
        // SOCI indexes of layers that are not there any more.
        index.manifests.retain(|entry| {
            let about = entry.annotations.get(soci::IMAGE_DIGEST);
            let image = about.and_then(|about| about.parse::<Digest>().ok());
            !soci::is_index(entry)
                || image.is_none_or(|image| new.get(&image).is_none_or(|now| *now == image))
        });
        let children: Vec<Digest> = index.manifests.iter().map(|entry| entry.digest).collect();
        if children.iter().eq(all.iter().map(|entry| &entry.digest)) {
            self.target.manifest(old, bytes, &children).await?;
            return Ok(old.clone());
        }
        index.media_type = Some(media::OCI_INDEX.to_owned());
        let bytes = json(&index)?;
        let descriptor = instead(old, media::OCI_INDEX, &bytes);
        self.target.manifest(&descriptor, bytes, &children).await?;
        Ok(descriptor)
    }

    async fn manifest(
        &self,
        old: &Descriptor,
        bytes: Bytes,
        mut manifest: Manifest,
    ) -> Result<Descriptor> {
        if !is_image(old, &manifest) {
            return self.copied(old, bytes, &manifest).await;
        }
        let text = self.source.config(&manifest.config).await?;
        let mut config: Value = parse(&text, "config", manifest.config.digest)?;
        let diff_ids: Vec<DiffId> = serde_json::from_value(config["rootfs"]["diff_ids"].clone())
            .map_err(|e| Fault::invalid(format!("the config has no digests of its layers: {e}")))?;
        check_layers(&manifest, &diff_ids)?;
        if !manifest.layers.iter().any(|layer| self.source_kind(layer).is_some()) {
            return self.copied(old, bytes, &manifest).await;
        }
        let work = manifest.layers.iter().zip(diff_ids).map(|(layer, diff_id)| async move {
            self.layer(layer, diff_id).await.context(|| format!("convert layer {}", layer.digest))
        });
        // Boxed, for the compiler cannot yet tell that such a stream may move between threads.
        let work: Vec<BoxFuture<'_, _>> = work.map(|work| Box::pin(work) as _).collect();
        let layers: Vec<(Descriptor, DiffId)> =
            stream::iter(work).buffered(PARALLEL).try_collect().await?;
        let (layers, diff_ids): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
        config["rootfs"]["diff_ids"] =
            diff_ids.iter().map(|id| Value::String(id.to_string())).collect();
        let text = json(&config)?;
        manifest.config = instead(&manifest.config, media::OCI_CONFIG, &text);
        manifest.layers = layers;
        manifest.annotations.remove(soci::INDEX_DIGEST);
        manifest.media_type = Some(media::OCI_MANIFEST.to_owned());
        self.target.config(&manifest.config, text).await?;
        let bytes = json(&manifest)?;
        let mut descriptor = instead(old, media::OCI_MANIFEST, &bytes);
        descriptor.annotations.remove(soci::INDEX_DIGEST);
        self.target.manifest(&descriptor, bytes, &children(&manifest)).await?;
        Ok(descriptor)
    }

    /// A manifest as it is, with all that it names.
    async fn copied(
        &self,
        descriptor: &Descriptor,
        bytes: Bytes,
        manifest: &Manifest,
    ) -> Result<Descriptor> {
        copy_blobs(&*self.target, &self.source, manifest, &self.progress).await?;
        self.target.manifest(descriptor, bytes, &children(manifest)).await?;
        Ok(descriptor.clone())
    }

    /// How a layer is compressed, if it is to be compressed anew.
    fn source_kind(&self, layer: &Descriptor) -> Option<CompressionKind> {
        let Packing { compression: Compression { kind, force, .. }, first } = &self.options.packing;
        let found = CompressionKind::of(layer).filter(|_| !media::is_foreign(&layer.media_type))?;
        (*force || first.is_some() || found != *kind).then_some(found)
    }

    async fn layer(&self, layer: &Descriptor, diff_id: DiffId) -> Result<(Descriptor, DiffId)> {
        let Some(kind) = self.source_kind(layer) else {
            if !media::is_foreign(&layer.media_type) {
                self.target.copy(layer, &self.source, &self.progress).await?;
            }
            let media_type = media::layer_type(&layer.media_type, true).to_owned();
            return Ok((Descriptor { media_type, ..layer.clone() }, diff_id));
        };
        let once = self.layers.lock().entry(layer.digest).or_default().clone();
        let made = once.get_or_try_init(|| self.make(layer, kind, diff_id)).await?;
        Ok((made.descriptor.clone(), made.diff_id))
    }

    async fn make(
        &self,
        layer: &Descriptor,
        kind: CompressionKind,
        diff_id: DiffId,
    ) -> Result<Layer> {
        let packing = &self.options.packing;
        let bytes = self.source.blob(layer).await?;
        let input = Input::new(bytes, layer, &self.progress);
        let packed = self.target.layer(input, kind, packing).await?;
        if packed.tar.diff_id != diff_id {
            return Err(Fault::new(
                Code::DataLoss,
                format!(
                    "the layer holds the tar {}, and the config promises {diff_id}",
                    packed.tar.diff_id
                ),
            )
            .with_class(Class::User)
            .hint("the image is inconsistent: build or push it again"));
        }
        let mut descriptor =
            Descriptor::new(packing.compression.kind.media_type(), packed.digest, packed.size);
        descriptor.annotations =
            packed.indexed.as_ref().map(|i| i.annotations.clone()).unwrap_or_default();
        Ok(Layer { descriptor, diff_id: packed.diff_id(), before: layer.size })
    }
}
