//! SOCI indexes: manifests whose layers are the zTOCs of an image's layers.
//!
//! Version 2 is bound to an image: the image's manifest names the index's digest, and both are
//! entries of one index. Version 1 is an artifact that refers to an image, and may be added by
//! anybody who can write to its repository.
//!
//! Source: awslabs/soci-snapshotter, `soci/soci_index.go`, `docs/soci-index-manifest-v2.md`.

use crate::{Descriptor, Digest, Manifest};

/// Type of an index of version 1: of its config, and of the artifact.
pub const INDEX_V1: &str = "application/vnd.amazon.soci.index.v1+json";
/// Type of an index of version 2, likewise.
pub const INDEX_V2: &str = "application/vnd.amazon.soci.index.v2+json";
/// Media type of zTOCs.
pub const ZTOC: &str = "application/octet-stream";
/// Annotation of an image's manifest: the digest of its index.
pub const INDEX_DIGEST: &str = "com.amazon.soci.index-digest";
/// Annotation of an index's entry in the index of images: the digest of the image's manifest.
pub const IMAGE_DIGEST: &str = "com.amazon.soci.image-manifest-digest";
/// Annotation of a zTOC: the digest of the layer that it is of.
pub const LAYER_DIGEST: &str = "com.amazon.soci.image-layer-digest";
/// Annotation of a zTOC: the media type of that layer.
pub const LAYER_TYPE: &str = "com.amazon.soci.image-layer-mediaType";
/// Annotation of a zTOC: bytes of the tar in a span.
pub const SPAN_SIZE: &str = "com.amazon.soci.span-size";
/// Annotation of an index: the program that made it.
pub const BUILD_TOOL: &str = "com.amazon.soci.build-tool-identifier";

/// The digest of an image's index, by its manifest.
pub fn index_of(image: &Manifest) -> Option<Digest> {
    image.annotations.get(INDEX_DIGEST)?.parse().ok()
}

/// Whether an entry of an index of images is a SOCI index.
pub fn is_index(entry: &Descriptor) -> bool {
    entry.artifact_type.as_deref() == Some(INDEX_V2)
}

/// The zTOCs of an index, by the digests of the layers that they are of.
pub fn ztocs(index: &Manifest) -> impl Iterator<Item = (Digest, &Descriptor)> {
    let ztocs = index.layers.iter().filter(|ztoc| ztoc.media_type == ZTOC);
    ztocs.filter_map(|ztoc| Some((ztoc.annotations.get(LAYER_DIGEST)?.parse().ok()?, ztoc)))
}
