//! Images with SOCI indexes: the same layers, and beside each image the zTOCs of its large ones.
//!
//! As `soci convert` of awslabs/soci-snapshotter has it: an index of images, each image's manifest
//! annotated with the digest of its SOCI index, and these as further entries. What is said of an
//! image (attestations) follows it to its new digest.

use crate::{
    Bytes, Input, Progress, Source, Target,
    image::{
        check_layers, children, copy_blobs, follow, index_of, instead, is_image, manifest_of,
        parse, retain_platforms,
    },
};
use bytes::Buf as _;
use futures::{StreamExt as _, TryStreamExt as _, future::BoxFuture, stream};
use shipway_archive::{Member, MemberKind, TarReader};
use shipway_estargz::{Codec, TarEntry};
use shipway_fault::{Class, Code, Context as _, Fault, Result};
use shipway_oci::{
    Descriptor, DiffId, Digest, ImageConfig, Index, Manifest, Platform, gojson, media, soci,
};
use shipway_plainlayer::{Scanner, ZTOC_SPAN, ZtocEntry};
use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read},
    sync::Arc,
};
use tokio::sync::OnceCell;

/// Layers of one image that are read at the same time.
const PARALLEL: usize = 2;
/// Bytes of contents that are read at once.
const BUFFER: usize = 64 << 10;
/// Layers with fewer bytes are fetched as a whole as fast, as soci has it.
const MIN_LAYER: u64 = 10 << 20;
/// The program that makes indexes, as they say.
const TOOL: &str = concat!("shipway ", env!("CARGO_PKG_VERSION"));
/// The config of an index.
const EMPTY: &[u8] = b"{}";

/// What is wanted of indexes.
#[derive(Clone, Debug)]
pub struct SociOptions {
    /// Bytes of the tar after which a span ends.
    pub span: u64,
    /// Layers with fewer bytes get no zTOC.
    pub min_layer: u64,
    /// Platforms that the new image has, those of the old one if none are named.
    pub platforms: Vec<Platform>,
}

impl Default for SociOptions {
    fn default() -> Self {
        Self { span: ZTOC_SPAN, min_layer: MIN_LAYER, platforms: Vec::new() }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WithSoci {
    /// The new image, an index.
    pub root: Descriptor,
    /// Layers with a zTOC, and bytes of these.
    pub layers: usize,
    /// See `layers`.
    pub size: u64,
    /// Layers without, and why.
    pub skipped: BTreeMap<Digest, String>,
}

/// Writes the image of `source` to `target`, with a SOCI index for each platform.
pub async fn with_soci(
    source: Arc<dyn Source>,
    target: Arc<dyn Target>,
    options: &SociOptions,
    progress: Progress,
) -> Result<WithSoci> {
    let root = source.root().await?;
    let work = Work { source, target, options, progress, layers: parking_lot::Mutex::default() };
    let mut index = work.index(&root).await?;
    let (mut indexes, mut new) = (Vec::new(), HashMap::new());
    for entry in &mut index.manifests {
        let (made, soci) = work.entry(entry).await?;
        new.insert(entry.digest, made.digest);
        indexes.extend(soci);
        *entry = made;
    }
    follow(&mut index, &new);
    let (mut layers, mut size, mut skipped) = (0, 0, BTreeMap::new());
    for (digest, layer) in &*work.layers.lock() {
        match layer.get() {
            Some(Ok(ztoc)) => (layers, size) = (layers + 1, size + ztoc.size),
            Some(Err(why)) => drop(skipped.insert(*digest, why.clone())),
            None => {}
        }
    }
    if indexes.is_empty() {
        let why = skipped.values().next().cloned().unwrap_or_else(|| "it has none".to_owned());
        return Err(Fault::new(
            Code::FailedPrecondition,
            format!("no layer of the image can have a zTOC: {why}"),
        )
        .with_class(Class::User)
        .hint("small layers get one with a smaller --soci-min-layer-size"));
    }
    index.manifests.extend(indexes);
    index.media_type = Some(media::OCI_INDEX.to_owned());
    let bytes = json(&index)?;
    let old = Descriptor { platform: None, ..root };
    let root = instead(&old, media::OCI_INDEX, &bytes);
    let children: Vec<Digest> = index.manifests.iter().map(|entry| entry.digest).collect();
    work.target.manifest(&root, bytes, &children).await?;
    work.target.finish(&root).await?;
    Ok(WithSoci { root, layers, size, skipped })
}

fn json(value: &impl serde::Serialize) -> Result<Bytes> {
    let encoded = gojson::to_string(value);
    encoded.map(Bytes::from).map_err(|e| Fault::internal(format!("encode a manifest: {e}")))
}

/// Whether layers of this type are compressed with gzip.
fn is_gzip(media_type: &str) -> bool {
    [media::OCI_LAYER_GZIP, media::DOCKER_LAYER_GZIP].contains(&media_type)
}

/// The zTOC of a layer, or why it has none.
type Made = Arc<OnceCell<Result<Descriptor, String>>>;

struct Work<'a> {
    source: Arc<dyn Source>,
    target: Arc<dyn Target>,
    options: &'a SociOptions,
    progress: Progress,
    /// By the layers' digests: platforms share them.
    layers: parking_lot::Mutex<HashMap<Digest, Made>>,
}

impl Work<'_> {
    /// The images that are wanted, with what is said of them, and without SOCI indexes.
    async fn index(&self, root: &Descriptor) -> Result<Index> {
        if !media::is_index(&root.media_type) {
            let platform = self.platform(root).await?;
            let only = Descriptor { platform: Some(platform), ..root.clone() };
            return Ok(Index {
                schema_version: 2,
                media_type: None,
                manifests: vec![only],
                annotations: BTreeMap::new(),
            });
        }
        let bytes = self.source.manifest(root).await?;
        let mut index = index_of(&bytes, root.digest)?;
        index.manifests.retain(|entry| !soci::is_index(entry));
        retain_platforms(&mut index, &self.options.platforms)?;
        Ok(index)
    }

