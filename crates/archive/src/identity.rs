//! The identity of a layer: of the tar that its files make.

use shipway_fault::{Code, Fault, Result};
use shipway_oci::{DiffId, Hasher};

/// Identity of a layer's tar.
#[derive(Clone, Debug)]
pub struct Tar {
    /// Its digest.
    pub diff_id: DiffId,
    /// Its length.
    pub size: u64,
    /// Its CRC-32, the one of gzip. Taking it costs next to nothing, and it notices what happens to
    /// files that must not change.
    pub crc: u32,
    /// What made the digest, for what comes behind the tar in some formats.
    pub(crate) hasher: Hasher,
}

impl PartialEq for Tar {
    fn eq(&self, other: &Self) -> bool {
        (self.diff_id, self.size, self.crc) == (other.diff_id, other.size, other.crc)
    }
}

impl Eq for Tar {}

impl Tar {
    /// An error if it is not the one that was `known`.
    pub(crate) fn check(&self, known: Option<&Tar>) -> Result<()> {
        if known.is_none_or(|known| known == self) {
            return Ok(());
        }
        Err(Fault::new(
            Code::FailedPrecondition,
            "the files of the layer are not what they were when it was committed",
        )
        .hint("something wrote to the snapshot behind containerd's back: prune it and build again"))
    }
}
