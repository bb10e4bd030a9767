//! Places in a root: paths that the kernel keeps inside, and errors in the words that people know.

use crate::path::RootPath;
use rustix::{
    fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    fs::{AtFlags, FileType, Gid, Mode, OFlags, RawMode, Stat, Timespec, Timestamps, Uid},
    io::Errno,
};
use shipway_fault::{Class, Fault, Result, nearest};
use shipway_rootfs::RootView;
use std::{
    ffi::{OsStr, OsString},
    fmt::Display,
    fs::File,
    os::unix::ffi::OsStrExt,
    path::Path,
};

/// Deeper trees are refused: every level holds two descriptors open.
pub(crate) const MAX_DEPTH: usize = 400;

/// Longest path that the kernel takes.
const MAX_PATH: usize = 4095;
/// Most names that are compared with a missing one.
const MAX_NAMES: usize = 1000;

/// The fault of a system call on `path`; `what` is the verb.
pub(crate) fn fault(what: &str, path: &impl Display, error: Errno) -> Fault {
    let plain = match error {
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::NOTDIR => "not a directory".to_owned(),
        Errno::ISDIR => "is a directory".to_owned(),
        Errno::EXIST => "file exists".to_owned(),
        Errno::NOTEMPTY => "directory not empty".to_owned(),
        Errno::LOOP => "too many levels of symbolic links".to_owned(),
        Errno::NAMETOOLONG => "file name too long".to_owned(),
        Errno::NOSPC => "no space left on device".to_owned(),
        e => std::io::Error::from(e).to_string(),
    };
    if error == Errno::CANCELED {
        return Fault::cancelled();
    }
    let fault = Fault::io(what, error.into());
    let user = matches!(
        error,
        Errno::NOENT
            | Errno::NOTDIR
            | Errno::ISDIR
            | Errno::EXIST
            | Errno::NOTEMPTY
            | Errno::LOOP
            | Errno::NAMETOOLONG
    );
    let mut plainer = Fault::new(fault.code(), format!("{what} {path}: {plain}"));
    plainer = plainer
        .with_class(if user { Class::User } else { fault.class() })
        .with_source(std::io::Error::from(error));
    fault.hints().fold(plainer, |t, h| t.hint(h.to_owned()))
}

/// Owner of made files.
pub(crate) type Ids = (u32, u32);

/// A root filesystem to work in.
pub(crate) struct Root {
    view: RootView,
}

impl Root {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        Ok(Self { view: RootView::of_directory(path)? })
    }

    /// The directory `path` of this root as a root of its own.
    pub(crate) fn sub(&self, path: &RootPath) -> Result<Self> {
        let dir = self
            .view
            .open_at(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
            .map_err(|e| fault("open", path, e))?;
        let own = std::path::PathBuf::from(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&dir)
        ));
        Ok(Self { view: RootView::of_directory(&own.join("."))? })
    }

    /// `path` with all links followed inside the root, absent parts as written.
    pub(crate) fn real(&self, path: &RootPath) -> Result<RootPath> {
        let bytes: &[u8] = path.as_ref();
        let real = self.view.real_path_bytes(bytes).ok_or_else(|| match bytes.get(..MAX_PATH) {
            Some(part) => fault("resolve", &String::from_utf8_lossy(part), Errno::NAMETOOLONG),
            None => fault("resolve", path, Errno::LOOP),
        })?;
        Ok(RootPath::new(real))
    }

    /// The same without following a link at the end, unless `follow` says so.
    pub(crate) fn real_entry(&self, path: &RootPath, follow: bool) -> Result<RootPath> {
        if follow || path.is_root() {
            self.real(path)
        } else {
            Ok(self.real(&path.parent())?.join(path.name()))
        }
    }

    pub(crate) fn lstat(&self, path: &RootPath) -> rustix::io::Result<Stat> {
        self.view.lstat(path)
    }

    /// What a source is; if it is not there, the fault says which name beside it was probably
    /// meant.
    pub(crate) fn source(&self, path: &RootPath) -> Result<Stat> {
        self.lstat(path).map_err(|e| {
            let missing = fault("lstat", path, e);
            match (e == Errno::NOENT).then(|| self.near(path)).flatten() {
                Some(near) => missing.hint(format!("did you mean {near}?")),
                None => missing,
            }
        })
    }

    /// The nearest name to that of `path`, beside it.
    fn near(&self, path: &RootPath) -> Option<RootPath> {
        let dir = self.dir(&path.parent()).ok()?;
        let names = names(dir.as_fd())
            .ok()?
            .into_iter()
            .take(MAX_NAMES)
            .filter_map(|(n, _)| n.into_string().ok());
        let names: Vec<String> = names.collect();
        nearest(&path.name().to_string_lossy(), names.iter().map(String::as_str))
            .map(|near| path.parent().join(near))
    }

    pub(crate) fn stat(&self, path: &RootPath) -> rustix::io::Result<Stat> {
        self.view.stat(path)
    }

    /// Opens a regular file for reading; none if it is something else.
    pub(crate) fn open_regular(&self, path: &RootPath) -> rustix::io::Result<Option<File>> {
        self.view.open_regular(path)
    }

    pub(crate) fn open_file(
        &self,
        path: &RootPath,
        flags: OFlags,
        mode: RawMode,
    ) -> rustix::io::Result<OwnedFd> {
        self.view.open_at(path, flags, Mode::from_raw_mode(mode))
    }

    /// The directory `path`, links followed, for reading its names and for working in.
    pub(crate) fn dir(&self, path: &RootPath) -> rustix::io::Result<OwnedFd> {
        self.view.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// Sets both times of `path`, a link at its end not followed, as far as that can be done.
    pub(crate) fn set_time(&self, path: &RootPath, nanos: i64) {
        if let Ok(dir) = self.dir(&path.parent()) {
            let _ = rustix::fs::utimensat(
                &dir,
                path.name(),
                &at_time(nanos),
                AtFlags::SYMLINK_NOFOLLOW,
            );
        }
    }

    /// Makes the directory `path` and its missing parents; returns those it made, outermost first.
    pub(crate) fn make_dirs(
        &self,
        path: &RootPath,
        mode: RawMode,
        owner: Option<Ids>,
        time: Option<i64>,
    ) -> Result<Vec<RootPath>> {
        let real = self.real(path)?;
        // Most often it is there.
        if self.stat(&real).is_ok_and(|s| is_dir(&s)) {
            return Ok(Vec::new());
        }
        let (mut parent, mut made) = (RootPath::default(), Vec::new());
        for name in real.names() {
            let at = parent.join(name);
            match self.stat(&at) {
                Ok(s) if is_dir(&s) => {}
                Ok(_) => return Err(fault("mkdir", &at, Errno::NOTDIR)),
                Err(Errno::NOENT) => {
                    let make = || {
                        let dir = self.dir(&parent)?;
                        make_dir(dir.as_fd(), name, mode)?;
                        finish(dir.as_fd(), name, owner, Some(mode), time)
                    };
                    make().map_err(|e| fault("mkdir", &at, e))?;
                    made.push(at.clone());
                }
                Err(e) => return Err(fault("mkdir", &at, e)),
            }
            parent = at;
        }
        Ok(made)
    }
}