    /// What an image without index is for.
    async fn platform(&self, image: &Descriptor) -> Result<Platform> {
        let manifest: Manifest =
            parse(&self.source.manifest(image).await?, "manifest", image.digest)?;
        let text = self.source.config(&manifest.config).await?;
        let config: ImageConfig = parse(&text, "config", manifest.config.digest)?;
        Ok(config.platform())
    }

    /// An entry of the new index, and its SOCI index.
    async fn entry(&self, old: &Descriptor) -> Result<(Descriptor, Option<Descriptor>)> {
        if !media::is_manifest(&old.media_type) {
            return Err(Fault::invalid(format!(
                "{} in the index is not an image, but {:?}",
                old.digest, old.media_type
            )));
        }
        let bytes = self.source.manifest(old).await?;
        let mut manifest = manifest_of(&bytes, old.digest)?;
        copy_blobs(&*self.target, &self.source, &manifest, &self.progress).await?;
        if !is_image(old, &manifest) {
            self.target.manifest(old, bytes, &children(&manifest)).await?;
            return Ok((old.clone(), None));
        }
        let text = self.source.config(&manifest.config).await?;
        let config: ImageConfig = parse(&text, "config", manifest.config.digest)?;
        let index = self.soci_index(&manifest, &config.rootfs.diff_ids).await?;
        // Registries want one kind of media types in what belongs together.
        manifest.media_type = Some(media::OCI_MANIFEST.to_owned());
        manifest.config.media_type = media::OCI_CONFIG.to_owned();
        match &index {
            Some(index) => {
                let digest = index.digest.to_string();
                manifest.annotations.insert(soci::INDEX_DIGEST.to_owned(), digest);
            }
            None => drop(manifest.annotations.remove(soci::INDEX_DIGEST)),
        }
        let bytes = json(&manifest)?;
        let mut made = instead(old, media::OCI_MANIFEST, &bytes);
        made.annotations.remove(soci::INDEX_DIGEST);
        made.annotations.extend(manifest.annotations.clone());
        self.target.manifest(&made, bytes, &children(&manifest)).await?;
        let platform = old.platform.clone().unwrap_or_else(|| config.platform());
        let index = index.map(|mut index| {
            let image = made.digest.to_string();
            index.annotations.insert(soci::IMAGE_DIGEST.to_owned(), image);
            Descriptor { platform: Some(platform), ..index }
        });
        Ok((made, index))
    }

