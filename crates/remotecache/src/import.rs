//! Reading a cache: its manifest, or the manifests of an image whose configs hold caches.

use crate::{
    Attached, CacheIndex,
    format::{CONFIG, CacheConfig, CacheRecord, INLINE_FIELD},
    index::{Imported, ImportedLayer, ImportedRecord},
};
use base64::Engine as _;
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest, ImageConfig, Index, Manifest, media, timestamp};
use shipway_solver::{CacheKey, RecordMeta};
use shipway_sources::{Remote, Sources};
use std::collections::HashMap;

/// Annotation on an index entry that is no image but says something about one.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";
/// Images of an index that are looked into.
const MAX_IMAGES: usize = 64;

/// A config with the blobs that its layers may be.
struct Found {
    config: CacheConfig,
    blobs: HashMap<Digest, Descriptor>,
    /// What an image's config says of its layers, for caches that do not.
    diffs: HashMap<Digest, DiffId>,
}

/// Imports the cache that `reference` (a tag or digest) leads to; `None` if there is none.
pub async fn import(index: &CacheIndex, sources: &Sources, remote: Remote, reference: &str) -> Result<Option<Attached>> {
    let root = remote.resolve(reference).await?;
    let found = read(&remote, &root).await?;
    let mut imported = Imported { records: Vec::new(), keys: HashMap::new(), source: sources.layers_of(remote) };
    for one in &found {
        add(&mut imported, one);
    }
    Ok((!imported.records.is_empty()).then(|| index.attach(imported)))
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| Fault::invalid(format!("a cache's {what} cannot be read: {e}")))
}

async fn read(remote: &Remote, root: &Descriptor) -> Result<Vec<Found>> {
    let bytes = remote.manifest(root).await?;
    if !media::is_index(&root.media_type) {
        return Ok(of_manifest(remote, parse(&bytes, "manifest")?).await?.into_iter().collect());
    }
    let list: Index = parse(&bytes, "index")?;
    if let Some(config) = list.manifests.iter().find(|m| m.media_type == CONFIG) {
        let config = CacheConfig::read(&remote.small_blob(config).await?)?;
        let blobs = list.manifests.into_iter().filter(|m| m.media_type != CONFIG).map(|m| (m.digest, m)).collect();
        return Ok(vec![Found { config, blobs, diffs: HashMap::new() }]);
    }
    let mut all = Vec::new();
    for image in
        list.manifests.iter().filter(|m| media::is_manifest(&m.media_type) && !m.annotations.contains_key(REFERENCE_TYPE)).take(MAX_IMAGES)
    {
        all.extend(of_manifest(remote, parse(&remote.manifest(image).await?, "manifest")?).await?);
    }
    Ok(all)
}

async fn of_manifest(remote: &Remote, manifest: Manifest) -> Result<Option<Found>> {
    let blobs: HashMap<Digest, Descriptor> = manifest.layers.iter().map(|l| (l.digest, l.clone())).collect();
    let bytes = remote.small_blob(&manifest.config).await?;
    if manifest.config.media_type == CONFIG {
        return Ok(Some(Found { config: CacheConfig::read(&bytes)?, blobs, diffs: HashMap::new() }));
    }
    let fields: serde_json::Value = parse(&bytes, "image config")?;
    let Some(inline) = fields.get(INLINE_FIELD).and_then(|v| v.as_str()) else { return Ok(None) };
    let inline = base64::engine::general_purpose::STANDARD.decode(inline);
    let inline = inline.map_err(|e| Fault::invalid(format!("the cache in an image's config is damaged: {e}")))?;
    let image: ImageConfig = parse(&bytes, "image config")?;
    let diffs = manifest.layers.iter().map(|l| l.digest).zip(image.rootfs.diff_ids).collect();
    Ok(Some(Found { config: CacheConfig::read(&inline)?, blobs, diffs }))
}

/// A layer as a lazy state needs it; `None` if the cache does not say enough of it.
fn layer(found: &Found, number: usize) -> Option<ImportedLayer> {
    let layer = found.config.layers.get(number)?;
    let note = layer.annotations.as_ref();
    let diff_id = note.and_then(|n| n.diff_id).or_else(|| found.diffs.get(&layer.blob).copied())?;
    let blob = found.blobs.get(&layer.blob)?;
    // A manifest list of blobs may say nothing but the digest.
    let media_type = Some(blob.media_type.as_str()).filter(|t| !t.is_empty()).or(note.map(|n| n.media_type.as_str()))?;
    let descriptor = Descriptor::new(media_type, layer.blob, blob.size);
    Some(ImportedLayer { diff_id, descriptor, created: note.and_then(|n| timestamp::parse(&n.created_at)) })
}

fn record(found: &Found, record: &CacheRecord) -> ImportedRecord {
    let layers = found.config.layers_of(record).and_then(|l| l.into_iter().map(|n| layer(found, n)).collect());
    let keys = |alternatives: &Vec<crate::format::CacheInput>| {
        let keys = alternatives.iter().filter_map(|a| found.config.records.get(a.link)).map(|r| CacheKey(r.digest)).collect();
        (keys, alternatives.first().and_then(|a| a.selector))
    };
    let meta = RecordMeta {
        op_keys: Vec::new(),
        output: record.output,
        inputs: record.inputs.iter().map(keys).collect(),
        description: record.description.clone(),
    };
    ImportedRecord { primary: CacheKey(record.digest), layers, meta }
}

fn add(imported: &mut Imported, found: &Found) {
    for source in &found.config.records {
        let one = record(found, source);
        let number = imported.records.len();
        // A key that several images have leads to the first one with a result.
        for key in source.aliases.iter().copied().map(CacheKey).chain([one.primary]) {
            let better = match imported.find(&key) {
                Some(known) => known.layers.is_none() && one.layers.is_some(),
                None => true,
            };
            if better {
                imported.keys.insert(key, number);
            }
        }
        imported.records.push(one);
    }
}
