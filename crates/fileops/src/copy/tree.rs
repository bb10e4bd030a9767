//! The walk of one copy: directories, here; everything else is a job for the workers.

use super::{
    super::{
        path::RootPath,
        place::{MAX_DEPTH, Root, at_time, fault, is_dir, make_dir, names},
        settings::Settings,
    },
    Beside, data,
    work::{Job, Work},
};
use parking_lot::Mutex;
use rustix::{
    fd::{AsFd, OwnedFd},
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawMode, Stat, Timespec, Timestamps, Uid},
    io::Errno,
};
use shipway_fault::{Fault, Result};
use shipway_filesync::{DirMatch, Verdict};
use std::{
    ffi::{OsStr, OsString},
    path::Path,
    sync::{
        Arc,
        mpsc::{self, TrySendError},
    },
};

/// Jobs that are handed on together: to wake a thread costs about as much as to copy a file.
const BATCH: usize = 16;
/// Batches that wait, for each thread. Every job keeps two directories open, most often those of
/// its neighbors.
const QUEUE: usize = 2;
const MAX_THREADS: usize = 4;

/// A directory of the target. What would change, or would change what is made in it, is set when
/// the last worker in it is done.
pub(super) struct TargetDir {
    pub(super) fd: OwnedFd,
    times: Option<Timestamps>,
    /// Whose extended attributes it gets: a default ACL is for files that are made later.
    model: Option<Arc<OwnedFd>>,
    /// Whether it was made for the copy, so that nothing was in it before.
    pub(super) made: bool,
}

impl Drop for TargetDir {
    fn drop(&mut self) {
        if let Some(model) = &self.model {
            data::xattrs(model.as_fd(), self.fd.as_fd());
        }
        if let Some(times) = &self.times {
            let _ = rustix::fs::futimens(&self.fd, times);
        }
    }
}

/// A directory on the way from the top to where the walk is. Its copy is made when something in it
/// is.
struct Level {
    source: Arc<OwnedFd>,
    stat: Stat,
    name: OsString,
    /// Whether it is the top, which leaves an existing directory's attributes alone.
    top: bool,
    /// Whether it is wanted itself, and not only as the place of something.
    keep: bool,
    target: Option<Arc<TargetDir>>,
}

pub(super) struct Copier<'a> {
    work: &'a Work<'a>,
    settings: &'a Settings,
    levels: Vec<Level>,
    batch: Vec<Job>,
    queue: mpsc::SyncSender<Vec<Job>>,
}

/// Copies `from` of `source` to `to` of `target`; the directory above `to` exists.
pub(super) fn copy(
    source: &Root,
    from: &RootPath,
    target: &Root,
    to: &RootPath,
    settings: &Settings,
    beside: Option<&Beside>,
) -> Result<()> {
    let base = target.dir(&to.parent()).map_err(|e| fault("open", &to.parent(), e))?;
    let base = Arc::new(TargetDir { fd: base, times: None, model: None, made: false });
    let dir = Arc::new(source.dir(&from.parent()).map_err(|e| fault("open", &from.parent(), e))?);
    let stat = rustix::fs::statat(&dir, from.name(), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| fault("lstat", from, e))?;
    let work = Work::new(settings, base.clone(), to, beside);
    if !is_dir(&stat) {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let (name, target_name) = (from.name().to_owned(), to.name().to_owned());
        return work.run(&Job {
            source: dir,
            name,
            kind,
            target: base,
            target_name,
            path: Default::default(),
        });
    }
    // This thread copies, too, when the others have enough to do.
    let others =
        std::thread::available_parallelism().map_or(1, |n| n.get()).clamp(2, MAX_THREADS) - 1;
    let result = std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel(QUEUE * others);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..others {
            let (receiver, work) = (receiver.clone(), &work);
            scope.spawn(move || work.run_all(&receiver));
        }
        let mut copier =
            Copier { work: &work, settings, levels: Vec::new(), batch: Vec::new(), queue: sender };
        copier.directory(
            &dir,
            from.name(),
            to.name(),
            Path::new(""),
            true,
            &DirMatch::default(),
        )?;
        work.run_batch(copier.batch)
    });
    match work.failure() {
        Some(first) => Err(first),
        None => result,
    }
}

