//! How large a file system is, as `df` sees it.

use rustix::fs::{StatVfs, statvfs};
use shipway_fault::{Fault, Result};
use std::path::Path;

/// Bytes and inodes of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes that are in use or can be: blocks that the file system reserves for root, or that a
    /// quota takes away, are not counted, so that a share of it means what `df` says.
    pub usable: u64,
    /// Bytes that can be used now.
    pub free: u64,
    /// Inodes; 0 where there is no fixed number of them, as on btrfs.
    pub inodes: u64,
    /// Inodes that can be used now.
    pub free_inodes: u64,
}

impl Disk {
    /// The file system of an existing path.
    pub fn of(path: &Path) -> Result<Self> {
        statvfs(path)
            .map(|found| Self::from(&found))
            .map_err(|e| Fault::io(format!("stat {}", path.display()), e.into()))
    }

    /// Free bytes in percent of the usable ones, rounded down.
    pub fn free_percent(&self) -> u64 {
        self.free.saturating_mul(100).checked_div(self.usable).unwrap_or(100)
    }
}

impl From<&StatVfs> for Disk {
    fn from(found: &StatVfs) -> Self {
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        let used = found.f_blocks.saturating_sub(found.f_bfree);
        Self {
            usable: bytes(used.saturating_add(found.f_bavail)),
            free: bytes(found.f_bavail),
            inodes: found.f_files,
            free_inodes: found.f_favail,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_reserved_is_no_part_of_it() {
        let mut found = statvfs("/").unwrap();
        (found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail) = (4096, 1000, 800, 50);
        let disk = Disk::from(&found);
        assert_eq!((disk.usable, disk.free), (250 * 4096, 50 * 4096));
        assert_eq!(disk.free_percent(), 20);
        (found.f_blocks, found.f_bfree, found.f_bavail) = (0, 0, 0);
        assert_eq!(Disk::from(&found).free_percent(), 100, "a file system without blocks");
    }
}
