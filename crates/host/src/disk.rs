//! How large a file system is, as `df` sees it, what files take of it, and when it is full.

use rustix::fs::{StatVfs, statvfs};
use shipway_fault::{Fault, Result};
use std::{error::Error, io, os::unix::fs::MetadataExt as _, path::Path};

/// Directories in each other, at most, that [`bytes_of`] looks into.
const MAX_DEPTH: usize = 16;

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

    /// Bytes that are in use.
    pub fn used(&self) -> u64 {
        self.usable.saturating_sub(self.free)
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

/// Bytes that a file, or a directory with all that is in it, takes on the disk; nothing if it
/// cannot be read.
pub fn bytes_of(path: &Path) -> u64 {
    bytes_within(path, MAX_DEPTH)
}

fn bytes_within(path: &Path, depth: usize) -> u64 {
    let Ok(found) = path.symlink_metadata() else { return 0 };
    let mut bytes = found.blocks().saturating_mul(512);
    if found.is_dir() && depth > 0 {
        let entries = path.read_dir().into_iter().flatten().flatten();
        bytes += entries.map(|entry| bytes_within(&entry.path(), depth - 1)).sum::<u64>();
    }
    bytes
}

/// Whether a fault was caused by a disk without space, or by a quota of the file system's.
pub fn is_out_of_space(fault: &Fault) -> bool {
    let mut cause = fault.source();
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            );
        }
        cause = error.source();
    }
    false
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
        assert_eq!(disk.used(), 200 * 4096);
        (found.f_blocks, found.f_bfree, found.f_bavail) = (0, 0, 0);
        assert_eq!(Disk::from(&found).free_percent(), 100, "a file system without blocks");
    }

    #[test]
    fn a_full_disk_is_known_through_all_that_is_said_of_it() {
        let full = Fault::io("write /x", io::ErrorKind::StorageFull.into());
        assert!(is_out_of_space(&full.clone().context("a step").hint("free some space")));
        assert!(is_out_of_space(&Fault::unknown("a copy failed").with_source(full)));
        assert!(!is_out_of_space(&Fault::io("read /x", io::ErrorKind::NotFound.into())));
        assert!(!is_out_of_space(&Fault::unknown("no space left on device")));
    }

    #[test]
    fn files_count_with_what_they_take() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("in")).unwrap();
        let empty = bytes_of(dir.path());
        std::fs::write(dir.path().join("in/file"), vec![1; 100_000]).unwrap();
        std::fs::File::create(dir.path().join("holes")).unwrap().set_len(1 << 30).unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let more = bytes_of(dir.path()) - empty;
        assert!((100_000..200_000).contains(&more), "{more}");
        assert_eq!(bytes_of(&dir.path().join("none")), 0);
    }
}
