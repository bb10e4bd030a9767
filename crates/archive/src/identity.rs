//! The identity of a layer: of the tar that its files make.

use shipway_fault::{Code, Fault, Result};
use shipway_oci::DiffId;

/// Identity of a layer's tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tar {
    /// Its digest.
    pub diff_id: DiffId,
    /// Its length.
    pub size: u64,
    /// Its CRC-32, the one of gzip. Taking it costs next to nothing, and it notices what happens to
    /// files that must not change.
    pub crc: u32,
}

impl Tar {
    /// An error if it is not the one that was `known`.
    pub(crate) fn check(&self, known: Option<Tar>) -> Result<()> {
        if known.is_none_or(|known| known == *self) {
            return Ok(());
        }
        Err(Fault::new(
            Code::FailedPrecondition,
            "the files of the layer are not what they were when it was committed",
        )
        .hint("something wrote to the snapshot behind containerd's back: prune it and build again"))
    }
}
