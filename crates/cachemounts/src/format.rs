//! The documents of an artifact, with their bounds.

use crate::keys::MAX_SIZE;
use serde::{Deserialize, Serialize};
use shipway_fault::{Fault, Result};
use shipway_oci::{Descriptor, Digest, Manifest, media};
use std::collections::BTreeMap;

/// Type of the artifact.
pub const ARTIFACT: &str = "application/vnd.shipway.cache-mounts.v1";
/// Type of its config, which lists cache mounts.
pub const INDEX: &str = "application/vnd.shipway.cache-mounts.index.v1+json";
/// Type of a list of files.
pub const TREE: &str = "application/vnd.shipway.cache-mounts.tree.v1+zstd";
/// Type of a blob of chunks.
pub const PACK: &str = "application/vnd.shipway.cache-mounts.pack.v1+zstd";

/// Largest manifest, and largest config.
pub const MAX_DOCUMENT: u64 = 4 << 20;
/// Most cache mounts of an artifact.
pub(crate) const MAX_MOUNTS: usize = 256;
/// Longest id of a cache mount.
pub(crate) const MAX_ID: usize = 1024;
/// Most packs of a cache mount.
pub(crate) const MAX_PACKS: usize = 1 << 13;
/// Most bytes of chunks in a pack.
pub(crate) const MAX_PACK: u64 = 8 << 20;
/// Longest compressed pack. What does not become shorter becomes a little longer.
pub(crate) const MAX_PACK_BLOB: u64 = MAX_PACK + (1 << 16);
/// Longest compressed tree.
pub(crate) const MAX_TREE_BLOB: u64 = 128 << 20;

/// When an artifact was made (OCI image-spec).
pub(crate) const CREATED: &str = "org.opencontainers.image.created";
const VERSION: u32 = 1;

/// A blob of an artifact; what it is follows from where it is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Blob {
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Bytes of what is compressed in it.
    pub length: u64,
}

impl Blob {
    pub fn descriptor(&self, media_type: &str) -> Descriptor {
        Descriptor::new(media_type, self.digest, self.size)
    }
}

/// What is known of a cache mount without its tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MountRecord {
    /// When it was saved.
    pub saved: String,
    /// Regular files.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    pub tree: Blob,
    pub packs: Vec<Blob>,
}

/// The config of an artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Index {
    version: u32,
    pub mounts: BTreeMap<String, MountRecord>,
}

impl Default for Index {
    fn default() -> Self {
        Self { version: VERSION, mounts: BTreeMap::new() }
    }
}

fn invalid(why: impl std::fmt::Display) -> Fault {
    Fault::invalid(format!("the saved cache mounts cannot be read: {why}"))
}

impl Index {
    /// Reads and checks a config.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(bytes).map_err(invalid)?;
        if version != VERSION {
            return Err(invalid(format!("they are of version {version}, and not {VERSION}"))
                .hint("save them again, or use the version of Shipway that saved them"));
        }
        let index: Self = serde_json::from_slice(bytes).map_err(invalid)?;
        if index.mounts.len() > MAX_MOUNTS {
            return Err(invalid(format!("there are more than {MAX_MOUNTS} mounts")));
        }
        for (id, mount) in &index.mounts {
            let shown: String = id.chars().take(100).collect();
            let wrong = |why: &str| Err(invalid(format!("mount {shown:?} {why}")));
            if id.is_empty() || id.len() > MAX_ID {
                return wrong("has no valid id");
            }
            if mount.packs.len() > MAX_PACKS {
                return wrong("has too many packs");
            }
            if mount.packs.iter().any(|p| p.length > MAX_PACK || p.size > MAX_PACK_BLOB) {
                return wrong("has a pack that is too large");
            }
            if mount.tree.size > MAX_TREE_BLOB {
                return wrong("has a list of files that is too large");
            }
            if mount.bytes > MAX_SIZE {
                return wrong("is too large");
            }
        }
        Ok(index)
    }

    /// The config as bytes, and the manifest that names it and all blobs.
    pub fn encode(&self, created: &str) -> Result<(Vec<u8>, Vec<u8>)> {
        let failed = |e| Fault::internal(format!("encode a manifest: {e}"));
        let config = serde_json::to_vec(self).map_err(failed)?;
        let mut layers: Vec<Descriptor> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for mount in self.mounts.values() {
            let trees = std::iter::once(mount.tree.descriptor(TREE));
            let packs = mount.packs.iter().map(|pack| pack.descriptor(PACK));
            layers.extend(trees.chain(packs).filter(|blob| seen.insert(blob.digest)));
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media::OCI_MANIFEST.to_owned()),
            artifact_type: Some(ARTIFACT.to_owned()),
            config: Descriptor::of(INDEX, &config),
            layers,
            subject: None,
            annotations: BTreeMap::from([(CREATED.to_owned(), created.to_owned())]),
        };
        let manifest = serde_json::to_vec(&manifest).map_err(failed)?;
        for (what, bytes) in [("the list of mounts", &config), ("the manifest", &manifest)] {
            if bytes.len() as u64 > MAX_DOCUMENT {
                return Err(Fault::invalid(format!(
                    "{what} has {} bytes, more than {MAX_DOCUMENT}",
                    bytes.len()
                ))
                .hint("save fewer cache mounts, or limit them with max-size"));
            }
        }
        Ok((config, manifest))
    }
}