impl Copier<'_> {
    /// Copies the directory `name` of `dir`. `path` is relative to the top; empty for the top
    /// itself.
    fn directory(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        target_name: &OsStr,
        path: &Path,
        keep: bool,
        state: &DirMatch,
    ) -> Result<()> {
        if self.levels.len() >= MAX_DEPTH {
            return Err(Fault::invalid(format!(
                "{} is nested more than {MAX_DEPTH} directories deep",
                self.work.shown(path)
            )));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || {
            let source = rustix::fs::openat(dir, name, flags, Mode::empty())?;
            let stat = rustix::fs::fstat(&source)?;
            Ok((Arc::new(source), stat))
        };
        let (source, stat) = open().map_err(|e| fault("open", &self.work.shown(path), e))?;
        let top = path.as_os_str().is_empty();
        self.levels.push(Level {
            source: source.clone(),
            stat,
            name: target_name.to_owned(),
            top,
            keep,
            target: None,
        });
        let done = self.contents(&source, path, keep, state);
        self.levels.pop();
        done
    }

    fn contents(
        &mut self,
        source: &Arc<OwnedFd>,
        path: &Path,
        keep: bool,
        state: &DirMatch,
    ) -> Result<()> {
        if keep {
            self.ensure(path)?;
        }
        for (name, kind) in
            names(source.as_fd()).map_err(|e| fault("read", &self.work.shown(path), e))?
        {
            self.work.check()?;
            let below = path.join(&name);
            let kind = match kind {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(source, &name, AtFlags::SYMLINK_NOFOLLOW);
                    FileType::from_raw_mode(
                        stat.map_err(|e| fault("lstat", &self.work.shown(&below), e))?.st_mode,
                    )
                }
                kind => kind,
            };
            let directory = kind == FileType::Directory;
            let (verdict, state) = if self.settings.filter.is_empty() {
                (Verdict::Keep, DirMatch::default())
            } else {
                // Patterns are text: what has no text is matched as it is shown.
                self.settings.filter.visit(&below.to_string_lossy(), directory, state)
            };
            match verdict {
                Verdict::Keep | Verdict::Pass if directory => {
                    self.directory(source, &name, &name, &below, verdict == Verdict::Keep, &state)?;
                }
                Verdict::Keep => {
                    let (target, target_name) = (self.ensure(path)?, name.clone());
                    self.job(Job {
                        source: source.clone(),
                        name,
                        kind,
                        target,
                        target_name,
                        path: below,
                    })?;
                }
                Verdict::Pass | Verdict::Prune => {}
            }
        }
        Ok(())
    }

    fn job(&mut self, job: Job) -> Result<()> {
        self.batch.push(job);
        if self.batch.len() < BATCH {
            return Ok(());
        }
        match self.queue.try_send(std::mem::take(&mut self.batch)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(batch) | TrySendError::Disconnected(batch)) => {
                self.work.run_batch(batch)
            }
        }
    }

    /// The copy of the directory the walk is in, made now if it was not yet.
    fn ensure(&mut self, path: &Path) -> Result<Arc<TargetDir>> {
        let mut parent = self.work.base.clone();
        for level in &mut self.levels {
            parent = match &level.target {
                Some(target) => target.clone(),
                None => {
                    let made = make_level(&parent, level, self.settings).map_err(|e| match e {
                        Errno::NOTDIR => Fault::invalid(format!(
                            "cannot copy to non-directory: {}",
                            self.work.shown(path)
                        )),
                        e => fault("mkdir", &self.work.shown(path), e),
                    })?;
                    level.target.insert(Arc::new(made)).clone()
                }
            };
        }
        Ok(parent)
    }
}

/// The source's times, or the one that was asked for.
pub(super) fn times(stat: &Stat, settings: &Settings) -> Timestamps {
    #[allow(clippy::unnecessary_cast)]
    let of_source = || Timestamps {
        last_access: Timespec { tv_sec: stat.st_atime, tv_nsec: stat.st_atime_nsec as _ },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    };
    settings.time.map_or_else(of_source, at_time)
}

pub(super) fn owner(stat: &Stat, settings: &Settings) -> (Uid, Gid) {
    let (uid, gid) = settings.owner.unwrap_or((stat.st_uid, stat.st_gid));
    (Uid::from_raw(uid), Gid::from_raw(gid))
}

pub(super) fn mode(stat: &Stat, settings: &Settings) -> RawMode {
    settings.mode.apply(stat.st_mode, is_dir(stat))
}

/// Makes the copy of a directory, or takes the one that is there.
fn make_level(
    parent: &TargetDir,
    level: &Level,
    settings: &Settings,
) -> rustix::io::Result<TargetDir> {
    let name = level.name.as_os_str();
    let made = match make_dir(parent.fd.as_fd(), name, 0o700) {
        Ok(()) => true,
        Err(Errno::EXIST) => {
            let there = rustix::fs::statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if is_dir(&there) {
                false
            } else if settings.replace {
                rustix::fs::unlinkat(&parent.fd, name, AtFlags::empty())?;
                make_dir(parent.fd.as_fd(), name, 0o700)?;
                true
            } else {
                return Err(Errno::NOTDIR);
            }
        }
        Err(e) => return Err(e),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(&parent.fd, name, flags, Mode::empty())?;
    let alike = made || (level.keep && !level.top);
    if alike {
        let (uid, gid) = owner(&level.stat, settings);
        rustix::fs::fchown(&fd, Some(uid), Some(gid))?;
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode(&level.stat, settings)))?;
    } else if !level.top {
        // As in BuildKit, a place that is there already takes the permissions, and no more.
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(level.stat.st_mode & 0o7777))?;
    }
    Ok(TargetDir {
        fd,
        times: Some(times(&level.stat, settings)),
        model: alike.then(|| level.source.clone()),
        made,
    })
}
