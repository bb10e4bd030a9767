//! Walking a directory in the protocol's order, through a filter.

use std::{
    collections::HashMap,
    fs::{self, DirEntry, Metadata},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::io::Errno;
use shipway_fault::{Fault, Result};
use shipway_gocompat::{FileKind, FileMode};

use crate::{DirMatch, PathFilter, Stat, Verdict, path::join};

/// Name under which a file's identity is sent among its extended attributes. No file system has
/// such an attribute.
pub(crate) const IDENTITY: &str = "shipway.identity";

/// What a map function decides about an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// Send it.
    Keep,
    /// Leave it out.
    Exclude,
    /// Leave it out and what is below it; for a file, the rest of its directory.
    SkipDir,
}

/// Receives the entries of a walk; an error ends it.
pub(crate) trait Visitor {
    /// Sees an entry's stat before it counts, and may change or refuse it.
    fn map(&mut self, _stat: &mut Stat) -> Mapped {
        Mapped::Keep
    }
    /// Takes an entry.
    fn entry(&mut self, stat: Stat) -> Result<()>;
}

struct Frame {
    path: String,
    entries: std::vec::IntoIter<DirEntry>,
    matched: DirMatch,
    /// The directory's own entry, while nothing below it has needed it.
    waiting: Option<Metadata>,
}

struct Walk<'a, V> {
    root: &'a Path,
    filter: &'a PathFilter,
    visitor: &'a mut V,
    frames: Vec<Frame>,
    inodes: HashMap<(u64, u64), String>,
    details: Details,
}

/// What a listing has of an entry besides the ordinary.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Details {
    /// Extended attributes.
    pub(crate) xattrs: bool,
    /// What distinguishes files of equal size and time.
    pub(crate) identities: bool,
}

/// Walks what is in `root`, which must be a directory. Entries that vanish meanwhile are left out.
pub(crate) fn walk(
    root: &Path,
    filter: &PathFilter,
    details: Details,
    visitor: &mut impl Visitor,
) -> Result<()> {
    let entries =
        list(root).map_err(|e| Fault::io(format!("read directory {}", root.display()), e))?;
    let frame = Frame { path: String::new(), entries, matched: DirMatch::default(), waiting: None };
    Walk { root, filter, visitor, frames: vec![frame], inodes: HashMap::new(), details }.run()
}