    /// The SOCI index of an image, if one of its layers has a zTOC.
    async fn soci_index(
        &self,
        manifest: &Manifest,
        diff_ids: &[DiffId],
    ) -> Result<Option<Descriptor>> {
        check_layers(manifest, diff_ids)?;
        let work = manifest.layers.iter().zip(diff_ids).map(|(layer, diff_id)| async move {
            let once = self.layers.lock().entry(layer.digest).or_default().clone();
            let made = once.get_or_try_init(|| self.layer(layer, *diff_id)).await;
            made.cloned().context(|| format!("make the zTOC of layer {}", layer.digest))
        });
        // Boxed, for the compiler cannot yet tell that such a stream may move between threads.
        let work: Vec<BoxFuture<'_, _>> = work.map(|work| Box::pin(work) as _).collect();
        let made: Vec<Result<Descriptor, String>> =
            stream::iter(work).buffered(PARALLEL).try_collect().await?;
        let ztocs: Vec<Descriptor> = made.into_iter().flatten().collect();
        if ztocs.is_empty() {
            return Ok(None);
        }
        let config = Descriptor::of(soci::INDEX_V2, EMPTY);
        self.target.config(&config, Bytes::from_static(EMPTY)).await?;
        let index = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.to_owned()),
            artifact_type: None,
            config,
            layers: ztocs,
            subject: None,
            annotations: [(soci::BUILD_TOOL.to_owned(), TOOL.to_owned())].into(),
        };
        let bytes = json(&index)?;
        let mut descriptor = Descriptor::of(media::OCI_MANIFEST, &bytes);
        descriptor.artifact_type = Some(soci::INDEX_V2.to_owned());
        self.target.manifest(&descriptor, bytes, &children(&index)).await?;
        Ok(Some(descriptor))
    }

    /// The zTOC of a layer, or why it gets none.
    async fn layer(
        &self,
        layer: &Descriptor,
        diff_id: DiffId,
    ) -> Result<Result<Descriptor, String>> {
        if !is_gzip(&layer.media_type) {
            return Ok(Err(format!("it is not compressed with gzip, but {:?}", layer.media_type)));
        }
        let least = self.options.min_layer;
        if layer.size < least {
            return Ok(Err(format!("it has {} bytes, fewer than {least}", layer.size)));
        }
        let bytes = self.source.blob(layer).await?;
        let input = Input::new(bytes, layer, &self.progress);
        let span = self.options.span;
        let work = move || Ok(ztoc(input, span));
        let (bytes, found) = match shipway_task::blocking("make a zTOC", work).await? {
            Ok(made) => made,
            Err(Failure::Unfit(why)) => return Ok(Err(why)),
            Err(Failure::Failed(fault)) => return Err(fault),
        };
        if found != diff_id {
            return Err(Fault::new(
                Code::DataLoss,
                format!("the layer holds the tar {found}, and the config promises {diff_id}"),
            )
            .with_class(Class::User)
            .hint("the image is inconsistent: build or push it again"));
        }
        let mut descriptor = Descriptor::of(soci::ZTOC, &bytes);
        descriptor.annotations = [
            (soci::LAYER_TYPE, layer.media_type.clone()),
            (soci::LAYER_DIGEST, layer.digest.to_string()),
            (soci::SPAN_SIZE, span.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        // A blob of any kind is written as configs are.
        self.target.config(&descriptor, bytes.into()).await?;
        Ok(Ok(descriptor))
    }
}

/// Why a layer has no zTOC.
enum Failure {
    /// It cannot have one.
    Unfit(String),
    Failed(Fault),
}

/// The zTOC of a layer, and the digest of its tar.
fn ztoc(input: Input, span: u64) -> Result<(Vec<u8>, DiffId), Failure> {
    let mut pieces = Pieces { input, piece: Bytes::new(), failed: None };
    let made = ztoc_of(&mut pieces, span);
    match (made, pieces.failed) {
        (_, Some(fault)) => Err(Failure::Failed(fault)),
        (Err(Failure::Failed(fault)), None) => {
            Err(Failure::Failed(fault.hint("the layer is damaged: build or push it again")))
        }
        (made, None) => made,
    }
}

fn ztoc_of(pieces: &mut Pieces, span: u64) -> Result<(Vec<u8>, DiffId), Failure> {
    let broken = |error| Failure::Failed(Fault::io("read the layer", error));
    let scanner = Scanner::new(Codec::Gzip, pieces).map_err(broken)?;
    let mut scanner = scanner.with_checkpoints(span).allow_long_spans();
    let progress = scanner.progress();
    // No buffer between: places are those up to which the scanner was read.
    let (mut tar, mut entries) = (TarReader::new(&mut scanner), Vec::new());
    let mut buffer = vec![0; BUFFER];
    while let Some(member) = tar.next_member().map_err(broken)? {
        let offset = progress.read();
        let unfit = |what: &str| {
            let path = String::from_utf8_lossy(&member.path).chars().take(200).collect::<String>();
            Failure::Unfit(format!("{path:?} in it is {what}"))
        };
        if matches!(member.kind, MemberKind::Other(_)) {
            return Err(unfit("of a kind that zTOCs do not have"));
        }
        let mut at = 0;
        while let Some(piece) = tar.piece(&mut buffer).map_err(broken)? {
            if piece.offset != at {
                return Err(unfit("a sparse file"));
            }
            at += piece.len as u64;
        }
        if at != member.size || member.records.iter().any(|(key, _)| key.starts_with(b"GNU.sparse"))
        {
            return Err(unfit("a sparse file"));
        }
        let tar = TarEntry::from(&member);
        let Member { user, group, records, .. } = member;
        entries.push(ZtocEntry { tar, offset, user, group, records });
    }
    let end = progress.read();
    let scan = scanner.finish().map_err(|e| Failure::Failed(e.into()))?;
    let bytes = scan.ztoc(&entries, end, TOOL).map_err(|e| Failure::Unfit(e.to_string()))?;
    Ok((bytes, DiffId(scan.diff_id)))
}

/// A layer out of its pieces.
struct Pieces {
    input: Input,
    piece: Bytes,
    /// Why it cannot be read any more.
    failed: Option<Fault>,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.input.next_piece() {
                Ok(Some(piece)) => self.piece = piece,
                Ok(None) => return Ok(0),
                Err(fault) => {
                    let error = io::Error::other(fault.to_string());
                    self.failed = Some(fault);
                    return Err(error);
                }
            }
        }
        let taken = self.piece.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&self.piece[..taken]);
        self.piece.advance(taken);
        Ok(taken)
    }
}