/// Reads a manifest and checks that it is one of ours.
pub(crate) fn manifest(bytes: &[u8]) -> Result<Manifest> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        artifact_type: Option<String>,
    }
    // An index has no config, and is refused in the same words.
    let Kind { artifact_type } = serde_json::from_slice(bytes).map_err(invalid)?;
    if artifact_type.as_deref() != Some(ARTIFACT) {
        return Err(invalid("there is something else under this name")
            .hint("give cache mounts a repository or a name of their own"));
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(invalid)?;
    if manifest.config.media_type != INDEX {
        return Err(invalid(format!("its config is of type {:?}", manifest.config.media_type)));
    }
    if manifest.config.size > MAX_DOCUMENT {
        return Err(invalid(format!("its config has more than {MAX_DOCUMENT} bytes")));
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(size: u64, length: u64) -> Blob {
        Blob { digest: Digest::of("b"), size, length }
    }

    fn record() -> MountRecord {
        let (tree, packs) = (blob(1, 1), vec![blob(2, 2)]);
        MountRecord { saved: String::new(), files: 1, bytes: 2, tree, packs }
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Index), why: &str) {
        let mut index = Index::default();
        index.mounts.insert("m".into(), record());
        change(&mut index);
        let said = Index::decode(&serde_json::to_vec(&index).expect("JSON"));
        let said = said.expect_err("it is refused").to_string();
        assert!(said.contains(why), "{said}");
    }

    #[test]
    fn an_index_is_read_as_it_was_written_and_bounded() {
        let mut index = Index::default();
        index.mounts.insert("m".into(), record());
        let (config, bytes) = index.encode("2026-01-01T00:00:00Z").expect("encodes");
        assert_eq!(Index::decode(&config).expect("decodes"), index);
        let read = manifest(&bytes).expect("a manifest");
        assert_eq!(read.config.digest, Digest::of(&config));
        // Tree and pack have one digest here, and a blob is named once.
        assert_eq!(read.layers.len(), 1);
        refused(|i| i.version = 2, "version 2");
        refused(|i| i.mounts.values_mut().for_each(|m| m.bytes = MAX_SIZE + 1), "is too large");
        refused(
            |i| i.mounts.values_mut().for_each(|m| m.packs[0] = blob(1, MAX_PACK + 1)),
            "a pack that is too large",
        );
        refused(
            |i| i.mounts.values_mut().for_each(|m| m.packs[0] = blob(MAX_PACK_BLOB + 1, 1)),
            "a pack that is too large",
        );
        refused(
            |i| i.mounts.values_mut().for_each(|m| m.tree = blob(MAX_TREE_BLOB + 1, 1)),
            "a list of files that is too large",
        );
        refused(
            |i| i.mounts.values_mut().for_each(|m| m.packs = vec![blob(1, 1); MAX_PACKS + 1]),
            "too many packs",
        );
        refused(|i| _ = i.mounts.insert("x".repeat(MAX_ID + 1), record()), "no valid id");
        refused(
            |i| i.mounts.extend((0..MAX_MOUNTS).map(|n| (n.to_string(), record()))),
            "more than",
        );
    }

    #[test]
    fn what_is_not_ours_is_not_read() {
        let config = r#"{"mediaType":"m","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}"#;
        for (other, words) in [
            (format!("\"config\":{config},\"layers\":[]"), "something else"),
            ("\"manifests\":[]".to_owned(), "something else"),
            (
                format!("\"artifactType\":\"{ARTIFACT}\",\"config\":{config},\"layers\":[]"),
                "of type \"m\"",
            ),
        ] {
            let other = format!("{{\"schemaVersion\":2,{other}}}");
            let said = manifest(other.as_bytes()).expect_err("it is refused").to_string();
            assert!(said.contains(words), "{said}");
        }
        assert!(manifest(b"[").is_err());
        assert!(Index::decode(b"{}").is_err());
    }
}
