//! What those who read or write tars tell about an entry, and the two headers that this crate
//! writes itself.

use crate::toc::{self, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME, Time};

/// Bytes of a block of tar.
pub(crate) const BLOCK: usize = 512;

/// An entry of a tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// Path as the archive has it.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: TarKind,
    /// Permission bits with set-uid, set-gid and sticky; others count for nothing.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change.
    pub mtime: Time,
    /// Extended attributes: names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry of a tar is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarKind {
    /// A directory.
    Directory,
    /// A file with so many bytes.
    File(u64),
    /// A symbolic link to the target.
    Symlink(Vec<u8>),
    /// Another name of the entry at the path.
    HardLink(Vec<u8>),
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A kind that layers do not have, by its byte in the header.
    Other(u8),
}

impl TarEntry {
    /// Whether it is one of the files that the format adds to a layer: a landmark or a table of
    /// contents. Who converts a layer that has them leaves them out.
    pub fn is_of_format(&self) -> bool {
        let mut path = Vec::new();
        matches!(self.kind, TarKind::File(_))
            && toc::clean(&self.path, &mut path).is_ok()
            && is_reserved(&path)
    }
}

fn is_reserved(path: &[u8]) -> bool {
    [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK, TOC_NAME].iter().any(|name| path == name.as_bytes())
}

/// The header of a file that the format adds: of root, from 1970, without permissions, as other
/// writers have it.
pub(crate) fn own_header(name: &str, size: u64) -> [u8; BLOCK] {
    let mut h = [0; BLOCK];
    h[..name.len()].copy_from_slice(name.as_bytes());
    for field in [100..108, 108..116, 116..124] {
        h[field].copy_from_slice(b"0000000\0");
    }
    // Far below the 8 GiB that the field holds: tables have a largest size.
    h[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    h[136..148].copy_from_slice(b"00000000000\0");
    h[148..156].fill(b' ');
    h[156] = b'0';
    h[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    h
}

/// Zeros that fill `size` bytes up to a whole block.
pub(crate) fn padding(size: u64) -> usize {
    (BLOCK - (size % BLOCK as u64) as usize) % BLOCK
}
