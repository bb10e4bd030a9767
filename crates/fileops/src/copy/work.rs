//! What the threads of a copy do: files, links, devices, FIFOs, and names for what was copied under
//! another.

use super::{
    super::{
        path::RootPath,
        place::{fault, remove_all},
        settings::Settings,
    },
    Beside, data,
    tree::{TargetDir, mode, owner, times},
};
use parking_lot::{Condvar, Mutex};
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{
        AtFlags, FileType, Mode, OFlags, RawMode, Stat, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
    },
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_rootfs::open_beneath;
use std::{
    collections::HashMap,
    ffi::OsString,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    },
};

/// Names that wait until their file is copied; each keeps a directory open.
const MAX_WAITING: usize = 32;

/// What happens to the times of a directory in which something is made.
const NOW: Timestamps = Timestamps {
    last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    last_modification: Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
};

/// Something to copy that is not a directory.
pub(super) struct Job {
    pub(super) source: Arc<OwnedFd>,
    pub(super) name: OsString,
    pub(super) kind: FileType,
    pub(super) target: Arc<TargetDir>,
    pub(super) target_name: OsString,
    /// Relative to the top of the copy; empty for the top itself.
    pub(super) path: PathBuf,
}

/// Device and inode of a file with several names.
type Inode = (u64, u64);

/// Where the first of several names is copied.
enum First {
    /// Not yet whole. These names are to be links to it.
    Copying(Vec<Name>),
    /// Whole, at this path below the top.
    Done(PathBuf),
}

struct Name {
    target: Arc<TargetDir>,
    name: OsString,
    path: PathBuf,
}

/// What to do with one of several names.
enum Claim {
    Copy,
    Link(PathBuf),
    /// Another thread copies the file now, and will make this name.
    Left,
}