/// Makes a directory. The umask takes its part of `mode`: callers that want exactly that mode set
/// it afterwards, as [`finish`] does.
pub(crate) fn make_dir(dir: BorrowedFd<'_>, name: &OsStr, mode: RawMode) -> rustix::io::Result<()> {
    rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode & 0o7777))
}

pub(crate) fn is_dir(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

pub(crate) fn is_regular(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

/// Both times of a file at `nanos` since the epoch.
pub(crate) fn at_time(nanos: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: nanos.div_euclid(1_000_000_000),
        tv_nsec: nanos.rem_euclid(1_000_000_000),
    };
    Timestamps { last_access: time, last_modification: time }
}

/// Sets owner, permissions and time of what was just made at `name`; links are not followed.
pub(crate) fn finish(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    owner: Option<Ids>,
    mode: Option<RawMode>,
    time: Option<i64>,
) -> rustix::io::Result<()> {
    if let Some((uid, gid)) = owner {
        rustix::fs::chownat(
            dir,
            name,
            Some(Uid::from_raw(uid)),
            Some(Gid::from_raw(gid)),
            AtFlags::SYMLINK_NOFOLLOW,
        )?;
    }
    if let Some(mode) = mode {
        chmod(dir, name, mode)?;
    }
    if let Some(time) = time {
        rustix::fs::utimensat(dir, name, &at_time(time), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// Sets the permissions of what is at `name`, but not of what a link there leads to: where others
/// write in the tree at the same time, what was just made may be one by now.
pub(crate) fn chmod(dir: BorrowedFd<'_>, name: &OsStr, mode: RawMode) -> rustix::io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) == FileType::Symlink {
        return Err(Errno::LOOP);
    }
    // The kernel's own link leads to exactly what was opened.
    rustix::fs::chmod(
        format!("/proc/self/fd/{}", fd.as_raw_fd()),
        Mode::from_raw_mode(mode & 0o7777),
    )
}

/// Removes `name` and everything below it, following no link.
pub(crate) fn remove_all(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    depth: usize,
) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    if depth > MAX_DEPTH {
        return Err(Errno::NAMETOOLONG);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let sub = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    for (name, _) in names(sub.as_fd())? {
        remove_all(sub.as_fd(), &name, depth + 1)?;
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}

/// The names in a directory, sorted, each with what it is as far as the file system says.
pub(crate) fn names(dir: BorrowedFd<'_>) -> rustix::io::Result<Vec<(OsString, FileType)>> {
    let mut all = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        match entry.file_name().to_bytes() {
            b"." | b".." => {}
            name => all.push((OsStr::from_bytes(name).to_owned(), entry.file_type())),
        }
    }
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}
