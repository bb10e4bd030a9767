//! Files that are copied beside the mount in which everything else is copied: straight into the
//! directory that holds what is written, after it was unmounted.
//!
//! Through an overlay every file costs twice the system calls, and the kernel shares the blocks of
//! files (`FICLONE`) within one mount only. A hard link would cost less still, but it shows in
//! the copy: programs refuse files with a second name.

use super::{
    super::{path::RootPath, place::fault},
    data,
};
use parking_lot::Mutex;
use rustix::{
    fd::{AsFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, Mode, OFlags, Stat, Timespec, Timestamps},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_refs::{LocalMount, copy_contents};
use shipway_rootfs::open_beneath;
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
};

/// Files that one thread takes at a time.
const RUN: usize = 128;
const MAX_THREADS: usize = 4;
const ACCESS_ACL: &str = "system.posix_acl_access";
const DEFAULT_ACL: &str = "system.posix_acl_default";

/// What one copy does beside its mount.
pub struct Beside {
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

impl Beside {
    /// From the directory `source` to the directory `target`, if both are in one file system.
    pub fn between(source: LocalMount, target: PathBuf) -> Result<Option<Self>> {
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
        let mut noted = self.noted.lock();
        (noted.from, noted.to) = (from.clone(), to.clone());
        self
    }

    /// Notes the file at `path`, below what is copied and below the copy; empty for what is copied
    /// itself.
    pub(super) fn add(&self, path: &Path) {
        let mut noted = self.noted.lock();
        match (path.parent(), path.file_name()) {
            (Some(dir), Some(name)) => match noted.names.get_mut(dir) {
                Some(names) => names.push(name.to_owned()),
                None => drop(noted.names.insert(dir.to_owned(), vec![name.to_owned()])),
            },
            _ => noted.itself = true,
        }
    }

    /// Copies what was noted, as long as `go_on` says that it is wanted.
    pub fn copy(self, go_on: &(dyn Fn() -> bool + Sync)) -> Result<()> {
        let Noted { from, to, names, itself } = self.noted.into_inner();
        let open_both = |from: &RootPath, to: &RootPath| {
            Ok::<_, Fault>((open(&self.source, from)?, open(&self.target, to)?))
        };
        if itself {
            let (source, target) = open_both(&from.parent(), &to.parent())?;
            let place = Place::of(&target);
            let copied = place.and_then(|p| {
                one(source.as_fd(), from.name(), target.as_fd(), to.name(), &p, go_on)
            });
            copied.map_err(|e| fault("copy", &to, e))?;
        }
        // What its directories are like is asked before anything is made in them: several threads
        // may be at work in one.
        let mut runs = Vec::new();
        for (dir, names) in &names {
            let shown = to.join(dir);
            let place = open(&self.target, &shown)
                .and_then(|fd| Place::of(&fd).map_err(|e| fault("stat", &shown, e)))?;
            runs.extend(names.chunks(RUN).map(|names| (dir, place.clone(), names)));
        }
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some((dir, place, names)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let shown = to.join(dir);
                let (source, target) = open_both(&from.join(dir), &shown)?;
                for name in *names {
                    let copied = one(source.as_fd(), name, target.as_fd(), name, place, go_on);
                    copied.map_err(|e| {
                        if e == Errno::CANCELED {
                            Fault::cancelled()
                        } else {
                            fault("copy", &shown.join(name), e)
                        }
                    })?;
                }
                rustix::fs::futimens(&target, &place.times)
                    .map_err(|e| fault("copy", &shown, e))?;
            }
            Ok::<_, Fault>(())
        };
        let threads = std::thread::available_parallelism()
            .map_or(1, |n| n.get())
            .clamp(2, MAX_THREADS)
            .min(runs.len());
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut done = work();
            for other in others {
                let theirs = other
                    .join()
                    .map_err(|_| Fault::internal("a thread that copies files panicked"));
                done = done.and(theirs.flatten());
            }
            done
        })
    }
}

/// What a directory of the copy is like.
#[derive(Clone)]
struct Place {
    times: Timestamps,
    /// Whether what is made in it inherits an access control list, which copies must not.
    inherits: bool,
}

impl Place {
    fn of(dir: &OwnedFd) -> rustix::io::Result<Self> {
        let inherits = rustix::fs::fgetxattr(dir, DEFAULT_ACL, &mut [0_u8; 0]).is_ok();
        Ok(Self { times: times(&rustix::fs::fstat(dir)?), inherits })
    }
}

/// The directory `path` below `root`, reached through directories only.
fn open(root: &OwnedFd, path: &RootPath) -> Result<OwnedFd> {
    let below = path.below(&RootPath::default()).filter(|p| !p.is_empty()).unwrap_or(".".as_ref());
    open_beneath(root, below.as_bytes(), OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|e| fault("open", path, e))
}

/// Copies one file with all that it has.
fn one(
    from: BorrowedFd<'_>,
    name: &OsStr,
    to: BorrowedFd<'_>,
    new: &OsStr,
    place: &Place,
    go_on: &dyn Fn() -> bool,
) -> rustix::io::Result<()> {
    if !go_on() {
        return Err(Errno::CANCELED);
    }
    let (file, stat) = data::open_regular(from, name)?.ok_or(Errno::INVAL)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let make = || rustix::fs::openat(to, new, flags, mode & Mode::from_raw_mode(0o777));
    let made = match make() {
        Err(Errno::EXIST) => {
            // What was removed in a lower layer is marked as such.
            rustix::fs::unlinkat(to, new, AtFlags::empty())?;
            make()?
        }
        made => made?,
    };
    copy_contents(file.as_fd(), made.as_fd(), &stat, go_on)?;
    if place.inherits {
        match rustix::fs::fremovexattr(&made, ACCESS_ACL) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
            Err(e) => return Err(e),
        }
    }
    data::adopt(made.as_fd(), stat.st_uid, stat.st_gid, mode)?;
    data::xattrs(file.as_fd(), made.as_fd());
    // Whole seconds, as the layer will have it: it need not be set again when that is made.
    let mut times = times(&stat);
    times.last_modification.tv_nsec = 0;
    rustix::fs::futimens(&made, &times)
}

#[allow(clippy::unnecessary_cast)]
fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}
