//! What manifests say about indexed layers, in the annotations of a layer's descriptor.

use crate::{Error, Layout, Result, error::Shown, footer::zstd_layout};
use shipway_oci::Digest;
use std::collections::BTreeMap;

/// Digest of the uncompressed table of contents (stargz-snapshotter, docs/estargz.md). containerd
/// hands it to snapshotters as a label.
pub const TOC_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Length of the layer's tar, uncompressed.
pub const UNCOMPRESSED_SIZE: &str = "io.containers.estargz.uncompressed-size";
/// Digest of the compressed table of contents (containers/storage, zstd:chunked).
pub const PODMAN_CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";
/// Place of the table of contents: offset, length, uncompressed length, type, with colons between.
pub const PODMAN_POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";
/// Place of the tar-split: offset, length, uncompressed length.
pub const PODMAN_TAR_SPLIT: &str = "io.github.containers.zstd-chunked.tarsplit-position";
/// [`PODMAN_CHECKSUM`] as stargz-snapshotter spells it.
pub const STARGZ_CHECKSUM: &str = "io.containers.zstd-chunked.manifest-checksum";
/// [`PODMAN_POSITION`] as stargz-snapshotter spells it.
pub const STARGZ_POSITION: &str = "io.containers.zstd-chunked.manifest-position";

/// The digest that a table of contents must have, by which bytes it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TocDigest {
    /// Of the JSON.
    Json(Digest),
    /// Of the compressed bytes, as in the blob.
    Compressed(Digest),
}

/// What the annotations of a layer say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Annotated {
    /// Digest of the table of contents; without one nothing in it may be believed.
    pub toc_digest: TocDigest,
    /// Length of the layer's tar, uncompressed.
    pub uncompressed_size: Option<u64>,
    /// Numbers of [`PODMAN_POSITION`] and [`PODMAN_TAR_SPLIT`].
    position: Option<([u64; 4], Option<[u64; 3]>)>,
}

impl Annotated {
    /// Reads a layer's annotations; `None` if they have no digest of a table of contents.
    pub fn read(annotations: &BTreeMap<String, String>) -> Result<Option<Self>> {
        let get = |key: &'static str| annotations.get(key).map(|value| (key, value.as_str()));
        let digest = |(key, value): (&'static str, &str)| {
            value.parse::<Digest>().map_err(|_| invalid(key, value))
        };
        let toc_digest =
            match (get(TOC_DIGEST), get(PODMAN_CHECKSUM).or_else(|| get(STARGZ_CHECKSUM))) {
                (Some(json), _) => TocDigest::Json(digest(json)?),
                (None, Some(compressed)) => TocDigest::Compressed(digest(compressed)?),
                (None, None) => return Ok(None),
            };
        let toc = get(PODMAN_POSITION)
            .or_else(|| get(STARGZ_POSITION))
            .map(|(k, v)| numbers(k, v))
            .transpose()?;
        let tar_split = get(PODMAN_TAR_SPLIT).map(|(k, v)| numbers(k, v)).transpose()?;
        let size = get(UNCOMPRESSED_SIZE).map(|(k, v)| numbers::<1>(k, v)).transpose()?;
        Ok(Some(Self {
            toc_digest,
            uncompressed_size: size.map(|[n]| n),
            position: toc.map(|toc| (toc, tar_split)),
        }))
    }

    /// The layout of a blob of `size` bytes, where the annotations tell it: then no footer need be
    /// read.
    pub fn layout(&self, size: u64) -> Option<Result<Layout>> {
        self.position.map(|(toc, tar_split)| zstd_layout(toc, tar_split, size))
    }
}

fn invalid(key: &'static str, value: &str) -> Error {
    Error::Annotation { key, value: Shown::new(value.as_bytes()) }
}

fn numbers<const N: usize>(key: &'static str, value: &str) -> Result<[u64; N]> {
    // Signs, which the library takes, are not part of it.
    let number =
        |n: &str| n.parse::<u64>().ok().filter(|_| n.starts_with(|c: char| c.is_ascii_digit()));
    let all: Option<Vec<u64>> = value.split(':').take(N + 1).map(number).collect();
    all.and_then(|all| all.try_into().ok()).ok_or_else(|| invalid(key, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<Annotated>> {
        Annotated::read(&pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn both_dialects_are_read() {
        let (json, compressed) = (Digest::of("json"), Digest::of("compressed"));
        assert_eq!(read(&[(UNCOMPRESSED_SIZE, "5")]).unwrap(), None);
        let stargz = read(&[
            (TOC_DIGEST, &json.to_string()),
            (UNCOMPRESSED_SIZE, "5000"),
            (STARGZ_CHECKSUM, &compressed.to_string()),
            (STARGZ_POSITION, "508:100:700:1"),
        ]);
        let stargz = stargz.unwrap().unwrap();
        assert_eq!(
            (stargz.toc_digest, stargz.uncompressed_size),
            (TocDigest::Json(json), Some(5000))
        );
        assert_eq!(stargz.layout(2000).unwrap().unwrap().toc, Some(508..608));
        assert!(stargz.layout(600).unwrap().is_err());
        let podman = [
            (PODMAN_CHECKSUM, &*compressed.to_string()),
            (PODMAN_POSITION, "508:100:700:1"),
            (PODMAN_TAR_SPLIT, "616:20:90"),
        ];
        let podman = read(&podman).unwrap().unwrap();
        assert_eq!(podman.toc_digest, TocDigest::Compressed(compressed));
        assert_eq!(podman.layout(2000).unwrap().unwrap().tar_split, Some((616..636, 90)));
    }

    #[test]
    fn annotations_that_cannot_be_are_refused() {
        let digest = Digest::of("x").to_string();
        for (key, value) in [
            (TOC_DIGEST, "sha256:12"),
            (TOC_DIGEST, "sha512:00"),
            (PODMAN_POSITION, "1:2:3"),
            (PODMAN_POSITION, "1:2:3:4:5"),
            (PODMAN_POSITION, "+1:2:3:4"),
            (PODMAN_POSITION, "1:2:3:99999999999999999999"),
            (PODMAN_TAR_SPLIT, ""),
            (UNCOMPRESSED_SIZE, "-1"),
        ] {
            let refused = read(&[(PODMAN_CHECKSUM, &digest), (key, value)]);
            assert!(
                matches!(&refused, Err(Error::Annotation { key: named, .. }) if *named == key),
                "{key} {value} {refused:?}"
            );
        }
    }
}
