//! What came of packing a layer.

use crate::{Loss, Tar};
use shipway_oci::{DiffId, Digest};
use std::collections::BTreeMap;

/// What came of hashing a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// The tar.
    pub tar: Tar,
    /// What unpacking it does not give back.
    pub loss: Option<Loss>,
}

/// What came of packing a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// The tar.
    pub tar: Tar,
    /// Digest of the compressed bytes.
    pub digest: Digest,
    /// Length of the compressed bytes.
    pub size: u64,
    /// What unpacking it does not give back, where it was made of a tree.
    pub loss: Option<Loss>,
    /// Its table of contents, where it was to have one.
    pub indexed: Option<Indexed>,
}

impl Packed {
    /// Digest of the tar that the blob holds: the one it was made of, unless a table of contents is
    /// a part of it.
    pub fn diff_id(&self) -> DiffId {
        self.indexed.as_ref().map_or(self.tar.diff_id, |indexed| indexed.diff_id)
    }
}

/// What a layer has besides its bytes if it has a table of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexed {
    /// Digest of the tar that the blob holds: in eStargz not that of the layer it was made of.
    pub diff_id: DiffId,
    /// What the manifest must say of the layer, so that the table is found and believed.
    pub annotations: BTreeMap<String, String>,
}
