//! What images are made of, as both ways from one to another read and write it: bounded, and with
//! those parts alone that are wanted.

use crate::{Progress, Source, Target};
use shipway_fault::{Class, Fault, Result};
use shipway_oci::{Descriptor, DiffId, Digest, Index, Manifest, Platform, media};
use std::{collections::HashMap, sync::Arc};

/// Most entries of an index, and most layers of an image.
const MAX_ENTRIES: usize = 1000;
/// On an entry of an index: the image that it is about (row `at.store`).
const ABOUT: &str = "vnd.docker.reference.digest";

pub(crate) fn parse<T: serde::de::DeserializeOwned>(
    bytes: &[u8],
    what: &str,
    digest: Digest,
) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|e| Fault::invalid(format!("the {what} {digest} cannot be read: {e}")))
}

/// The index `digest` out of its bytes.
pub(crate) fn index_of(bytes: &[u8], digest: Digest) -> Result<Index> {
    let index: Index = parse(bytes, "index", digest)?;
    if index.manifests.len() > MAX_ENTRIES {
        return Err(Fault::invalid(format!("an index has more than {MAX_ENTRIES} entries")));
    }
    Ok(index)
}

/// The manifest `digest` out of its bytes.
pub(crate) fn manifest_of(bytes: &[u8], digest: Digest) -> Result<Manifest> {
    let manifest: Manifest = parse(bytes, "manifest", digest)?;
    if manifest.layers.len() > MAX_ENTRIES {
        return Err(Fault::invalid(format!("an image has more than {MAX_ENTRIES} layers")));
    }
    Ok(manifest)
}

/// The image that an entry of an index says something of.
fn about(entry: &Descriptor) -> Option<Digest> {
    entry.annotations.get(ABOUT)?.parse().ok()
}

/// Leaves the images for `platforms` in an index, or all if none are named, with what is said of
/// them.
pub(crate) fn retain_platforms(index: &mut Index, platforms: &[Platform]) -> Result<()> {
    let all = index.manifests.clone();
    let is_wanted = |entry: &Descriptor| {
        let rank = |wanted: &Platform| entry.platform.as_ref()?.rank_for(wanted);
        platforms.is_empty() || platforms.iter().any(|wanted| rank(wanted).is_some())
    };
    index.manifests.retain(|entry| match about(entry) {
        Some(image) => all.iter().any(|e| e.digest == image && is_wanted(e)),
        None => is_wanted(entry),
    });
    if index.manifests.is_empty() {
        let has: Vec<String> =
            all.iter().filter_map(|e| Some(e.platform.as_ref()?.to_string())).collect();
        return Err(Fault::not_found("the image has none of the platforms that are wanted")
            .with_class(Class::User)
            .hint(format!("it has {}", has.join(", "))));
    }
    Ok(())
}

/// What is said of an image is said of it still, by the digest that it has now.
pub(crate) fn follow(index: &mut Index, new: &HashMap<Digest, Digest>) {
    for entry in &mut index.manifests {
        if let Some(image) = about(entry).and_then(|image| new.get(&image)) {
            entry.annotations.insert(ABOUT.to_owned(), image.to_string());
        }
    }
}

/// Whether a manifest is one of files, and not of something that is said of them.
pub(crate) fn is_image(entry: &Descriptor, manifest: &Manifest) -> bool {
    [media::OCI_CONFIG, media::DOCKER_CONFIG].contains(&&*manifest.config.media_type)
        && manifest.artifact_type.is_none()
        && !entry.annotations.contains_key(ABOUT)
}

/// Refuses an image whose config has more or fewer layers than its manifest.
pub(crate) fn check_layers(manifest: &Manifest, diff_ids: &[DiffId]) -> Result<()> {
    if diff_ids.len() != manifest.layers.len() {
        return Err(Fault::invalid(format!(
            "the manifest has {} layers, and the config {}",
            manifest.layers.len(),
            diff_ids.len()
        )));
    }
    Ok(())
}

/// Copies the layers of a manifest and its config.
pub(crate) async fn copy_blobs<T: Target + ?Sized>(
    target: &T,
    source: &Arc<dyn Source>,
    manifest: &Manifest,
    progress: &Progress,
) -> Result<()> {
    let kept = |layer: &&Descriptor| !media::is_foreign(&layer.media_type);
    for blob in manifest.layers.iter().filter(kept).chain([&manifest.config]) {
        target.copy(blob, source, progress).await?;
    }
    Ok(())
}

/// The descriptor of `bytes` in the place of `old`, with what that says of them.
pub(crate) fn instead(old: &Descriptor, media_type: &str, bytes: &[u8]) -> Descriptor {
    let Descriptor { digest, size, .. } = Descriptor::of(media_type, bytes);
    Descriptor { media_type: media_type.to_owned(), digest, size, data: None, ..old.clone() }
}

/// What a manifest keeps.
pub(crate) fn children(manifest: &Manifest) -> Vec<Digest> {
    std::iter::once(&manifest.config).chain(&manifest.layers).map(|d| d.digest).collect()
}
