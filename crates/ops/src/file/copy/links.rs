//! Files that become part of the copy by another name, when their source never changes and nothing of them does.
//!
//! The kernel links within one mount only, so this happens beside the mount in which everything else is copied: in the directory that
//! holds what is written, after it was unmounted.

use super::{
    super::{path::RootPath, place::fault},
    data,
};
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_refs::LocalMount;
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Directories that are worth a second thread.
const WORTH_THREADS: usize = 64;

/// What one copy links.
pub(in super::super) struct Links {
    source: OwnedFd,
    target: OwnedFd,
    /// Keeps the source in its place.
    _mount: LocalMount,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    from: RootPath,
    to: RootPath,
    /// Names by directory, below both.
    names: BTreeMap<PathBuf, Vec<OsString>>,
    /// The one file that the copy is of.
    itself: bool,
}

impl Links {
    /// From the directory `source` to the directory `target`, if the kernel links between them.
    pub(in super::super) fn between(source: LocalMount, target: PathBuf) -> Result<Option<Self>> {
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let fd = rustix::fs::open(path, flags, Mode::empty());
            fd.map_err(|e| Fault::io(format!("open {}", path.display()), e.into()))
        };
        let (from, to) = (open(source.path())?, open(&target)?);
        let device = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| s.st_dev);
        if device(&from) != device(&to) {
            return Ok(None);
        }
        Ok(Some(Self { source: from, target: to, _mount: source, noted: Mutex::default() }))
    }

    /// The same for a copy of `from` to `to`.
    pub(super) fn of(&self, from: &RootPath, to: &RootPath) -> &Self {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        (noted.from, noted.to) = (from.clone(), to.clone());
        self
    }

    /// Notes the file at `path`, below what is copied and below the copy; empty for what is copied itself.
    pub(super) fn add(&self, path: &Path) {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        match (path.parent(), path.file_name()) {
            (Some(dir), Some(name)) => match noted.names.get_mut(dir) {
                Some(names) => names.push(name.to_owned()),
                None => drop(noted.names.insert(dir.to_owned(), vec![name.to_owned()])),
            },
            _ => noted.itself = true,
        }
    }

    /// Makes the links.
    pub(in super::super) fn make(self) -> Result<()> {
        let noted = self.noted.into_inner().unwrap_or_else(PoisonError::into_inner);
        if noted.itself {
            let (from, to) = (open(&self.source, &noted.from.parent())?, open(&self.target, &noted.to.parent())?);
            link(from.as_fd(), noted.from.name(), to.as_fd(), noted.to.name()).map_err(|e| fault("copy", &noted.to, e))?;
        }
        let all: Vec<_> = noted.names.into_iter().collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((dir, names)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                let shown = noted.to.join(dir);
                let (from, to) = (open(&self.source, &noted.from.join(dir))?, open(&self.target, &shown)?);
                in_directory(from.as_fd(), to.as_fd(), names).map_err(|e| fault("copy", &shown, e))?;
            }
            Ok::<_, Fault>(())
        };
        if all.len() < WORTH_THREADS {
            return work();
        }
        std::thread::scope(|scope| {
            let other = scope.spawn(work);
            let mine = work();
            let theirs = other.join().map_err(|_| Fault::internal("a thread that links files panicked"));
            mine.and(theirs.flatten())
        })
    }
}

/// The directory `path` below `root`, reached through directories only.
fn open(root: &OwnedFd, path: &RootPath) -> Result<OwnedFd> {
    let below = path.below(&RootPath::default()).filter(|p| !p.is_empty()).unwrap_or(".".as_ref());
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(root, below, flags, Mode::empty(), resolve).map_err(|e| fault("open", path, e))
}

/// Links `names`; the directory keeps its times.
fn in_directory(from: BorrowedFd<'_>, to: BorrowedFd<'_>, names: &[OsString]) -> rustix::io::Result<()> {
    let before = rustix::fs::fstat(to)?;
    names.iter().try_for_each(|name| link(from, name, to, name))?;
    rustix::fs::futimens(to, &times(&before))
}

/// Links one file, or copies it if it has all the names that it can have.
fn link(from: BorrowedFd<'_>, name: &OsStr, to: BorrowedFd<'_>, new: &OsStr) -> rustix::io::Result<()> {
    let make = || rustix::fs::linkat(from, name, to, new, AtFlags::empty());
    match make() {
        Err(Errno::EXIST) => {
            // What was removed in a lower layer is marked as such.
            rustix::fs::unlinkat(to, new, AtFlags::empty())?;
            make()
        }
        Err(Errno::MLINK) => copied(from, name, to, new),
        made => made,
    }
}

/// A copy that is like a link would have been.
fn copied(from: BorrowedFd<'_>, name: &OsStr, to: BorrowedFd<'_>, new: &OsStr) -> rustix::io::Result<()> {
    let (file, stat) = data::open_regular(from, name)?.ok_or(Errno::INVAL)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let made = rustix::fs::openat(to, new, flags, Mode::from_raw_mode(0o600))?;
    data::copy(file.as_fd(), made.as_fd(), &stat, &|| true)?;
    rustix::fs::fchown(&made, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    rustix::fs::fchmod(&made, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    data::xattrs(file.as_fd(), made.as_fd());
    rustix::fs::futimens(&made, &times(&stat))
}

#[allow(clippy::unnecessary_cast)]
fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}
