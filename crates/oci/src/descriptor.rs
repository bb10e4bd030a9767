//! Descriptors, manifests and indexes (OCI image-spec 1.1), and the media types we read and write.

use crate::config::{null_if_empty, nullable};
use crate::{Digest, Platform};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Media types.
#[allow(missing_docs)]
pub mod media {
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
    pub const OCI_FOREIGN: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar";
    pub const OCI_FOREIGN_GZIP: &str =
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    pub const OCI_FOREIGN_ZSTD: &str =
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd";
    pub const DOCKER_FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar";
    pub const DOCKER_FOREIGN_GZIP: &str =
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    pub const IN_TOTO: &str = "application/vnd.in-toto+json";
    pub const EMPTY_JSON: &str = "application/vnd.oci.empty.v1+json";

    /// Whether `t` names an index or manifest list.
    pub fn is_index(t: &str) -> bool {
        t == OCI_INDEX || t == DOCKER_LIST
    }

    /// A layer's type in OCI's family of types, or in Docker's; other types stay as they are.
    pub fn layer_type(t: &str, oci: bool) -> &str {
        const PAIRS: [(&str, &str); 5] = [
            (OCI_LAYER, DOCKER_LAYER),
            (OCI_LAYER_GZIP, DOCKER_LAYER_GZIP),
            (OCI_LAYER_ZSTD, DOCKER_LAYER_ZSTD),
            (OCI_FOREIGN, DOCKER_FOREIGN),
            (OCI_FOREIGN_GZIP, DOCKER_FOREIGN_GZIP),
        ];
        let in_family = |(o, d): &(&'static str, &'static str)| match oci {
            true if t == *d => Some(*o),
            false if t == *o => Some(*d),
            _ => None,
        };
        PAIRS.iter().find_map(in_family).unwrap_or(t)
    }

    /// Layers that registries do not keep, and the types they have where registries do.
    const FOREIGN: [(&str, &str); 5] = [
        (OCI_FOREIGN, OCI_LAYER),
        (OCI_FOREIGN_GZIP, OCI_LAYER_GZIP),
        (OCI_FOREIGN_ZSTD, OCI_LAYER_ZSTD),
        (DOCKER_FOREIGN, DOCKER_LAYER),
        (DOCKER_FOREIGN_GZIP, DOCKER_LAYER_GZIP),
    ];

    /// Whether a layer of type `t` is one that registries do not keep, because its license forbids
    /// it.
    pub fn is_foreign(t: &str) -> bool {
        FOREIGN.iter().any(|(f, _)| *f == t)
    }

    /// A layer's type among those that registries do not keep, or among those that they do; other
    /// types stay as they are.
    pub fn foreign_type(t: &str, foreign: bool) -> &str {
        FOREIGN
            .iter()
            .find_map(|(f, plain)| match foreign {
                true => (t == *plain).then_some(*f),
                false => (t == *f).then_some(*plain),
            })
            .unwrap_or(t)
    }

    /// Whether `t` names an image manifest.
    pub fn is_manifest(t: &str) -> bool {
        t == OCI_MANIFEST || t == DOCKER_MANIFEST
    }
}

/// Points at bytes by digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the bytes.
    pub media_type: String,
    /// Digest of the bytes.
    pub digest: Digest,
    /// Length of the bytes.
    pub size: u64,
    /// Places to fetch from besides the registry (non-distributable layers).
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "nullable")]
    pub urls: Vec<String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
    /// The bytes themselves in base64, where they are few.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Platform, on entries of an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Type of an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// The descriptor of `bytes` as `media_type`.
    pub fn of(media_type: impl Into<String>, bytes: &[u8]) -> Self {
        Self::new(media_type, Digest::of(bytes), bytes.len() as u64)
    }

    /// A plain descriptor.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.into(),
            digest,
            size,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            data: None,
            platform: None,
            artifact_type: None,
        }
    }
}

/// An image manifest, OCI or Docker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of the manifest itself; absent in some OCI manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// Type of an artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Image config.
    pub config: Descriptor,
    /// Layers, lowest first; `null` stands for none.
    #[serde(deserialize_with = "nullable", serialize_with = "null_if_empty")]
    pub layers: Vec<Descriptor>,
    /// What an artifact refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
}

/// An image index, OCI or Docker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// Media type of the index itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests.
    #[serde(deserialize_with = "nullable", serialize_with = "null_if_empty")]
    pub manifests: Vec<Descriptor>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "nullable")]
    pub annotations: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_of_go_are_read_and_written() {
        let digest = Digest::of("");
        let config = format!(
            r#"{{"mediaType":"m","digest":"{digest}","size":0,"urls":null,"annotations":null,"platform":null}}"#
        );
        let manifest: Manifest = serde_json::from_str(&format!(
            r#"{{"schemaVersion":2,"config":{config},"layers":null,"annotations":null}}"#
        ))
        .unwrap();
        assert!(manifest.layers.is_empty());
        let want = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"m","digest":"{digest}","size":0}},"layers":null}}"#
        );
        assert_eq!(serde_json::to_string(&manifest).unwrap(), want);
        let index: Index = serde_json::from_str(r#"{"schemaVersion":2,"manifests":null}"#).unwrap();
        assert_eq!(
            serde_json::to_string(&index).unwrap(),
            r#"{"schemaVersion":2,"manifests":null}"#
        );
    }

    #[test]
    fn foreign_types_are_those_of_layers_only() {
        for (plain, foreign) in [
            (media::OCI_LAYER_ZSTD, media::OCI_FOREIGN_ZSTD),
            (media::DOCKER_LAYER_GZIP, media::DOCKER_FOREIGN_GZIP),
        ] {
            assert_eq!(
                (media::foreign_type(plain, true), media::foreign_type(foreign, false)),
                (foreign, plain)
            );
            assert_eq!((media::is_foreign(foreign), media::is_foreign(plain)), (true, false));
        }
        assert_eq!(media::foreign_type("application/x", true), "application/x");
        assert_eq!(media::layer_type(media::DOCKER_FOREIGN, true), media::OCI_FOREIGN);
    }
}