impl<V: Visitor> Walk<'_, V> {
    fn run(&mut self) -> Result<()> {
        while let Some(frame) = self.frames.last_mut() {
            let Some(entry) = frame.entries.next() else {
                self.frames.pop();
                continue;
            };
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                let shown = join(&frame.path, &name.to_string_lossy());
                // Only a name that would be sent matters; the filter decides on what can be shown
                // of it.
                if self.filter.visit(&shown, false, &frame.matched).0 == Verdict::Keep {
                    return Err(Fault::invalid(format!(
                        "file name {shown:?} is not UTF-8 and cannot be sent"
                    ))
                    .hint("rename it, or exclude it in .dockerignore"));
                }
                continue;
            };
            let path = join(&frame.path, name);
            match self.step(path.clone(), &entry) {
                Err(Step::Io(e)) if vanished(&e) => {}
                Err(Step::Io(e)) => {
                    return Err(Fault::io(format!("open {}", self.root.join(path).display()), e));
                }
                Err(Step::Fault(fault)) => return Err(fault),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn step(&mut self, path: String, entry: &DirEntry) -> Result<(), Step> {
        let is_dir = entry.file_type()?.is_dir();
        let (verdict, matched) = match self.frames.last() {
            Some(frame) if !self.filter.is_empty() => {
                self.filter.visit(&path, is_dir, &frame.matched)
            }
            _ => (Verdict::Keep, DirMatch::default()),
        };
        if verdict == Verdict::Prune || (verdict == Verdict::Pass && !is_dir) {
            return Ok(());
        }
        let meta = entry.metadata()?;
        let mut waiting = None;
        if verdict == Verdict::Keep {
            let mut stat = self.stat(&path, &meta)?;
            match self.visitor.map(&mut stat) {
                Mapped::Keep => {
                    if self.give_parents()? {
                        self.give(stat, &meta)?;
                    } else {
                        return Ok(());
                    }
                }
                Mapped::Exclude => waiting = is_dir.then(|| meta.clone()),
                Mapped::SkipDir if is_dir => return Ok(()),
                Mapped::SkipDir => {
                    self.frames.pop();
                    return Ok(());
                }
            }
        } else {
            waiting = Some(meta.clone());
        }
        if is_dir {
            let entries = match list(&self.root.join(&path)) {
                // What is filtered away need not be readable.
                Err(e) if e.kind() == ErrorKind::PermissionDenied && verdict != Verdict::Keep => {
                    return Ok(());
                }
                entries => entries?,
            };
            self.frames.push(Frame { path, entries, matched, waiting });
        }
        Ok(())
    }

    /// Gives the directories above the current entry that have not been given; false if the visitor
    /// skips one of them.
    fn give_parents(&mut self) -> Result<bool, Step> {
        for i in 0..self.frames.len() {
            let Some(meta) = self.frames[i].waiting.take() else { continue };
            let path = self.frames[i].path.clone();
            let mut stat = self.stat(&path, &meta)?;
            match self.visitor.map(&mut stat) {
                Mapped::Keep => self.give(stat, &meta)?,
                Mapped::Exclude => self.frames[i].waiting = Some(meta),
                Mapped::SkipDir => {
                    self.frames.truncate(i);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn give(&mut self, mut stat: Stat, meta: &Metadata) -> Result<(), Step> {
        // Only what was given can be linked to, so that a filter never leaves a link without its
        // target.
        if meta.nlink() > 1 && !meta.is_dir() && FileMode(stat.mode).kind() != FileKind::Symlink {
            let key = (meta.dev(), meta.ino());
            match self.inodes.get(&key) {
                Some(first) => {
                    stat.linkname.clone_from(first);
                    stat.size = 0;
                }
                None => _ = self.inodes.insert(key, stat.path.clone()),
            }
        }
        if self.details.identities && meta.is_file() && stat.linkname.is_empty() {
            stat.xattrs.insert(IDENTITY.to_owned(), identity(meta).to_le_bytes().to_vec());
        }
        self.visitor.entry(stat).map_err(Step::Fault)
    }

    fn stat(&self, path: &str, meta: &Metadata) -> io::Result<Stat> {
        stat(path, &self.root.join(path), meta, self.details.xattrs)
    }
}

/// A number that another file, or the same one after a change, does not have, whatever its size and
/// time were set to.
fn identity(meta: &Metadata) -> u64 {
    let mut hasher = DefaultHasher::new();
    (meta.dev(), meta.ino(), meta.ctime(), meta.ctime_nsec()).hash(&mut hasher);
    hasher.finish().max(1)
}

enum Step {
    Io(io::Error),
    Fault(Fault),
}

impl From<io::Error> for Step {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

fn vanished(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

fn list(path: &Path) -> io::Result<std::vec::IntoIter<DirEntry>> {
    let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_cached_key(|e| e.file_name());
    Ok(entries.into_iter())
}

/// The protocol's description of the file at `full`, called `path`, without regard to hard links.
pub(crate) fn stat(path: &str, full: &Path, meta: &Metadata, xattrs: bool) -> io::Result<Stat> {
    let mode = FileMode::from_unix(meta.mode());
    let mut stat = Stat {
        path: path.to_owned(),
        mode: mode.0,
        uid: meta.uid(),
        gid: meta.gid(),
        mod_time: meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec()),
        ..Default::default()
    };
    match mode.kind() {
        FileKind::Directory => {}
        FileKind::Symlink => {
            let target = fs::read_link(full)?;
            stat.linkname = target
                .to_str()
                .map(str::to_owned)
                .ok_or_else(|| io::Error::other("link target is not UTF-8"))?;
            stat.size = i64::try_from(meta.size()).unwrap_or(i64::MAX);
        }
        kind => {
            stat.size = i64::try_from(meta.size()).unwrap_or(i64::MAX);
            if matches!(kind, FileKind::CharDevice | FileKind::BlockDevice) {
                stat.devmajor = rustix::fs::major(meta.rdev()).into();
                stat.devminor = rustix::fs::minor(meta.rdev()).into();
            }
        }
    }
    if xattrs {
        load_xattrs(full, &mut stat)?;
    }
    Ok(stat)
}

fn load_xattrs(full: &Path, stat: &mut Stat) -> io::Result<()> {
    // Two calls only for files that have any: the first asks for the size.
    let size = match rustix::fs::llistxattr_query(full) {
        Ok(0) | Err(Errno::NOTSUP | Errno::PERM | Errno::ACCESS) => return Ok(()),
        Ok(size) => size,
        Err(e) => return Err(e.into()),
    };
    let mut names = vec![0u8; size + 256];
    let Ok(size) = rustix::fs::llistxattr(full, &mut names[..]) else { return Ok(()) };
    for name in names[..size].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let Ok(name) = std::str::from_utf8(name) else { continue };
        if name.starts_with("com.apple.") {
            continue;
        }
        let mut value = vec![0u8; 64 << 10];
        if let Ok(size) = rustix::fs::lgetxattr(full, name, &mut value[..]) {
            value.truncate(size);
            stat.xattrs.insert(name.to_owned(), value);
        }
    }
    Ok(())
}

/// The real path of a directory to walk.
pub(crate) fn resolve_root(root: &Path) -> Result<PathBuf> {
    let failed = |e| Fault::io(format!("resolve {}", root.display()), e);
    let root = fs::canonicalize(root).map_err(failed)?;
    if !fs::metadata(&root).map_err(failed)?.is_dir() {
        return Err(Fault::invalid(format!("{} is not a directory", root.display())));
    }
    Ok(root)
}