/// What the threads of one copy share.
pub(super) struct Work<'a> {
    settings: &'a Settings,
    /// The directory that the copy is made in.
    pub(super) base: Arc<TargetDir>,
    to: &'a RootPath,
    /// Where files are noted that are copied afterwards.
    beside: Option<&'a Beside>,
    lost: AtomicBool,
    /// What a thread failed with.
    failed: Mutex<Option<Fault>>,
    links: Mutex<HashMap<Inode, First>>,
    links_changed: Condvar,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        settings: &'a Settings,
        base: Arc<TargetDir>,
        to: &'a RootPath,
        beside: Option<&'a Beside>,
    ) -> Self {
        Self {
            settings,
            base,
            to,
            beside,
            lost: AtomicBool::new(false),
            failed: Mutex::default(),
            links: Mutex::default(),
            links_changed: Condvar::new(),
        }
    }

    /// The first failure of a thread.
    pub(super) fn failure(&self) -> Option<Fault> {
        self.failed.lock().take()
    }

    /// A path as people are shown it.
    pub(super) fn shown(&self, path: &Path) -> RootPath {
        self.to.join(path)
    }

    fn goes_on(&self) -> bool {
        !self.lost.load(Ordering::Relaxed) && self.settings.check().is_ok()
    }

    /// Whether there is a point in going on.
    pub(super) fn check(&self) -> Result<()> {
        if self.goes_on() { Ok(()) } else { Err(Fault::cancelled()) }
    }

    /// Does jobs until there are no more, or none that make sense.
    pub(super) fn run_all(&self, queue: &Mutex<Receiver<Vec<Job>>>) {
        loop {
            let batch = queue.lock().recv();
            let Ok(batch) = batch else { return };
            // What failed is kept; the others see it.
            let _ = self.run_batch(batch);
        }
    }

    /// Does some jobs.
    pub(super) fn run_batch(&self, batch: Vec<Job>) -> Result<()> {
        batch.iter().try_for_each(|job| self.run(job)).inspect_err(|e| {
            if !self.lost.load(Ordering::Relaxed) {
                self.failed.lock().get_or_insert(e.clone());
            }
            self.lost.store(true, Ordering::Relaxed);
            let _links = self.links.lock();
            self.links_changed.notify_all();
        })
    }

    /// Does one job.
    pub(super) fn run(&self, job: &Job) -> Result<()> {
        self.check()?;
        let failed = |e| fault("copy", &self.shown(&job.path), e);
        if job.kind != FileType::RegularFile {
            return self.special(job);
        }
        if let Some(beside) = self.beside
            && self.leave_for_later(job, beside)?
        {
            return Ok(());
        }
        let (from, stat) = data::open_regular(job.source.as_fd(), &job.name)
            .map_err(failed)?
            .ok_or_else(|| failed(Errno::INVAL))?;
        if stat.st_nlink < 2 || job.path.as_os_str().is_empty() {
            return self.file(job, &from, &stat);
        }
        #[allow(clippy::unnecessary_cast)]
        let inode = (stat.st_dev as u64, stat.st_ino as u64);
        match self.claim(inode, job)? {
            Claim::Left => Ok(()),
            Claim::Link(first) => self.link(&first, &job.target, &job.target_name, &job.path),
            Claim::Copy => {
                self.file(job, &from, &stat)?;
                let before = self.links.lock().insert(inode, First::Done(job.path.clone()));
                self.links_changed.notify_all();
                let Some(First::Copying(names)) = before else { return Ok(()) };
                names.iter().try_for_each(|n| self.link(&job.path, &n.target, &n.name, &n.path))
            }
        }
    }

    /// Notes a file that is the same in the copy as in the source, with one name in both; says
    /// whether it is.
    fn leave_for_later(&self, job: &Job, beside: &Beside) -> Result<bool> {
        let failed = |e| fault("copy", &self.shown(&job.path), e);
        let stat = rustix::fs::statat(&job.source, &job.name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed)?;
        let (uid, gid) = owner(&stat, self.settings);
        let same = (uid.as_raw(), gid.as_raw(), mode(&stat, self.settings))
            == (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777);
        if !same
            || stat.st_nlink != 1
            || FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
        {
            return Ok(false);
        }
        if !job.target.made {
            self.clear(&job.target, &job.target_name, &job.path)?;
            // A directory that only a lower layer has gets its place in this one.
            rustix::fs::futimens(&job.target.fd, &NOW).map_err(failed)?;
        }
        beside.add(&job.path);
        Ok(true)
    }

    fn claim(&self, inode: Inode, job: &Job) -> Result<Claim> {
        let mut links = self.links.lock();
        loop {
            match links.get_mut(&inode) {
                None => {
                    links.insert(inode, First::Copying(Vec::new()));
                    return Ok(Claim::Copy);
                }
                Some(First::Done(first)) => return Ok(Claim::Link(first.clone())),
                Some(First::Copying(names)) if names.len() < MAX_WAITING => {
                    names.push(Name {
                        target: job.target.clone(),
                        name: job.target_name.clone(),
                        path: job.path.clone(),
                    });
                    return Ok(Claim::Left);
                }
                Some(First::Copying(_)) => {
                    self.check()?;
                    self.links_changed.wait(&mut links);
                }
            }
        }
    }

    /// Another name for the copy at `first`, below the top. Its directory is opened anew: to keep
    /// those of all files that have several names open could be too many.
    fn link(&self, first: &Path, target: &TargetDir, name: &OsString, path: &Path) -> Result<()> {
        let whole = Path::new(self.to.name()).join(first);
        let (Some(dir), Some(first_name)) = (whole.parent(), whole.file_name()) else {
            return Err(Fault::internal("a link to no file"));
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let failed = |e| fault("link", &self.shown(path), e);
        let below = dir.as_os_str().as_bytes();
        let dir = open_beneath(&self.base.fd, below, flags).map_err(failed)?;
        self.make(target, name, path, || {
            rustix::fs::linkat(&dir, first_name, &target.fd, name, AtFlags::empty())
        })
    }

    /// Makes `name`, with `make` that replaces nothing, in place of what is there.
    fn make<T>(
        &self,
        target: &TargetDir,
        name: &OsString,
        path: &Path,
        make: impl Fn() -> rustix::io::Result<T>,
    ) -> Result<T> {
        match make() {
            Err(Errno::EXIST) => {
                self.clear(target, name, path)?;
                make()
            }
            made => made,
        }
        .map_err(|e| fault("copy", &self.shown(path), e))
    }

    /// Makes way at `name`; nothing that is there is followed or written through.
    fn clear(&self, target: &TargetDir, name: &OsString, path: &Path) -> Result<()> {
        match rustix::fs::unlinkat(&target.fd, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR | Errno::PERM) if self.settings.replace => {
                remove_all(target.fd.as_fd(), name, 0)
                    .map_err(|e| fault("remove", &self.shown(path), e))
            }
            Err(Errno::ISDIR) => Err(Fault::invalid(format!(
                "cannot replace to directory {} with file",
                self.shown(path)
            ))),
            Err(e) => Err(fault("remove", &self.shown(path), e)),
        }
    }

    fn create(&self, job: &Job, mode: RawMode) -> Result<OwnedFd> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || {
            rustix::fs::openat(
                &job.target.fd,
                &job.target_name,
                flags,
                Mode::from_raw_mode(mode & 0o777),
            )
        };
        self.make(&job.target, &job.target_name, &job.path, open)
    }

    fn file(&self, job: &Job, from: &OwnedFd, stat: &Stat) -> Result<()> {
        let mode = mode(stat, self.settings);
        let to = self.create(job, mode)?;
        let copy = || {
            shipway_refs::copy_contents(from.as_fd(), to.as_fd(), stat, &|| self.goes_on())?;
            let (uid, gid) = owner(stat, self.settings);
            data::adopt(to.as_fd(), uid.as_raw(), gid.as_raw(), Mode::from_raw_mode(mode))?;
            data::xattrs(from.as_fd(), to.as_fd());
            rustix::fs::futimens(&to, &times(stat, self.settings))
        };
        copy().map_err(|e| fault("copy", &self.shown(&job.path), e))
    }

    /// Links, devices, FIFOs and sockets. Of a socket an empty file is left, as in BuildKit: it is
    /// nothing without its process.
    fn special(&self, job: &Job) -> Result<()> {
        let failed = |e| fault("copy", &self.shown(&job.path), e);
        let (source, target, name) = (&job.source, &job.target, &job.target_name);
        let stat =
            rustix::fs::statat(source, &job.name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(source, &job.name, Vec::new()).map_err(failed)?;
                self.make(target, name, &job.path, || {
                    rustix::fs::symlinkat(link.as_c_str(), &target.fd, name)
                })?;
            }
            FileType::Socket => drop(self.create(job, 0o600)?),
            kind => {
                let mode = Mode::from_raw_mode(0o600);
                self.make(target, name, &job.path, || {
                    rustix::fs::mknodat(&target.fd, name, kind, mode, stat.st_rdev)
                })?;
            }
        }
        let attributes = || {
            let (uid, gid) = owner(&stat, self.settings);
            rustix::fs::chownat(&target.fd, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            if job.kind != FileType::Symlink {
                shipway_filesync::chmod_nofollow(
                    &target.fd,
                    name,
                    Mode::from_raw_mode(mode(&stat, self.settings)),
                )?;
            }
            data::xattrs_at((source.as_fd(), &job.name), (target.fd.as_fd(), name));
            rustix::fs::utimensat(
                &target.fd,
                name,
                &times(&stat, self.settings),
                AtFlags::SYMLINK_NOFOLLOW,
            )
        };
        attributes().map_err(failed)
    }
}
