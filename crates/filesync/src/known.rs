//! What a directory is known to hold, so that a transfer into it need not look (row
//! `src.local.key`).

use std::{path::Path, sync::Arc};

use shipway_fault::Result;
use shipway_gocompat::{FileKind, FileMode};

use crate::{
    PathFilter, Stat, compare,
    walk::{self, Details, IDENTITY},
};

/// One entry, as far as it matters for whether it changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownEntry {
    /// Path in the tree.
    pub path: Arc<str>,
    /// Type and permissions.
    pub mode: FileMode,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes; meaningless for directories.
    pub size: i64,
    /// Time of modification in nanoseconds.
    pub mtime: i64,
    /// Target of a symbolic link; path of the first name for a hard link; else empty.
    pub link: Box<str>,
    /// Major and minor number of a device.
    pub device: (i64, i64),
    /// What its sender identifies it by besides (see [`crate::FileSyncRequest::identify`]); 0 if
    /// that is not known.
    pub identity: u64,
}

impl KnownEntry {
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            path: stat.path.as_str().into(),
            mode: FileMode(stat.mode),
            uid: stat.uid,
            gid: stat.gid,
            size: stat.size,
            mtime: stat.mod_time,
            link: stat.linkname.as_str().into(),
            device: (stat.devmajor, stat.devminor),
            identity: identity(stat),
        }
    }

    /// Whether `other`, which is sent, describes the same state; what a directory's size and time
    /// say depends on what is in it.
    pub(crate) fn same(&self, other: &Self) -> bool {
        (self.mode.is_dir() || (self.size == other.size && self.mtime == other.mtime))
            && self.mode == other.mode
            && self.uid == other.uid
            && self.gid == other.gid
            && self.device == other.device
            && self.link == other.link
            && (other.identity == 0 || self.identity == other.identity)
    }

    /// Whether it is a file with its own content.
    pub fn has_content(&self) -> bool {
        self.mode.kind() == FileKind::Regular && self.link.is_empty()
    }
}

/// The entries of a directory, in the protocol's order. Cheap to clone.
///
/// Keeping one between transfers requires that nothing else changes the directory meanwhile.
#[derive(Clone, Debug, Default)]
pub struct KnownTree {
    pub(crate) entries: Arc<Vec<KnownEntry>>,
}

impl KnownTree {
    /// Walks `dir`. Blocks.
    pub fn scan(dir: &Path) -> Result<Self> {
        let mut collect = Collect(Vec::new());
        walk::walk(dir, &PathFilter::default(), Details::default(), &mut collect)?;
        Ok(Self { entries: Arc::new(collect.0) })
    }

    /// Walks `dir`, whose files were last seen with these [identities](Self::identities). Blocks.
    pub fn scan_identified(dir: &Path, identities: &[u64]) -> Result<Self> {
        let mut tree = Self::scan(dir)?;
        if tree.len() == identities.len() {
            let entries = Arc::make_mut(&mut tree.entries);
            entries
                .iter_mut()
                .zip(identities)
                .for_each(|(entry, identity)| entry.identity = *identity);
        }
        Ok(tree)
    }

    /// The identity of every entry in order: what a walk does not find out.
    pub fn identities(&self) -> Vec<u64> {
        self.entries.iter().map(|e| e.identity).collect()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is in the directory.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in order.
    pub fn entries(&self) -> &[KnownEntry] {
        &self.entries
    }

    /// The entry at `path`.
    pub fn get(&self, path: &str) -> Option<&KnownEntry> {
        find(&self.entries, path)
    }
}

fn identity(stat: &Stat) -> u64 {
    stat.xattrs.get(IDENTITY).and_then(|v| v[..].try_into().ok()).map_or(0, u64::from_le_bytes)
}

pub(crate) fn find<'a>(entries: &'a [KnownEntry], path: &str) -> Option<&'a KnownEntry> {
    entries.binary_search_by(|e| compare(&e.path, path)).ok().map(|i| &entries[i])
}

struct Collect(Vec<KnownEntry>);

impl walk::Visitor for Collect {
    fn entry(&mut self, stat: Stat) -> Result<()> {
        self.0.push(KnownEntry::of(&stat));
        Ok(())
    }
}
